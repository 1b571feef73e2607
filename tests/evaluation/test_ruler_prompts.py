"""RULER's prompts: written out, the same for one seed, never longer than asked for, or refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from copy import deepcopy
from itertools import pairwise
from typing import get_args

import datasets
import pytest
from evaluation.ruler_material import HOTPOT, SQUAD, write_material
from transformers import AutoTokenizer

from sparsetrain.errors import DataError
from sparsetrain.evaluation.generative.draws import Draws
from sparsetrain.evaluation.generative.essay import generated_essay
from sparsetrain.evaluation.generative.words import Pairs, Words
from sparsetrain.evaluation.ruler.documents import hotpot, squad
from sparsetrain.evaluation.ruler.niah import NeedleMaker
from sparsetrain.evaluation.ruler.prompts import Prompts
from sparsetrain.evaluation.ruler.question_rows import hotpot_rows, squad_rows
from sparsetrain.evaluation.ruler.settings import USERS, QuestionSource
from sparsetrain.evaluation.ruler.specs import ANSWERS, BUDGETS, Needles, RulerTask
from sparsetrain.evaluation.tasks.ruler import RulerSection
from sparsetrain.modeling.places import resolve
from sparsetrain.modeling.tokenizers import load_tokenizer

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
NUMBER = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n"
)
ALL = get_args(RulerTask)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return write_material(tmp_path_factory.mktemp("ruler"))


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer(resolve("sparsetrain:tiny", "path"), "path")


@pytest.fixture(scope="module")
def section(material):
    def make(task, length, **settings):
        given = {name: path for name, path in material.items() if task in USERS[name]}
        return RulerSection(**{"lengths": [length], "tasks": [task], "samples": 1, **given, **settings})

    return make


# The seed is NVIDIA's, so that whoever doubts a prompt can draw it: Random(42) and RandomState(42).
WRITTEN = {
    "niah_single_1": (
        730,
        f"{NUMBER}{GRASS}One of the special magic numbers for lud-let is: 6708456.\n{GRASS}"
        "What is the special magic number for lud-let mentioned in the provided text? The special magic number for "
        "lud-let mentioned in the provided text is",
        ["6708456"],
    ),
    "niah_multikey_1": (
        800,
        f"{NUMBER}It rained. One of the special magic numbers for mid-nut is: 5191056.  One of the special magic "
        "numbers for fad-bet is: 5673212. The dog slept! Was it late? Nobody knew. It rained. The dog slept! Was it "
        "late? Nobody knew. It rained. The dog slept! Was it late? One of the special magic numbers for ced-cot is: "
        "8434500.  One of the special magic numbers for ded-gut is: 8077999. Nobody knew. It\n"
        "What is the special magic number for ded-gut mentioned in the provided text? The special magic number for "
        "ded-gut mentioned in the provided text is",
        ["8077999"],
    ),
    "niah_multikey_3": (
        800,
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "uuid afterwards.\n"
        "One of the special magic uuids for a65e688e-abf3-4d39-bec2-1bbe66245bfa is: "
        "847fd9b4-e64d-4bcb-b027-53a15f987c71.\n"
        "One of the special magic uuids for 3985c3cf-3f76-4e1d-9efa-21977394988f is: "
        "969b6662-0562-4059-968c-c69b1064005c.\n"
        "One of the special magic uuids for 38602ab6-96a4-42f2-bae8-cc938dcdcd03 is: "
        "a18ff6b6-b535-406e-922c-9a5601d74256.\n"
        "What is the special magic uuid for a65e688e-abf3-4d39-bec2-1bbe66245bfa mentioned in the provided text? The "
        "special magic uuid for a65e688e-abf3-4d39-bec2-1bbe66245bfa mentioned in the provided text is",
        ["847fd9b4-e64d-4bcb-b027-53a15f987c71"],
    ),
    "niah_multiquery": (
        1000,
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n"
        "It rained. The dog slept! One of the special magic numbers for ced-bat is: 4576135. Was it late? Nobody knew. "
        "One of the special magic numbers for ped-cet is: 2677407. It rained. The dog slept! Was it late? Nobody knew. "
        "One of the special magic numbers for ned-git is: 5449324. It rained. The dog slept! Was it late? Nobody knew. "
        "One of the special magic numbers for bad-mot is: 8688755. It rained. The dog slept! Was it late? Nobody knew. "
        "It rained. The dog slept! Was it late? Nobody knew. It rained. The dog slept!\n"
        "What are all the special magic numbers for ced-bat, ped-cet, bad-mot, and ned-git mentioned in the provided "
        "text? The special magic numbers for ced-bat, ped-cet, bad-mot, and ned-git mentioned in the provided text are",
        ["4576135", "2677407", "8688755", "5449324"],
    ),
    "vt": (
        2600,
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"VAR ABW = 97498\n{GRASS}VAR XOV = VAR ABW \n{GRASS}VAR PDD = VAR XOV \n{GRASS}VAR IXU = VAR PDD \n{GRASS}"
        f"VAR WXF = VAR IXU \n{GRASS}"
        "Question: Find all variables that are assigned the value 97498 in the text above. Answer: According to the "
        "chain(s) of variable assignment in the text above, 5 variables are assigned the value 97498, they are:  ABW "
        "XOV PDD IXU WXF\n\n"
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{6 * GRASS}VAR ROYCW = 47194\n{GRASS}VAR GXTEH = VAR ROYCW \n{GRASS}VAR FIRWN = VAR GXTEH \n{3 * GRASS}"
        f"VAR GXBQV = VAR FIRWN \n{GRASS}VAR BIDZE = VAR GXBQV \n{2 * GRASS}"
        "Question: Find all variables that are assigned the value 47194 in the text above. Answer: According to the "
        "chain(s) of variable assignment in the text above, 5 variables are assigned the value 47194, they are: ",
        ["ROYCW", "GXTEH", "FIRWN", "GXBQV", "BIDZE"],
    ),
    "qa_1": (
        500,
        f"{ASK}The following are given documents.\n\nDocument 1:\nAnn has a cat.\n\nDocument 2:\nAnn is tall.\n\n"
        "Document 3:\nBo has a dog.\n\nDocument 4:\nAnn is tall.\n\nDocument 5:\nAnn has a cat.\n\nDocument 6:\n"
        f"Bo has a dog.\n\n{ASK}Question: Who has a cat? Answer:",
        ["Ann", "It is Ann"],
    ),
    "qa_2": (
        500,
        f"{ASK}The following are given documents.\n\nDocument 1:\nBonn\nBonn is new.\n\nDocument 2:\nOslo\nOslo is "
        "old. It is big.\n\nDocument 3:\nSong\nA song.\n\nDocument 4:\nOslo\nOslo is old. It is big.\n\nDocument 5:\n"
        f"Bonn\nBonn is new.\n\n{ASK}Question: Which is older? Answer:",
        ["Oslo"],
    ),
}


@pytest.mark.parametrize("task", WRITTEN)
def test_prompts_are_as_written_out(byte_tokenizer, section, task):
    length, text, references = WRITTEN[task]
    (prompt,) = Prompts(section(task, length, mirror=True), byte_tokenizer, seed=5).all()
    assert byte_tokenizer.decode(prompt.input_ids) == text
    assert prompt.references == references


def test_common_words_are_ten_that_are_listed_more_often(byte_tokenizer, section):
    (prompt,) = Prompts(section("cwe", 2000), byte_tokenizer, seed=0).all()
    example, asked = byte_tokenizer.decode(prompt.input_ids).split("\nBelow is", 1)
    for text, often in ((example, 3), (asked, 6)):
        numbered = re.findall(
            r"(\d+)\. (\w+)", text.split("\nQuestion: What are the 10 most common words in the above")[0]
        )
        assert [int(number) for number, _ in numbered] == [*range(1, len(numbered) + 1)]
        counts = Counter(word for _, word in numbered)
        assert Counter(counts.values())[often] == 10
        assert set(counts.values()) == {often, 1}
    assert {word for word, count in counts.items() if count == 6} == set(prompt.references)
    solved = re.findall(
        r"\d+\. (\w+)", example.split(" Answer: The top 10 words that appear most often in the list are: ")[1]
    )
    assert len(solved) == 10
    assert asked.endswith(" Answer: The top 10 words that appear most often in the list are:")


@pytest.mark.parametrize("length", [950, 3000])
def test_frequent_words_are_the_ranks_behind_the_noise(byte_tokenizer, section, length):
    (prompt,) = Prompts(section("fwe", length), byte_tokenizer, seed=0).all()
    text = byte_tokenizer.decode(prompt.input_ids)
    coded = text.split("coded words. ")[1].split("\nQuestion: Do not provide any explanation.")[0]
    (noise, _), *ranked = Counter(coded.split()).most_common(5)
    assert noise == "..."
    assert [word for word, _ in ranked[:3]] == prompt.references
    assert ranked[2][1] > ranked[3][1], "the third answer must not be one of two"


@pytest.mark.parametrize(
    ("name", "mirror", "lengths"),
    [
        ("gpt2", True, [1500]),
        ("mistral-v3-32k", False, [4096]),
        ("tiny", False, [1300, 1500]),
        ("bytes", True, [2500]),
    ],
)
def test_no_prompt_with_its_answer_is_longer_than_asked_for(
    request, tiny, byte_tokenizer, section, name, mirror, lengths
):
    own = {"tiny": tiny, "bytes": byte_tokenizer}
    folder = None if name in own else request.getfixturevalue("test_data") / "tokenizers" / name
    tokenizer = own[name] if folder is None else AutoTokenizer.from_pretrained(folder)
    for task in ALL:
        asked = section(task, lengths[0], lengths=lengths, mirror=mirror, samples=2, prompt="plain")
        prompts = Prompts(asked, tokenizer, seed=1).all()
        assert [prompt.length for prompt in prompts] == [length for length in lengths for _ in range(2)]
        for prompt in prompts:
            assert len(prompt.input_ids) + BUDGETS[task] <= prompt.length
            text = tokenizer.decode(prompt.input_ids)
            if task != "qa_2":  # one of its answers is yes
                assert any(reference in text for reference in prompt.references)
            assert task in ("qa_1", "qa_2") or len(prompt.references) == ANSWERS[task]
        if not mirror:
            assert len(prompts[-1].input_ids) + BUDGETS[task] > 0.9 * lengths[-1], task


def test_bos_comes_first_and_is_counted(test_data, section):
    tokenizer = AutoTokenizer.from_pretrained(test_data / "tokenizers/mistral-v3-32k")
    (prompt,) = Prompts(section("niah_single_2", 1000, prompt="plain"), tokenizer, seed=0).all()
    assert prompt.input_ids[0] == tokenizer.bos_token_id
    assert (prompt.input_ids == tokenizer.bos_token_id).sum() == 1


def test_a_chat_model_gets_the_prefix_behind_its_template(byte_tokenizer, section):
    tokenizer = type(byte_tokenizer)(tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
    (prompt,) = Prompts(section("niah_single_1", 800), tokenizer, seed=0).all()
    text = tokenizer.decode(prompt.input_ids)
    assert text.startswith("<user>A special magic number is hidden")
    assert re.search(r"in the provided text\?</><assistant> The special magic number for \S+ mentioned", text)
    assert len(prompt.input_ids) + 128 <= 800
    (plain,) = Prompts(section("niah_single_1", 800, prompt="plain"), tokenizer, seed=0).all()
    assert "<user>" not in tokenizer.decode(plain.input_ids)
    with pytest.raises(DataError, match=r"ruler\.prompt: the tokenizer has no chat template; prompt: plain"):
        Prompts(section("niah_single_1", 800, prompt="chat"), byte_tokenizer, seed=0)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(
        DataError, match=r"eval\.tasks\.ruler\.prompt: the chat template does not write .* prompt: plain"
    ):
        Prompts(section("niah_single_1", 800), tokenizer, seed=0)


def texts(section, tokenizer, seed=0):
    return [tokenizer.decode(prompt.input_ids) for prompt in Prompts(section, tokenizer, seed).all()]


@pytest.mark.parametrize("task", ["niah_multikey_2", "vt", "fwe"])
def test_a_sample_depends_on_the_seed_and_not_on_how_many_there_are(byte_tokenizer, section, task):
    many = texts(section(task, 2600, samples=4), byte_tokenizer)
    assert texts(section(task, 2600, samples=2), byte_tokenizer) == many[:2]
    assert len(set(many)) == 4
    assert not set(texts(section(task, 2600, samples=4), byte_tokenizer, seed=1)) & set(many)
    mirrored = [texts(section(task, 2600, samples=3, mirror=True), byte_tokenizer, seed) for seed in (0, 1)]
    assert mirrored[0] == mirrored[1] != many[:3]


def test_by_default_the_gold_document_is_not_in_one_place(byte_tokenizer, tmp_path, section):
    texts_of = [f"Fact {number} is here." for number in range(40)]
    pairs = [{"context": text, "qas": [{"question": f"{text}?", "answers": [{"text": text}]}]} for text in texts_of]
    file = tmp_path / "many.json"
    file.write_text(json.dumps({"data": [{"paragraphs": pairs}]}))
    places = {}
    for mirror in (False, True):
        asked = section("qa_1", 1000, samples=12, squad=str(file), mirror=mirror)
        prompts = Prompts(asked, byte_tokenizer, seed=0).all()
        found = [byte_tokenizer.decode(each.input_ids).split("\n").index(each.references[0]) for each in prompts]
        places[mirror] = len(set(found))
        assert len({each.references[0] for each in prompts}) == 12
    assert places[True] < 4 < places[False]


def many_questions(folder):
    """A file with long paragraphs, of which each answers two questions."""
    paragraphs = []
    for number in range(30):
        text = " ".join(f"Item {line} of list {number} is a {line * 37 + number}." for line in range(8 + number % 5))
        asked = [
            {"question": f"What is item {line} of list {number}?", "answers": [{"text": f"a {line * 37 + number}"}]}
            for line in (1, 2)
        ]
        paragraphs.append({"context": text, "qas": asked})
    file = folder / "long.json"
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs[:4]}, {"paragraphs": paragraphs[4:]}]}))
    return str(file)


@pytest.mark.parametrize("questions", [1, 4])
def test_the_last_document_is_cut_at_a_sentence_so_that_the_prompt_is_full(
    byte_tokenizer, tmp_path, section, questions
):
    file = many_questions(tmp_path)
    asked = section("qa_1", 2000, lengths=[2000, 3300], samples=6, squad=file, questions=questions)
    for prompt in Prompts(asked, byte_tokenizer, seed=0).all():
        assert 0 <= prompt.length - 32 - len(prompt.input_ids) < 40 + 10 * (questions > 1)
        *whole, last = re.findall(r"Document \d+:\n(.*)", byte_tokenizer.decode(prompt.input_ids))
        assert all(len(re.findall(r"Item \d+ of", text)) >= 8 for text in whole)
        assert last.endswith(".")
        about = re.search(r"(of list \d+)\?", byte_tokenizer.decode(prompt.input_ids))[1]
        (gold,) = [text for text in (*whole, last) if f"{about} is" in text]
        assert len(re.findall(r"Item \d+ of", gold)) >= 8
    mirrored = Prompts(section("qa_1", 3300, squad=file, mirror=True), byte_tokenizer, seed=0).all()
    *_, last = re.findall(r"Document \d+:\n(.*)", byte_tokenizer.decode(mirrored[0].input_ids))
    assert len(re.findall(r"Item \d+ of", last)) >= 8


@pytest.mark.parametrize(
    ("task", "count"), [("niah_multikey_1", 4), ("niah_multikey_2", 5), ("niah_multikey_3", 5), ("qa_1", 5), ("vt", 1)]
)
def test_several_questions_are_about_one_text_and_the_first_one_stays(byte_tokenizer, tmp_path, section, task, count):
    files = {"squad": many_questions(tmp_path)} if task == "qa_1" else {}
    several, alone = (
        Prompts(section(task, 2600, samples=2, questions=most, **files), byte_tokenizer, seed=0).all()
        for most in (5, 1)
    )
    assert len(several) == 2 * count
    assert [prompt.context for prompt in alone] == [None] * 2
    for index in range(2):
        group = several[count * index : count * (index + 1)]
        texts = [byte_tokenizer.decode(prompt.input_ids) for prompt in group]
        if task != "qa_1":
            assert texts[0] == byte_tokenizer.decode(alone[index].input_ids)
        assert len({*texts}) == count
        assert all(prompt.references[0] in text for prompt, text in zip(group, texts, strict=True))
        assert all(len(prompt.input_ids) + prompt.budget <= prompt.length for prompt in group)
        cut = "\nWhat is" if "niah" in task else "\nQuestion: "
        assert len({text.rpartition(cut)[0] for text in texts}) == 1
        assert {prompt.context for prompt in group} == ({index} if count > 1 else {None})


def test_keys_are_distinct_where_words_are_few():
    seen = [Draws(seed, seed, mirror=False) for seed in range(3)]
    maker = NeedleMaker(Needles("needle", "word", "number", keys=4), 4096, Pairs(["red"], [*"abcdefgh"]), ())
    for draws in seen:
        lines = maker.trial(30, draws).text.split("\n")[1:-1]
        keys = Counter(re.findall(r"for (\S+) is", "\n".join(lines)))
        hidden = [key for key, count in keys.items() if count == 1]
        assert len(hidden) == 4


def test_pairs_are_those_of_the_sorted_list():
    adjectives = ["far", "far-off", "big", "bigger", "big", "far-off-ish", "a"]
    nouns = ["off-road", "road", "ant", "zoo", "ant", "ish-x"]
    whole = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    assert list(Pairs(adjectives, nouns)) == whole


def test_what_is_generated_is_long_distinct_and_always_the_same():
    words = Words.made()
    assert len(words.pairs) == 6_000_000
    more = words.at_least(60_000)
    assert len(set(more)) == len(more) == 60_000
    assert words.at_least(9000) == more[:9000] == Words.made().at_least(9000)
    essay = generated_essay()
    assert len(essay) >= 2**17
    sentences = " ".join(essay[:100_000]).split(". ")
    assert len(set(sentences)) > 0.999 * len(sentences)


def test_lengths_without_room_are_refused_with_the_task_and_what_it_takes(byte_tokenizer, section):
    for task in ALL:
        asked = section(task, 250)
        with pytest.raises(DataError) as refused:
            Prompts(asked, byte_tokenizer, seed=0).all()
        said = str(refused.value)
        assert said.startswith("eval.tasks.ruler.lengths: a length of 250 has no room for " + task)
        needed = int(re.search(r"takes ([\d,]+) tokens with", said)[1].replace(",", ""))
        assert needed > 250
        if task not in ("cwe", "fwe"):
            Prompts(section(task, needed + 40), byte_tokenizer, seed=0).all()
        with pytest.raises(DataError, match=f"or leave {task} out of eval.tasks.ruler.tasks$"):
            asked.try_inputs(byte_tokenizer)


def test_a_length_is_refused_with_every_task_that_does_not_fit(byte_tokenizer):
    asked = RulerSection(tasks=["niah_single_1", "vt", "cwe"], lengths=[700], samples=1)
    with pytest.raises(DataError) as refused:
        asked.try_inputs(byte_tokenizer)
    said = str(refused.value)
    assert "has no room for vt, whose shortest prompt takes " in said
    assert re.search(r"tokenizer, cwe [\d,]+; ask for longer .* leave vt, cwe out of eval\.tasks\.ruler\.tasks$", said)


@pytest.mark.parametrize(
    ("task", "field", "content", "said"),
    [
        ("qa_1", "squad", "[]", r"squad: .* is not in the format of SQuAD"),
        ("qa_1", "squad", "{", r"is not in the format of SQuAD"),
        ("qa_1", "squad", '{"data": []}', "has no question with an answer"),
        ("qa_2", "hotpot", '{"data": []}', r"hotpot: .* is not in the format of HotpotQA"),
        (
            "qa_2",
            "hotpot",
            '[{"question": "q", "answer": "a", "context": []}]',
            r"is not in the format of HotpotQA: .* \(ValueError: a question without documents\)",
        ),
        ("niah_single_2", "haystack", " \n", "has no words"),
        ("niah_single_2", "haystack", "Hello. " + "word " * 100, "has 101 words and 1 sentence; needles stand between"),
    ],
)
def test_files_that_do_not_serve_are_refused_by_their_field(
    byte_tokenizer, section, tmp_path, task, field, content, said
):
    file = tmp_path / "file"
    file.write_text(content)
    with pytest.raises(DataError, match=said):
        Prompts(section(task, 2000, **{field: str(file)}), byte_tokenizer, seed=0).all()
    with pytest.raises(DataError, match=rf"eval\.tasks\.ruler\.{field}: .*cannot be read: No such file"):
        section(task, 2000, **{field: str(tmp_path / "none")}).try_inputs(byte_tokenizer)


def test_rows_of_a_data_set_are_the_questions_of_a_file(tmp_path):
    content = deepcopy(SQUAD)
    content["data"][0]["paragraphs"].pop()  # a text without questions has no row
    rows = [
        {"title": str(number), "context": part["context"], "question": asked["question"]}
        | {"answers": {"text": [answer["text"] for answer in asked["answers"]], "answer_start": []}}
        for number, article in enumerate(content["data"])
        for part in article["paragraphs"]
        for asked in part["qas"]
    ]
    (tmp_path / "squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert squad_rows(QuestionSource(path=str(tmp_path / "squad.jsonl")), "squad") == squad(content)
    rows = [
        {**row, "context": dict(zip(("title", "sentences"), map(list, zip(*row["context"], strict=True)), strict=True))}
        for row in HOTPOT
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hotpot.parquet")
    assert hotpot_rows(QuestionSource(path=str(tmp_path / "hotpot.parquet")), "hotpot") == hotpot(HOTPOT)


def test_a_data_set_asks_as_a_file_does_and_what_does_not_serve_is_refused(byte_tokenizer, section, tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"question": "Who has a cat?", "context": "Ann has a cat.", "answers": {"text": ["Ann"]}}
    file.write_text(json.dumps(row) + "\n")
    asked = section("qa_1", 800, samples=1, squad={"path": str(file)})
    asked.try_inputs(byte_tokenizer)
    assert "Who has a cat?" in texts(asked, byte_tokenizer)[0]
    for given, said in (
        ({"path": str(file), "split": "validation"}, "squad: data source .*: split belongs to Hub datasets"),
        ({"path": "none/such"}, r"squad: data source 'none/such': .*cannot be opened.*without a network, download it"),
    ):
        with pytest.raises(DataError, match=said):
            section("qa_1", 800, squad=given).try_inputs(byte_tokenizer)
    with pytest.raises(DataError, match=r"hotpot: .*rows.jsonl is not in the format of HotpotQA: question, answer, c"):
        section("qa_2", 800, hotpot={"path": str(file)}).try_inputs(byte_tokenizer)
    file.write_text("[1]\n")
    with pytest.raises(DataError, match=r"squad: data source .*rows\.jsonl"):
        section("qa_1", 800, squad={"path": str(file)}).try_inputs(byte_tokenizer)


def test_too_few_questions_and_too_few_words_are_refused(byte_tokenizer, section, tmp_path):
    with pytest.raises(
        DataError, match=r"ruler\.samples: 3 are more than the 2 questions of eval\.tasks\.ruler\.squad"
    ):
        Prompts(section("qa_1", 2000, samples=3), byte_tokenizer, seed=0).all()
    for name in ("nounlist", "adjectivelist", "verblist"):
        (tmp_path / f"{name}.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=rf"ruler\.words: {tmp_path}/none/nounlist\.txt: cannot be read"):
        Prompts(section("cwe", 2000, words=f"{tmp_path}/none"), byte_tokenizer, seed=0).all()
    with pytest.raises(DataError, match=r"ruler\.words: .* gives 4 keys .*, fewer than 1,000; give longer lists"):
        Prompts(section("cwe", 2000, words=str(tmp_path)), byte_tokenizer, seed=0).all()


def test_chains_are_in_order_and_lines_apart(byte_tokenizer, section):
    (prompt,) = Prompts(section("vt", 3000), byte_tokenizer, seed=3).all()
    text = byte_tokenizer.decode(prompt.input_ids)
    places = [text.rindex(f"VAR {name} = ") for name in prompt.references]
    assert places == sorted(places)
    assert all(f"VAR {name} = VAR {before} " in text for before, name in pairwise(prompt.references))
