"""A chat template is a program from outside: it fails with one message, comes to an end, and reaches nothing."""

from __future__ import annotations

import copy
import os
import re
import threading
import time
from pathlib import Path

import pytest

from sparsetrain.data import chat_template
from sparsetrain.data.chat import render_chat
from sparsetrain.data.conversation import Conversation
from sparsetrain.data.values import MalformedRow
from sparsetrain.errors import DataError

CONVERSATION = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
MARKED = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% generation %}{% if m.role == 'assistant' %}{{ m.content }}<eos>{% endif %}{% endgeneration %}"
    "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
)
LONG = "{% for i in range(99999) %}{% for j in range(99999) %}OWL{% endfor %}{% endfor %}"


@pytest.fixture
def rendered(tokenizer):
    def render(template, messages=CONVERSATION):
        with_template = copy.copy(tokenizer)
        with_template.chat_template = template
        input_ids, targets = render_chat(Conversation(messages), with_template)
        return with_template.decode(input_ids), [with_template.decode(input_ids[a:b]) for a, b in targets]

    return render


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
        ("{{ messages.owl.eye }}", "has no attribute 'owl'"),
        ("{{ messages[0].owl.eye }}", "has no attribute 'owl'"),
        ("{{ owl() }}", "'owl' is undefined"),
        ("{{ range(10 ** 7) | list }}", "OverflowError: Range too big"),
        ("{{ 'a' + 1 }}", "TypeError: can only concatenate str"),
        ("{{ {}['owl'].eye }}", "has no attribute 'owl'"),
        ("{{ messages | tojson(indent=-1, separators=3) }}", "TypeError"),
        ("{{ '%d' % 'a' }}", "TypeError"),
        ("{{ '{owl}'.format() }}", "KeyError: 'owl'"),
        ("{{ strftime_now(3) }}", "TypeError"),
        ("{{ '\\ud800' }}", "what the chat template writes is not valid Unicode"),
        ("{{ raise_exception('roles must alternate') }}", "the chat template refuses it: roles must alternate"),
        ("{% include 'owl' %}", "no loader for this environment"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
        ("{% for a, b in messages %}{% endfor %}{% for a in 3 %}{% endfor %}", "'int' object is not iterable"),
        ("{{ 1.0 ** 9999.5 * 10.0 ** 999 }}", "OverflowError"),
    ],
)
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_a_template_that_fails_makes_the_row_malformed(template, failing, told, rendered):
    with pytest.raises(MalformedRow, match=told):
        rendered(failing + template)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{{ 1 | owl }}", "line 1: No filter named 'owl'"),
        ("{{ }}", "line 1: Expected an expression"),
        ("{% owl %}", "Encountered unknown tag 'owl'"),
        ("{{ " + "(" * 500 + ")" * 500 + " }}", "cannot be compiled"),
        ("{% generation %}", "cannot be compiled"),
        ("{% macro f() %}{% generation %}a{% endgeneration %}{% endmacro %}", r"line 1: \{% generation %\} cannot be"),
        ("{% set a %}{% generation %}a{% endgeneration %}{% endset %}", r"\{% generation %\} cannot be inside"),
        ("{% break %}", "cannot be compiled"),
        (7, "is of type int, not text"),
        ({"tool_use": PLAIN}, "multiple chat templates with no default"),
    ],
)
def test_a_template_that_cannot_be_compiled_stops_at_once(broken, told, rendered):
    with pytest.raises(DataError, match=told):
        rendered(broken)


