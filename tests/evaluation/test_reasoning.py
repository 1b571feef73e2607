"""Reasoning: answers checked by a solver that reads the prompt, lengths, scores, and an evaluation to its tables."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict

import pytest

from sparsetrain.cli import main
from sparsetrain.errors import DataError, RecipeError
from sparsetrain.evaluation.generative.tally import Tally
from sparsetrain.evaluation.reasoning.prompts import ReasoningPrompts
from sparsetrain.evaluation.reasoning.result import ReasoningResult, Row
from sparsetrain.evaluation.reasoning.specs import budget, is_right
from sparsetrain.evaluation.report import print_results, write_report
from sparsetrain.evaluation.result import EvalResult
from sparsetrain.evaluation.tasks.reasoning import ReasoningSection
from sparsetrain.recipe import load_recipe

PATTERNS = {
    "move": r"([A-Z]\w+) (?:went|walked|moved) (?:in)?to the (\w+)\.",
    "take": r"([A-Z]\w+) (?:picked up|took|grabbed) the (\w+)(?: along)?\.",
    "drop": r"([A-Z]\w+) (?:put down|left|dropped) the (\w+)(?: behind)?\.",
    "give": r"([A-Z]\w+) (?:gave|handed) the (\w+) (?:over )?to (\w+)\.",
}
PEOPLE = "Alma|Bruno|Carla|Dario|Edith|Felix|Greta|Hugo"


def solve_story(text):
    """The answer of a prompt about a story, by what its sentences say and nothing else."""
    told, question = text.split("\n\nQuestion: ")
    events = sorted(
        (match.start(), verb, match.groups())
        for verb, pattern in PATTERNS.items()
        for match in re.finditer(pattern, told)
        if re.fullmatch(PEOPLE, match[1])
    )
    place, holder, gifts, history = {}, {}, [], defaultdict(list)
    for _, verb, (who, what, *whom) in events:
        if verb == "move":
            place[who] = what
        elif verb == "take":
            assert what not in holder
            holder[what] = who
        elif verb == "drop":
            assert holder.pop(what) == who
        else:
            assert holder[what] == who
            assert place[whom[0]] == place[who]
            holder[what] = whom[0]
            gifts.append((who, what, whom[0]))
        for thing in {what} | {each for each, by in holder.items() if by == who}:
            if verb != "move" or holder.get(thing) == who:
                history[thing].append(place[who])
    if found := re.match(r"Where is the (\w+)\?", question):
        return history[found[1]][-1]
    if found := re.match(r"Where is (\w+)\?", question):
        return place[found[1]]
    if found := re.match(r"Where was the (\w+) before it was in the (\w+)\?", question):
        places = history[found[1]]
        return next(each for each in places[places.index(found[2]) :: -1] if each != found[2])
    if found := re.match(r"Who gave the (\w+) to (\w+)\?", question):
        (giver,) = [who for who, what, whom in gifts if (what, whom) == found.groups()]
        return giver
    if found := re.match(r"Is (\w+) in the (\w+), yes or no\?", question):
        return "yes" if place[found[1]] == found[2] else "no"
    found = re.match(r"How many objects does (\w+) carry: none, one, two or three\?", question)
    return ["none", "one", "two", "three"][list(holder.values()).count(found[1])]


def solve_graph(text):
    """The nodes that a prompt about a graph asks for, by trying every way."""
    told, question = text.split("\n\nQuestion: ")
    ends = defaultdict(set)
    for one, other in re.findall(r"^(\w+) -> (\w+)$", told, re.MULTILINE):
        ends[one].add(other)
    if found := re.search(r"starts at (\w+) and follows the edges for (\d+) steps?\?", question):
        assert {len(each) for each in ends.values()} == {1}
        (node,) = reached(ends, found[1], int(found[2]))
        return {node}
    if found := re.match(r"Which nodes have an edge to (\w+)\?", question):
        return {one for one, others in ends.items() if found[1] in others}
    found = re.match(r"Which nodes are exactly (\d) steps? from (\w+), by", question)
    nearer = set().union(*(reached(ends, found[2], steps) for steps in range(int(found[1]))))
    return reached(ends, found[2], int(found[1])) - nearer


def reached(ends, start, steps):
    nodes = {start}
    for _ in range(steps):
        nodes = {end for node in nodes for end in ends[node]}
    return nodes


def prompts(tokenizer, **settings):
    given = {"samples": 2, "lengths": [2600], **settings}
    return ReasoningPrompts(ReasoningSection(**given), tokenizer, seed=3).all()


def test_every_answer_is_what_a_solver_reads_out_of_the_prompt(byte_tokenizer):
    made = prompts(byte_tokenizer, samples=12)
    assert len(made) == 12 * 14
    hops = Counter()
    for prompt in made:
        # A sentence of the filler has up to 190 letters.
        assert 0 <= prompt.length - prompt.budget - len(prompt.input_ids) < 300
        kind, _, steps = prompt.key.partition("/")
        text = byte_tokenizer.decode(prompt.input_ids)
        asked, _, prefix = text.rpartition(" Answer: ")
        assert prefix[-1] != " "
        found = solve_graph(asked) if kind in ("walk", "parents", "bfs") else {solve_story(asked)}
        assert found == {*prompt.references}
        assert found <= {*prompt.options}
        hops[kind, steps] += len(found)
        assert 0 < prompt.chance <= 0.5
        other = next(each for each in prompt.options if each not in prompt.references)
        assert is_right(kind, f" {' and '.join(reversed(prompt.references))}.", prompt.options, prompt.references)
        assert not is_right(kind, f" {other}.", prompt.options, prompt.references)
    assert hops["bfs", "3"] > 12 * 6


def test_prompts_depend_on_their_own_seed_alone_and_answers_are_spread(byte_tokenizer):
    many = prompts(byte_tokenizer, kinds=["yes_no", "counting", "walk"], samples=6, walk_steps=[2])
    few = prompts(byte_tokenizer, kinds=["counting"], samples=3)
    kept = [prompt for prompt in many if prompt.key.startswith("counting")]
    assert [each.input_ids.tolist() for each in kept[:3]] == [each.input_ids.tolist() for each in few]
    assert len({each.input_ids.tobytes() for each in many}) == len(many)
    yes = [each.references[0] for each in prompts(byte_tokenizer, kinds=["yes_no"], samples=60)]
    assert 18 <= yes.count("yes") <= 42


def test_filler_is_the_users_where_it_is_given(byte_tokenizer, tmp_path):
    essay = tmp_path / "book.txt"
    essay.write_text("It rained all day. Hugo went to the cellar. Nobody came! " * 30)
    (prompt,) = prompts(byte_tokenizer, kinds=["two_facts"], samples=1, haystack=str(essay))
    text = byte_tokenizer.decode(prompt.input_ids)
    assert text.count("It rained all day.") > 30
    assert "baker" not in text
    assert "Nobody came! It rained all day." in text
    essay.write_text("Hugo went to the cellar. " * 30)
    with pytest.raises(DataError, match=r"reasoning\.haystack: all of its sentences name Alma, .* give another text"):
        prompts(byte_tokenizer, kinds=["two_facts"], haystack=str(essay))


@pytest.mark.parametrize(
    ("kind", "text", "options", "references", "right"),
    [
        ("one_fact", " attic.", ["attic", "cellar"], ["attic"], True),
        ("one_fact", "The lantern is in the Attic, not the cellar", ["attic", "cellar"], ["attic"], True),
        ("one_fact", "cellar or attic", ["attic", "cellar"], ["attic"], False),
        ("one_fact", "atticus", ["attic", "cellar"], ["attic"], False),
        ("yes_no", "not no", ["yes", "no"], ["no"], True),
        ("yes_no", "nothing", ["yes", "no"], ["no"], False),
        ("counting", " 2 objects", ["none", "one", "two", "three"], ["two"], True),
        ("counting", "zero", ["none", "one", "two", "three"], ["none"], True),
        ("counting", "", ["none", "one", "two", "three"], ["none"], False),
        ("parents", " lud, and NOB. Then bar", ["lud", "nob", "bar"], ["nob", "lud"], True),
        ("parents", " lud\nnob", ["lud", "nob", "bar"], ["nob", "lud"], False),
        ("bfs", "lud nob bar", ["lud", "nob", "bar"], ["nob", "lud"], False),
    ],
)
def test_an_answer_is_the_first_possible_one_or_the_whole_set(kind, text, options, references, right):
    assert is_right(kind, text, options, references) is right


def test_what_cannot_be_is_refused_with_its_field(byte_tokenizer, tmp_path):
    def refused(**settings):
        file = tmp_path / "recipe.yaml"
        tasks = [{"task": "reasoning", "name": "think", **settings}]
        file.write_text(f"base: quickstart\neval: {{tasks: {json.dumps(tasks)}}}\n")
        with pytest.raises(RecipeError) as error:
            load_recipe(file)
        return str(error.value)

    assert "eval.tasks.think.walk_steps: has no effect here: none of" in refused(kinds=["bfs"], walk_steps=[2])
    assert "eval.tasks.think.haystack: has no effect here" in refused(kinds=["walk"], haystack="x")
    assert "eval.tasks.think.lengths: has 4096 2 times" in refused(lengths=[4096, 4096])
    assert "eval.tasks.think.bfs_depths" in refused(bfs_depths=[5])
    assert "eval.tasks.think.facts" in refused(facts=3)
    assert not [*ReasoningSection(**ReasoningSection(kinds=["walk"]).model_dump()).faults()]
    for kind, setting in {"three_facts": "kinds", "bfs": "bfs_depths", "walk": "walk_steps"}.items():
        section = ReasoningSection(lengths=[300], kinds=[kind])
        left = rf"a length of 300 has no room for {kind}.* out of eval\.tasks\.reasoning\.{setting}"
        with pytest.raises(DataError, match=left):
            section.try_inputs(byte_tokenizer)


def test_tables_tell_kinds_chance_the_worst_and_the_length_of_answers(tmp_path, capsys):
    def row(kind, hops, *right, chance):
        tallies = [Tally(asked=20, right=each, written=100, cut=5) for each in right]
        return Row(kind=kind, hops=hops, tallies=tallies, chance=[chance] * len(right))

    rows = [row("yes_no", 1, 20, 15, chance=0.5), row("walk", 4, 10, 0, chance=0.001)]
    measured = ReasoningResult(lengths=[4096, 8192], rows=rows, facts=20, prompt="plain", haystack="generated")
    metrics = measured.metrics()
    assert metrics[""] == measured.score() == (75 + 37.5) / 2
    assert (metrics["/4096"], metrics["/8192/worst"], metrics["/8192/walk_4"]) == (75, 0, 0)
    assert (metrics["/written"], metrics["/cut"], metrics["/chance"]) == (5, 0.25, pytest.approx(25.05))
    results = {"before": EvalResult(tasks={"reasoning": measured})}
    print_results(results)
    assert "0.0 walk 4 at 8K" in capsys.readouterr().out
    report = write_report(results, tmp_path, title="Evaluation").read_text()
    assert "| yes_no | 1 | 100.0 [84, 100] | 75.0 [53, 89] | 50.0 | 5, 25% cut |" in report
    assert EvalResult.model_validate_json(results["before"].model_dump_json()) == results["before"]
    from matplotlib.figure import Figure

    drawing = ReasoningResult.drawing("reasoning", {"before": measured}, None)
    drawing.draw(Figure(figsize=(drawing.width, drawing.height)))


def test_an_evaluation_runs_from_a_recipe_to_its_numbers(tmp_path, capsys, tiny_folder):
    file, output = tmp_path / "recipe.yaml", tmp_path / "result.json"
    tasks = [{"task": "reasoning", "lengths": [700], "samples": 2, "kinds": ["yes_no", "walk"], "walk_steps": [3]}]
    file.write_text(f"base: quickstart\neval: {{tasks: {json.dumps(tasks)}}}\n")
    assert main(["eval", str(tiny_folder), str(file), "--output", str(output)]) == 0
    assert "Reasoning by length (mean of 2 kinds, prompts of each: 2)" in capsys.readouterr().out
    (measured,) = json.loads(output.read_text())["rows"].values()
    rows = measured["tasks"]["reasoning"]["rows"]
    assert [(row["kind"], row["hops"]) for row in rows] == [("yes_no", 1), ("walk", 3)]
    assert all(0 < row["tallies"][0]["written"] <= 2 * budget(row["kind"], row["hops"]) for row in rows)
