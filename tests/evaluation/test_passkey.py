from __future__ import annotations

import pytest
import torch

from sparsetrain.data import collate
from sparsetrain.data.batch import IGNORE
from sparsetrain.errors import DataError
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.evaluation.tasks.passkey import Passkey, PasskeySection, Prompt
from sparsetrain.modeling import sparsify
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.world import World

ALONE = World(0, 1, torch.device("cpu"))
GRID = PasskeySection(lengths=[300, 320], depths=3, trials=2, digits=2)


def learn_answers(model, prompts: list[Prompt]) -> None:
    """Fit the output projection to the answers of a few prompts, by heart."""
    batch = collate([prompt.row for prompt in prompts])
    positions = (batch.labels[0, 1:] != IGNORE).nonzero()[:, 0]
    with torch.no_grad():
        inputs = {"position_ids": batch.position_ids, "cu_seqlens": batch.cu_seqlens, "use_cache": False}
        hidden = model.model(batch.input_ids, **inputs).last_hidden_state[0, positions]
    optimizer = torch.optim.AdamW(model.lm_head.parameters(), lr=1e-1)
    for _ in range(100):
        torch.nn.functional.cross_entropy(model.lm_head(hidden), batch.labels[0, positions + 1]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("attention", [{"method": "full"}, {"method": "power", "block": 32, "window": 2}])
def test_teacher_forcing_agrees_with_greedy_generation(tiny_model, byte_tokenizer, attention):
    sparsify(tiny_model, attention)
    prompts = [prompt for group in Passkey(GRID, byte_tokenizer, seed=3).groups for prompt in group]
    learn_answers(tiny_model, prompts[::2])

    expected = [[0, 0, 0], [0, 0, 0]]
    for prompt in prompts:
        ids, labels = (torch.from_numpy(array) for array in (prompt.row.input_ids, prompt.row.labels))
        answer = ids[labels != IGNORE]
        asked = ids[: len(ids) - len(answer)][None]
        written = tiny_model.generate(
            asked, attention_mask=torch.ones_like(asked), max_new_tokens=len(answer), do_sample=False
        )
        expected[prompt.length_index][prompt.depth_index] += torch.equal(written[0, -len(answer) :], answer)

    result = evaluate(tiny_model, byte_tokenizer, EvalSection(tasks=[GRID]), ALONE, seed=3)
    assert result.tasks["passkey"].correct == expected
    assert 0 < sum(map(sum, expected)) < len(prompts), "the comparison needs right and wrong answers"


def test_one_wrong_digit_is_a_wrong_answer(tiny_model, byte_tokenizer):
    section = PasskeySection(lengths=[400], depths=1, trials=1, digits=3)
    (prompt,) = Passkey(section, byte_tokenizer, seed=0).groups[0]
    learn_answers(tiny_model, [prompt])
    result = evaluate(tiny_model, byte_tokenizer, EvalSection(tasks=[section]), ALONE)
    assert result.tasks["passkey"].correct == [[1]]
    wrong = Passkey(section, byte_tokenizer, seed=0)
    wrong.groups[0][0].row.labels[-1] ^= 1
    with torch.no_grad():
        assert wrong.measure(tiny_model, ALONE, lambda: None).correct == [[0]]


def test_prompts_hold_the_key_at_their_depth_and_repeat_with_the_seed(byte_tokenizer):
    first = Passkey(GRID, byte_tokenizer, seed=1)
    again = Passkey(GRID, byte_tokenizer, seed=1)
    other = Passkey(GRID, byte_tokenizer, seed=2)
    texts = [
        [byte_tokenizer.decode(prompt.row.input_ids) for group in passkey.groups for prompt in group]
        for passkey in (first, again, other)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 12
    places = [text.index("The pass key is") for text in texts[0][:6]]
    assert places[0] < places[2] < places[4]


def test_short_prompts_share_a_forward_pass(byte_tokenizer):
    section = PasskeySection(lengths=[400, 1200], depths=2, trials=3)
    sizes = [len(group) for group in Passkey(section, byte_tokenizer, seed=0).groups]
    assert sizes == [3, 3, 1, 1, 1, 1, 1, 1]


def test_a_length_without_room_for_the_task_is_refused(tiny_model, byte_tokenizer):
    section = PasskeySection(lengths=[100], depths=1, trials=1)
    with pytest.raises(DataError, match=r"eval\.tasks\.passkey\.lengths: .*100 tokens"):
        evaluate(tiny_model, byte_tokenizer, EvalSection(tasks=[section]), ALONE)