@pytest.mark.parametrize(
    ("endless", "told"),
    [
        (LONG.replace("OWL", ""), "takes more than 0.4 s"),
        (LONG.replace("OWL", "{{ messages }}"), "takes more than|more than 2 GiB"),
        ("{{ 10 ** (10 ** 9) }}", "takes more than"),
        ("{{ (messages | length) ** (10 ** 9) }}", "takes more than 0.4 s"),
        ("{{ 'x' * 10 ** 10 }}", "more than 2 GiB of memory"),
        ("{{ 'x' * 10 ** 7 }}", "writes 10,000,... characters for a conversation of 1.."),
        ("{{ 'x' * 300000 }}", "writes 300,0"),
        ("{{ '%9999999d' % 1 }}", "writes 10,000"),
        ("{{ '{:9999999}'.format(1) }}", "writes 10,000"),
        ("{{ 'x' | center(10 ** 7) }}", "writes 10,000"),
        ("{{ lipsum(n=10 ** 9) }}", "takes more than 0.4 s"),
        (
            "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
            "takes more than|more than 2 GiB",
        ),
        ("{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "without end|takes more|ended its"),
    ],
)
def test_a_template_that_does_not_end_or_grows_without_bounds_is_stopped(endless, told, rendered, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.4)
    begun = time.monotonic()
    with pytest.raises((DataError, MalformedRow), match=told):
        rendered(endless + PLAIN)
    assert time.monotonic() - begun < 20


def test_an_endless_template_is_stopped_in_a_thread_and_in_a_fork(rendered, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    failures = []

    def stopped():
        with pytest.raises(DataError, match="takes more than"):
            rendered(LONG.replace("OWL", ""))
        failures.append(False)

    thread = threading.Thread(target=stopped)
    thread.start()
    thread.join()
    assert failures == [False]
    child = os.fork()
    if not child:
        try:
            stopped()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_next_conversation_is_rendered_after_one_that_was_stopped(rendered, monkeypatch):
    with monkeypatch.context() as shorter:
        shorter.setattr(chat_template, "SECONDS", 0.2)
        with pytest.raises(DataError):
            rendered(LONG.replace("OWL", ""))
    assert rendered(PLAIN) == ("<user>one?<eos><assistant>1<eos>", ["<assistant>1<eos>"])


def test_empty_marks_and_marks_around_nothing_are_left_out(rendered):
    assert rendered(MARKED) == ("<user>one?<assistant>1<eos>", ["1<eos>"])
    with pytest.raises(MalformedRow, match="writes nothing for the assistant's turns"):
        rendered("{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}")


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].system('touch owl') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ (namespace(__class__=1)).__class__ }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__}'.format_map({'0': ''}) }}",
    "{{ ('{0.__class__.__init__.__globals__}'|attr('format'))(raise_exception) }}",
    "{{ ['{0.__class__}']|map('format', '')|list }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ [lipsum]|map(attribute='__globals__')|list }}",
    "{{ messages|groupby('__class__') }}",
    "{{ messages|sum(attribute='__class__') }}",
    "{{ messages.sort(key=raise_exception) }}",
    "{% for k in ({}).__class__.__base__.__subclasses__() %}{{ k }}{% endfor %}",
    "{{ joiner.__init__['__globals__'] }}",
    "{{ (range|attr('__self__')) }}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{{ caller.__globals__ }}",
    "{{ config.items() }}{{ request.application.__globals__ }}",
    "{{ messages[0].update(role='owl') }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_reaches_nothing_outside_of_its_conversation(escape, rendered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        text = rendered(PLAIN + escape)[0]
    except (MalformedRow, DataError):
        text = ""
    assert not any(word in text for word in ("class '", "<function", "<module", "uid=", "object at", "posix"))
    assert not list(tmp_path.iterdir())


def test_the_process_of_the_templates_can_neither_open_files_nor_take_all_memory_nor_read_secrets(
    rendered, monkeypatch
):
    for name in ("HF_TOKEN", "DATABASE_URL", "my_password"):
        monkeypatch.setenv(name, "hf_owl")
    chat_template._HELPER._close()
    rendered(PLAIN)
    assert b"hf_owl" not in Path(f"/proc/{chat_template._HELPER._process.pid}/environ").read_bytes()
    limits = Path(f"/proc/{chat_template._HELPER._process.pid}/limits").read_text()
    assert re.search(r"Max file size +0 +0", limits)
    assert re.search(r"Max open files +0 +0", limits)
    assert re.search(r"Max address space +\d+", limits)


def test_a_template_may_use_every_filter_though_no_file_can_be_opened(rendered):
    text, _ = rendered(
        "{{ lipsum(n=1) | length > 9 }} {{ '<b>x</b>' | striptags }} {{ 'www.a.b' | urlize }} {{ 'a' | urlencode }}"
        "{{ {'a': 1} | pprint }} {{ messages[0] | tojson(indent=1) }} {{ strftime_now('%Y %Z') }}" + PLAIN
    )
    assert text.startswith("True x www.a.b a")
