from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from ports import free_port

from sparsetrain.evaluation import EvalResult, evaluate
from sparsetrain.evaluation.scoring import Place, deal
from sparsetrain.recipe.schema import EvalSection, PasskeySection, PerplexitySection
from sparsetrain.source_section import DataSource


@pytest.mark.parametrize(("items", "world"), [(7, 3), (6, 3), (1, 4), (2, 1)])
def test_every_item_is_dealt_once_and_every_rank_runs_equally_often(items, world):
    hands = [deal(range(items), Place(torch.device("cpu"), rank, world)) for rank in range(world)]
    assert len({len(hand) for hand in hands}) == 1
    assert sorted(item for hand in hands for item, weight in hand if weight) == list(range(items))


def evaluate_on_rank(rank, world, port, model, tokenizer, section, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    forwards = []
    result = evaluate(
        model, tokenizer, section, device="cpu", rank=rank, world=world, on_progress=lambda *done: forwards.append(done)
    )
    (out / f"{rank}.json").write_text(result.model_dump_json())
    (out / f"{rank}.txt").write_text(str(forwards[-1]))
    torch.distributed.destroy_process_group()


def test_two_ranks_measure_what_one_does(tiny_model, byte_tokenizer, tmp_path: Path):
    text = tmp_path / "held_out.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20)
    perplexity = PerplexitySection(lengths=[64, 256], source=DataSource(path=str(text)), tokens=1200)
    passkey = PasskeySection(lengths=[300, 320], depths=3, trials=1, digits=1)
    section = EvalSection(perplexity=perplexity, passkey=passkey)
    alone = evaluate(tiny_model, byte_tokenizer, section, device="cpu")
    multiprocessing.spawn(
        evaluate_on_rank, (2, free_port(), tiny_model, byte_tokenizer, section, tmp_path), nprocs=2, join=True
    )
    first, second = (EvalResult.model_validate_json((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first.perplexity == pytest.approx(alone.perplexity, rel=1e-9)
    assert first.passkey == alone.passkey
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text() == "(9, 9)"
