"""Made-up rows, files and chat templates: each is read, or refused in one message."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
from datetime import UTC, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from sparsetrain.data.chat_template import OWN_CHARACTERS
from sparsetrain.data.conversation import REASONING, REFUSED, ROLES
from sparsetrain.data.forms import resolve_form
from sparsetrain.data.known_columns import MASKS, SETTINGS, SYSTEM, TOOLS
from sparsetrain.data.loss_keys import DETAILS, SWITCHES
from sparsetrain.data.render import render
from sparsetrain.data.values import MalformedRow
from sparsetrain.errors import DataError
from sparsetrain.source_section import DataSource

PLAIN = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{{ documents }}{{ enable_thinking }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)

# What a row may hold, in places where something else belongs too.
TEXT = st.text(max_size=12) | st.sampled_from(
    ["", " ", "\n", "\ud800", "\0", "<eos>", "<eos><eos>", "</think>", "[", "[]", "{}", "null", '{"a": NaN}', "é😀"]
)
NUMBERS = st.sampled_from([0, 1, -1, 255, 256, 10**30, 0.5, 1e308, float("nan"), float("inf")])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXT
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5
)


def mapping(most, **keys):
    """Mappings with some of the keys, mostly with values that belong there."""
    values = {key: value | ANYTHING if index % 3 else value for index, (key, value) in enumerate(keys.items())}
    return st.fixed_dictionaries({}, optional=values).filter(lambda found: len(found) <= most)


ARGUMENTS = st.dictionaries(TEXT, ANYTHING, max_size=2)
FUNCTION = mapping(4, name=TEXT, arguments=ARGUMENTS | ARGUMENTS.map(json.dumps), parameters=ARGUMENTS)
CALL = mapping(4, type=st.just("function"), function=FUNCTION, name=TEXT, arguments=ARGUMENTS, id=TEXT)
PART = mapping(4, type=st.sampled_from(["text", "image", "output_text"]), text=TEXT, image=TEXT)
DETAIL = mapping(3, begin_offset=st.integers(-1, 5), end_offset=st.integers(-1, 5), train=st.booleans())
TURN = st.builds(
    lambda role, content, rest: {**role, **content, **rest},
    st.sampled_from(["role", "from"]).flatmap(
        lambda key: st.fixed_dictionaries({key: st.sampled_from(sorted(ROLES)) | ANYTHING})
    ),
    st.sampled_from(["content", "value"]).flatmap(
        lambda key: st.fixed_dictionaries({key: TEXT | TEXT | st.lists(PART | TEXT, max_size=2) | ANYTHING})
    ),
    st.just({})
    | st.dictionaries(st.sampled_from([*REASONING, *REFUSED, *SWITCHES, "name", "tool_call_id"]), ANYTHING, max_size=2)
    | st.dictionaries(st.sampled_from(["tool_calls"]), st.lists(CALL, max_size=2), max_size=1)
    | st.dictionaries(st.sampled_from(["function_call"]), FUNCTION | TEXT, max_size=1)
    | st.dictionaries(st.sampled_from(DETAILS), st.lists(DETAIL, max_size=2), max_size=1),
)
TURNS = st.lists(TURN, max_size=4) | st.lists(TURN, max_size=2).map(json.dumps)
IDS = st.lists(st.integers(0, 256), max_size=6) | ANYTHING
COLUMNS = st.dictionaries(
    st.sampled_from(
        [*SYSTEM, *TOOLS, *SETTINGS, *MASKS, *REFUSED, "input", "history", "labels", "weight", "chosen", "x"]
    ),
    ANYTHING | st.lists(CALL | st.lists(TEXT, max_size=2), max_size=2),
    max_size=2,
)
NEEDED = st.one_of(
    st.fixed_dictionaries({"text": TEXT | ANYTHING}),
    st.fixed_dictionaries({"prompt": TEXT | TURNS | ANYTHING, "completion": TEXT | TURNS | ANYTHING}),
    st.fixed_dictionaries({"messages": TURNS}),
    st.fixed_dictionaries({"conversations": TURNS}),
    st.fixed_dictionaries({"instruction": TEXT | ANYTHING, "output": TEXT | ANYTHING}),
    st.fixed_dictionaries({"input_ids": IDS}, optional={"labels": IDS, "attention_mask": IDS, "loss_mask": IDS}),
)
ROWS = st.builds(lambda needed, rest: {**rest, **needed}, NEEDED, st.just({}) | COLUMNS)
SETTINGS_OF_SOURCES = st.just({}) | st.fixed_dictionaries(
    {},
    optional={"separator": TEXT, "ignore": st.lists(st.sampled_from([*SYSTEM, *TOOLS, "train", "image"]), max_size=2)},
)


@pytest.fixture(params=[None, PLAIN, MARKED], ids=["no-template", "plain", "marked"])
def reader(request, byte_tokenizer):
    tokenizer = byte_tokenizer(bos_token="<bos>")
    tokenizer.chat_template = request.param
    return tokenizer


def told(error):
    assert str(error).strip()


def check_tokens(tokens, tokenizer):
    """What a document must be: tokens that there are, and stretches of them in order."""
    input_ids = tokens.input_ids
    assert str(input_ids.dtype) == "int32"
    assert ((input_ids >= 0) & (input_ids < len(tokenizer))).all()
    edges = [edge for span in tokens.targets for edge in span]
    assert edges == sorted(edges)
    assert all(0 <= start < stop <= len(input_ids) for start, stop in tokens.targets)


def test_a_row_of_any_form_is_read_or_refused(fuzz, reader):
    def check(made):
        row, settings = made
        try:
            source = DataSource(path="x.jsonl", **settings)
        except ValueError:
            return
        try:
            tokens = render(row, resolve_form(source, list(row), reader), reader)
        except (MalformedRow, DataError) as error:
            told(error)
            return
        check_tokens(tokens, reader)

    fuzz(st.tuples(ROWS, SETTINGS_OF_SOURCES), check)


def read_or_refused(stream, path, tokenizer, streaming, on_malformed="skip"):
    try:
        rows = stream(
            {"path": str(path), "streaming": streaming},
            tokenizer=tokenizer,
            on_malformed=on_malformed,
            long_documents="split",
            packing=False,
        )
        for _ in range(4):
            assert 2 <= len(next(rows).input_ids) <= 64
    except DataError as error:
        told(error)


@pytest.fixture
def chats(byte_tokenizer):
    tokenizer = byte_tokenizer(bos_token="<bos>")
    tokenizer.chat_template = PLAIN
    return tokenizer


def edited(content, edits):
    """Bytes with some replaced, left out or put between."""
    for start, length, new in edits:
        place = start % (len(content) + 1)
        content = content[:place] + new + content[place + length :]
    return content


EDITS = st.lists(
    st.tuples(
        st.integers(0, 5000),
        st.integers(0, 30),
        st.binary(max_size=6) | st.sampled_from([b"\n", b"\r", b"\xef\xbb\xbf", b"\0damaged\0", b"[", b"\xe2\x80\xa8"]),
    ),
    max_size=3,
)
PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def test_a_file_of_lines_or_text_is_read_or_refused(fuzz, stream, chats, tmp_path):
    lines = st.lists(ROWS.map(json.dumps) | TEXT | st.just("[" * 5000), min_size=1, max_size=4)
    content = lines.map("\n".join) | st.lists(ROWS, max_size=3).map(json.dumps)
    files = st.tuples(
        content.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60),
        st.sampled_from([".jsonl", ".json", ".ndjson", ".txt", ".md"]),
        st.sampled_from(sorted(PACKED)),
        EDITS,
        st.booleans(),
        st.sampled_from(["stop", "skip"]),
    )
    copies = iter(range(10**9))

    def check(made):
        text, suffix, packed, edits, streaming, on_malformed = made
        path = tmp_path / f"{next(copies)}{suffix}{packed}"
        path.write_bytes(edited(PACKED[packed](text), edits))
        read_or_refused(stream, path, chats, streaming, on_malformed)
        path.unlink()

    fuzz(files, check)


TYPES = {
    pa.string(): TEXT,
    pa.large_string(): TEXT,
    pa.binary(): st.binary(max_size=5),
    pa.int8(): st.integers(-128, 127),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float16(): st.just(0.5),
    pa.float64(): st.floats(),
    pa.bool_(): st.booleans(),
    pa.timestamp("s"): st.just(datetime(2020, 1, 1)),
    pa.timestamp("ns", tz="UTC"): st.just(datetime(2020, 1, 1, tzinfo=UTC)),
    pa.decimal128(20, 2): st.just(Decimal("1.50")),
    pa.null(): st.none(),
    pa.list_(pa.string()): st.lists(TEXT, max_size=2),
    pa.list_(pa.int32()): st.lists(st.integers(-1, 300), max_size=3),
    pa.list_(pa.float32()): st.lists(st.just(1.0), max_size=2),
    pa.map_(pa.string(), pa.string()): st.lists(st.tuples(st.text(max_size=3), TEXT), max_size=2),
    pa.dictionary(pa.int8(), pa.string()): st.sampled_from(["a", "b"]),
    pa.struct([]): st.just({}),
    pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int64())])): st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}), max_size=2
    ),
    pa.list_(pa.struct([("from", pa.string()), ("value", pa.list_(pa.struct([("text", pa.string())])))])): st.lists(
        st.fixed_dictionaries({"from": st.just("gpt"), "value": st.lists(st.just({"text": "a"}), max_size=1)}),
        max_size=1,
    ),
}
NAMES = ["text", "messages", "conversations", "prompt", "completion", "instruction", "output", "input_ids", "labels"]
NAMES += ["tools", "system", "attention_mask", "images", "x", ""]


@st.composite
def tables(draw):
    """Tables of one to three columns, of any types."""
    rows, arrays = draw(st.integers(0, 3)), {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)):
        kind = draw(st.sampled_from(list(TYPES)))
        values = [draw(TYPES[kind] | st.none()) for _ in range(rows)]
        try:
            arrays[name] = pa.array(values, type=kind)
        except UnicodeEncodeError:
            arrays[name] = pa.array(["a"] * rows)
    return pa.table(arrays)


def test_a_table_is_read_or_refused(fuzz, stream, chats, tmp_path):
    copies = iter(range(10**9))

    def check(made):
        table, kind, edits, streaming, on_malformed = made
        path = tmp_path / f"{next(copies)}.{kind}"
        try:
            if kind == "parquet":
                pq.write_table(table, path)
            else:
                with pa.ipc.new_file(path, table.schema) as file:
                    file.write_table(table)
        except pa.ArrowException:
            return
        path.write_bytes(edited(path.read_bytes(), edits))
        read_or_refused(stream, path, chats, streaming, on_malformed)
        path.unlink()

    files = st.tuples(
        tables(),
        st.sampled_from(["parquet", "arrow"]),
        st.just([]) | EDITS,
        st.booleans(),
        st.sampled_from(["stop", "skip"]),
    )
    fuzz(files, check)


PIECES = [
    *(
        f"{{{{ {name} }}}}"
        for name in ("messages", "m", "m.content", "m['role']", "loop", "bos_token", "self", "owl.x")
    ),
    *("{% for m in messages %}", "{% for m in messages recursive %}", "{% endfor %}", "{% break %}", "{% continue %}"),
    *("{% if m.role == 'assistant' %}", "{% if add_generation_prompt %}", "{% else %}", "{% endif %}"),
    *("{% generation %}", "{% endgeneration %}", "{% set x = m %}", "{% set x %}", "{% endset %}"),
    *("{% macro f(a) %}", "{% endmacro %}", "{{ f(1) }}", "{% call f(1) %}", "{% endcall %}", "{% block a %}"),
    *("{% endblock %}", "{% filter upper %}", "{% endfilter %}", "{% raw %}", "{% endraw %}", "{#", "#}", "{%-", "-%}"),
    *("{{ messages | tojson }}", "{{ m.content | trim }}", "{{ messages | map(attribute='content') | list }}"),
    *("{{ 1 / 0 }}", "{{ 'x' * 99999 }}", "{{ '\\ud800' }}", "{{ raise_exception(m) }}", "{{ strftime_now('%Y') }}"),
    *("<eos>", "\n", " ", "assistant", "{{", "}}", "é", "\0", "{{ namespace(a=1).a }}", "{{ messages[::-1] }}"),
    *("{{ messages[0:1] }}", "{{ messages.pop() }}", "{{ '%s' % m }}", "{{ dict(a=1) }}", "{{ range(3) | list }}"),
]
BODY = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
TEMPLATES = (
    BODY
    | BODY.map(lambda body: f"{{% for m in messages %}}{body}{{% endfor %}}")
    | BODY.map(lambda body: f"{{% for m in messages %}}{{% generation %}}{body}{{% endgeneration %}}{{% endfor %}}")
    | st.tuples(st.sampled_from([PLAIN, MARKED]), BODY, st.integers(0, 300)).map(
        lambda made: made[0][: made[2]] + made[1] + made[0][made[2] :]
    )
)
CHATS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=6)}),
    min_size=1,
    max_size=3,
)


def test_what_any_chat_template_writes_is_read_or_refused(fuzz, chats):
    def check(made):
        template, messages = made
        tokenizer = copy.copy(chats)
        tokenizer.chat_template = template
        row = {"messages": messages}
        try:
            tokens = render(row, resolve_form(DataSource(path="x.jsonl"), list(row), tokenizer), tokenizer)
        except (MalformedRow, DataError) as error:
            told(error)
            return
        check_tokens(tokens, tokenizer)
        assert len(tokens.input_ids) <= 4 * 2 * OWN_CHARACTERS

    fuzz(st.tuples(TEMPLATES, CHATS), check)
