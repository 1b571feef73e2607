from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from ports import free_port
from training.preloaded import ensure_running

from sparsetrain.evaluation.batched import deal
from sparsetrain.evaluation.journal import Journal
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.evaluation.tasks.key_tokens import KeyTokensSection
from sparsetrain.evaluation.tasks.passkey import PasskeySection
from sparsetrain.evaluation.tasks.perplexity import PerplexitySection
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.source_section import DataSource
from sparsetrain.world import World


@pytest.mark.parametrize(("items", "world"), [(7, 3), (6, 3), (1, 4), (2, 1)])
def test_every_item_is_dealt_once_and_every_rank_runs_equally_often(items, world):
    hands = [deal(range(items), World(rank, world, torch.device("cpu"))) for rank in range(world)]
    assert len({len(hand) for hand in hands}) == 1
    assert sorted(item for hand in hands for item, counts in hand if counts) == list(range(items))


def evaluate_on_rank(rank, world, port, model, tokenizer, section, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    forwards = []
    here = World(rank, world, torch.device("cpu"))
    result = evaluate(model, tokenizer, section, here, on_progress=lambda *done: forwards.append(done))
    (out / f"{rank}.json").write_text(result.model_dump_json())
    (out / f"{rank}.txt").write_text(str(forwards[-1]))
    forwards.clear()
    journal = Journal.open(out / "samples", "row", {"model": f"seen by rank {rank}"}, here)
    resumed = evaluate(
        model, tokenizer, section, here, on_progress=lambda *done: forwards.append(done), journal=journal
    )
    (out / f"{rank}.resumed.txt").write_text(str((resumed == result, forwards[0], forwards[-1], journal.notes)))
    # What is found on rank 0 alone holds for all.
    followed = evaluate(model, tokenizer, section, here, first=result if here.main else None)
    (out / f"{rank}.followed.json").write_text(followed.model_dump_json())
    torch.distributed.destroy_process_group()


def killed_after(batches, model, tokenizer, section, folder):
    alone = World(0, 1, torch.device("cpu"))

    def kill(done, total):
        if done == batches:
            raise KeyboardInterrupt

    journal = Journal.open(folder, "row", {"model": "seen by rank 0"}, alone)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, section, alone, on_progress=kill, journal=journal)


def test_two_ranks_measure_what_one_does(tiny_model, byte_tokenizer, tmp_path: Path):
    text = tmp_path / "held_out.txt"
    text.write_text("Ishmael. " + " ".join(f"It was {number} years ago." for number in range(99)))
    perplexity = PerplexitySection(lengths=[64, 256], source=DataSource(path=str(text)), tokens=1200)
    passkey = PasskeySection(lengths=[300, 320], depths=3, trials=1, digits=1)
    keys = KeyTokensSection(
        lengths=[400], source=DataSource(path=str(text)), tokens=1200, short=64, stride=64, alpha=0.01, beta=-9.0
    )
    section = EvalSection(tasks=[perplexity, passkey, keys])
    alone = evaluate(tiny_model, byte_tokenizer, section, World(0, 1, torch.device("cpu")))
    killed_after(5, tiny_model, byte_tokenizer, section, tmp_path / "samples")
    ensure_running()
    arguments = (2, free_port(), tiny_model, byte_tokenizer, section, tmp_path)
    multiprocessing.start_processes(evaluate_on_rank, arguments, nprocs=2, start_method="forkserver")
    first, second = (EvalResult.model_validate_json((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == alone
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text() == "(14, 14)"
    keys_found = [EvalResult.model_validate_json((tmp_path / f"{rank}.followed.json").read_text()) for rank in range(2)]
    assert [each.tasks["key_tokens"].chosen_by for each in keys_found] == ["the first row"] * 2
    assert all(each.tasks["key_tokens"].key == alone.tasks["key_tokens"].key for each in keys_found)
    # Both ranks read the file of the killed evaluation, and share what is left equally.
    said = (True, (3, 14), (14, 14), [f"5 finished batches are taken from {tmp_path / 'samples'}"])
    assert [(tmp_path / f"{rank}.resumed.txt").read_text() for rank in range(2)] == [str(said)] * 2
