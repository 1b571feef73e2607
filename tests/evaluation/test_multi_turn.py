"""Questions in turn: one cache answers as the whole text read anew would, with any method that can go on."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from small_families import small_model
from transformers import LlamaConfig, LlamaForCausalLM

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.data.chat_template import apply_template
from sparsetrain.errors import DataError, ModelError, RecipeError
from sparsetrain.evaluation.generative.writing import Text, TextWriter
from sparsetrain.evaluation.multi_turn.prompts import BUDGET, Talks
from sparsetrain.evaluation.multi_turn.result import MultiTurnResult
from sparsetrain.evaluation.report import print_results, write_report
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.runner import evaluate
from sparsetrain.evaluation.tasks.multi_turn import MultiTurnSection
from sparsetrain.recipe import load_recipe
from sparsetrain.recipe.schema import EvalSection
from sparsetrain.world import World

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "power": {"method": "power", "block": 16, "window": 2, "sinks": 1},
    "sliding": {"method": "sliding", "block": 16, "window": 2, "sinks": 1},
    "sparsek": {"method": "sparsek", "topk": 16, "window": 8, "sinks": 2, "score_buffer": 4096},
}
ENDS = {*range(0, 256, 23), 256}
"""Tokens that end some of the answers of a random model early."""
HERE = World(0, 1, torch.device("cpu"))
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def model(attention: dict[str, Any], **overrides: Any) -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        eos_token_id=256,
        **overrides,
    )
    return sparsetrain.sparsify(LlamaForCausalLM(config).eval(), attention)


def section(**settings: Any) -> MultiTurnSection:
    return MultiTurnSection(**{"lengths": [900], "samples": 2, "turns": 3, "keys": 4, **settings})


def talks(tokenizer: Any, **settings: Any) -> list[Any]:
    return Talks(section(**settings), tokenizer, seed=5).all()


@torch.no_grad()
def check_anew(model: Any, before: list[int], text: Text, ends: set[int]) -> None:
    """A text is what greedy search writes behind tokens that are read without a cache."""
    first = model(torch.tensor([before + text.tokens]), use_cache=False).logits[0, len(before) - 1 :].argmax(-1)
    *chosen, following = first.tolist()
    assert chosen == text.tokens
    assert not ends & {*text.tokens}
    assert text.cut == (len(text.tokens) == BUDGET)
    assert text.cut or following in ends


@pytest.mark.parametrize("method", METHODS)
def test_answers_from_one_cache_are_those_to_the_whole_text_read_anew(method, byte_tokenizer):
    written = model(METHODS[method])
    lengths = set()
    for talk in talks(byte_tokenizer):
        spoken = TextWriter(written, byte_tokenizer, in_step=False).conversation(talk.length)
        for turn in talk.turns:
            before = [*spoken.tokens, *turn.input_ids.tolist()]
            text = spoken.ask(turn.input_ids.tolist(), BUDGET, ENDS)
            check_anew(written, before, text, ENDS)
            assert spoken.tokens == before + text.tokens
            lengths.add(len(text.tokens))
        assert len(spoken.tokens) <= talk.length
    assert len(lengths) > 2


def test_every_turn_takes_as_many_passes_where_ranks_share_a_model(byte_tokenizer):
    written, passes = model(METHODS["power"]), []
    written.register_forward_hook(lambda *_: passes.append(1))
    (talk,) = talks(byte_tokenizer, samples=1)
    texts = []
    for in_step in (False, True):
        passes.clear()
        spoken = TextWriter(written, byte_tokenizer, in_step=in_step).conversation(talk.length)
        texts.append([spoken.ask(turn.input_ids.tolist(), BUDGET, ENDS) for turn in talk.turns])
    assert texts[0] == texts[1]
    assert not all(text.cut for text in texts[0])
    assert len(passes) == 3 * BUDGET


@pytest.mark.parametrize(
    "decode",
    [{"prune": {"p": 0.8}}, {"select": "quest", "candidates": 64}, {"refresh": {"every": 4, "keep": 32}}],
    ids=str,
)
def test_decode_settings_answer_in_turn(decode, byte_tokenizer):
    written = sparsetrain.set_decode(model(METHODS["full"]), {**decode, "dense_layers": [0]})
    result = evaluate(written, byte_tokenizer, EvalSection(tasks=[section(samples=1)]), HERE).tasks["multi_turn"]
    assert result.texts().asked == 3
    assert 0 < result.texts().written <= 3 * BUDGET


def test_conversations_tell_every_number_once_and_fit(byte_tokenizer):
    for talk in talks(byte_tokenizer, lengths=[900, 2000], keys=5):
        first = byte_tokenizer.decode(talk.turns[0].input_ids)
        read = sum(len(turn.input_ids) for turn in talk.turns) + 3 * BUDGET
        assert 0 <= talk.length - read < 300
        assert len(re.findall(r"The number of \S+ is \d{7}\.", first)) == 5
        asked = [byte_tokenizer.decode(turn.input_ids).rpartition("number of ")[2].split(" ")[0] for turn in talk.turns]
        assert len({*asked}) == 3
        for key, turn in zip(asked, talk.turns, strict=True):
            assert first.count(f"The number of {key} is {turn.answer}.") == 1
            assert byte_tokenizer.decode(talk.turns[0].input_ids[: turn.place]).endswith(f"The number of {key}")
        assert byte_tokenizer.decode(talk.turns[1].input_ids).startswith("\nQuestion: What is the number of")


def test_turns_of_a_chat_are_those_of_the_template(byte_tokenizer):
    tokenizer = byte_tokenizer.__class__(tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<eos>")
    tokenizer.chat_template = CHATML
    (talk,) = talks(tokenizer, samples=1)
    texts = [tokenizer.decode(turn.input_ids) for turn in talk.turns]
    questions = [
        text[text.index("Question: ") : text.rindex(" Answer:")].removesuffix("<eos>\n<|assistant|>") for text in texts
    ]
    context = texts[0].removeprefix("<|user|>").partition("Question: ")[0]
    prefixes = [text[text.rindex(" Answer:") :] for text in texts]
    messages = [{"role": "user", "content": context + questions[0]}]
    for prefix, question in zip(prefixes, questions[1:]):
        messages += [{"role": "assistant", "content": f"{prefix} 17"}, {"role": "user", "content": question}]
    rendered = apply_template(tokenizer, messages, prompt=True).text + prefixes[-1]
    assert " 17".join(texts) == rendered
    tokenizer.chat_template = CHATML.replace("m.content", "(m.content if loop.last else '')")
    with pytest.raises(DataError, match=r"^eval\.tasks\.multi_turn\.prompt: .* next turn behind an answer"):
        talks(tokenizer)


def test_scores_are_told_by_turn_and_distance(byte_tokenizer, tmp_path, capsys):
    task = section(lengths=[1600, 900]).build(byte_tokenizer, 0)
    records = [[[1, 8, 0, 80], [1, 8, 0, 300], [1, 32, 1, 700]], [[1, 8, 0, 100], [0, 11, 0, 101], [0, 32, 1, 820]]]
    result = task.result({"conversations": records * 2})
    assert (result.lengths, result.bounds) == ([900, 1600], [100, 200, 400, 800, 1600])
    assert result.means() == pytest.approx([100 * 4 / 6] * 2)
    metrics = result.metrics()
    assert (metrics["/first"], metrics["/last"], metrics["/every"], metrics["/worst"]) == (100, 50, 50, 50)
    assert (metrics["/900/turn_1"], metrics["/900/turn_2"], metrics["/written"]) == (100, 50, 16.5)
    assert metrics["/cut"] == pytest.approx(1 / 3)
    assert (metrics["/written_right"], metrics["/written_wrong"]) == (8, 11)
    assert [each.asked for each in result.spoken[0].distances] == [2, 1, 1, 1, 1]
    results = {"before": EvalResult(tasks={"multi_turn": result})}
    print_results(results)
    assert "Questions in turn by length (conversations: 2, turns: 3)" in capsys.readouterr().out
    report = write_report(results, tmp_path, title="Evaluation").read_text()
    assert "| turn 2 | 50.0 [9, 91] | 50.0 [9, 91] | 10, 0% cut (right 8.0, wrong 11.0) |" in report
    assert "| turn 3 | 50.0 [9, 91] | 50.0 [9, 91] | 32, 100% cut |" in report
    assert "| distance up to 200 | 0.0 [0, 79] |" in report
    written = results["before"].model_dump_json()
    assert EvalResult.model_validate_json(written) == results["before"]
    earlier = EvalResult.model_validate_json(re.sub(r',"ended":\{.*?\}', "", written)).tasks["multi_turn"]
    assert (earlier.texts().length(), earlier.texts().cut) == (result.texts().length().partition(" (")[0], 4)
    from matplotlib.figure import Figure

    drawing = MultiTurnResult.drawing("multi_turn", {"before": result}, None)
    drawing.draw(Figure(figsize=(drawing.width, drawing.height)))


def test_what_cannot_be_is_refused_with_its_field(byte_tokenizer, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("base: quickstart\neval: {tasks: [{task: multi_turn, turns: 30}]}\n")
    with pytest.raises(RecipeError, match=r"multi_turn\.turns: 30 questions are about different keys, and .* is 20"):
        load_recipe(file)
    with pytest.raises(DataError, match=r"multi_turn\.lengths: a length of 400 has no room for multi_turn"):
        section(lengths=[400]).try_inputs(byte_tokenizer)
    states = sparsetrain.sparsify(small_model("falcon_h1"), {"method": "full"})
    with pytest.raises(ModelError, match=r"eval\.tasks\.multi_turn asks several questions of one cache: .* has layers"):
        evaluate(states, byte_tokenizer, EvalSection(tasks=[section()]), HERE)


def test_an_evaluation_runs_from_a_recipe_to_its_numbers(tmp_path, capsys, tiny_folder):
    file, output = tmp_path / "recipe.yaml", tmp_path / "result.json"
    tasks = [{"task": "multi_turn", "lengths": [600], "samples": 2, "turns": 3, "keys": 4}]
    file.write_text(f"base: quickstart\neval: {{tasks: {json.dumps(tasks)}}}\n")
    assert main(["eval", str(tiny_folder), str(file), "--output", str(output)]) == 0
    assert "Questions in turn by length" in capsys.readouterr().out
    (measured,) = json.loads(output.read_text())["rows"].values()
    (spoken,) = measured["tasks"]["multi_turn"]["spoken"]
    assert [each["asked"] for each in spoken["turns"]] == [2, 2, 2]
