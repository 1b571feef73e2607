"""Evaluate a tokenizer's chat template in a separate process with limits on time, memory and output length.

Templates are untrusted, as they come with models. Each process that renders rows starts one helper
(:mod:`sparsetrain.data.template_process`) that evaluates them in transformers' sandbox. The kernel ends it when a
conversation takes more than :data:`SECONDS` of processor time; its memory is limited to :data:`MEMORY`.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsetrain.data.values import MalformedRow, text_value
from sparsetrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 2.0
"""Processor time in seconds for a conversation; above 10 MB one more second per 10 MB."""
MEMORY = 2 * 2**30
"""Memory limit of the helper in bytes."""
OWN_CHARACTERS, GROWTH = 2**17, 16
"""Output limits: a text longer than the first, and longer than this multiple of its input, is a template fault."""


_NEEDED = re.compile("PATH|HOME|PYTHON.*|LD_.*|DYLD_.*|LANG|LC_.*|TZ|TZDIR|TMPDIR|VIRTUAL_ENV|CONDA_PREFIX")
"""Environment variables that Python needs for its libraries and dates. The helper gets no others, as they may hold
secrets, in case a template escapes its sandbox."""


class ChatText(NamedTuple):
    """The rendered text of a conversation."""

    text: str
    spans: list[tuple[int, int]]
    """Characters within ``{% generation %}``, half-open, ascending; none are empty."""


def marks_generation(tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None = None) -> bool:
    """Whether the tokenizer's template (with ``tools``, that for tools) marks the assistant's text with
    ``{% generation %}``.

    Raises:
        DataError: The template cannot be compiled.
    """
    return _marked(_template_of(tokenizer, tools))


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    prompt: bool = False,
) -> ChatText:
    """Render the text of a conversation.

    Args:
        messages: The turns.
        tools: JSON schemas of the available tools.
        settings: Additional variables of the template; they override special tokens of the same name.
        prompt: Add the generation prompt: end where the assistant's next turn begins.

    Raises:
        MalformedRow: The template refuses this conversation, or fails on it.
        DataError: The template cannot be compiled, or exceeds the limits on time, memory or length.
    """
    template = _template_of(tokenizer, tools)
    marked = _marked(template)
    content = {"messages": messages, "tools": tools, "settings": dict(settings or {})}
    row = json.dumps(content, default=lambda value: f"<{type(value).__name__}>")
    special = {
        name: [str(each) for each in token] if isinstance(token, list) else str(token)
        for name, token in tokenizer.special_tokens_map.items()
    }
    longest = OWN_CHARACTERS + GROWTH * len(row)
    rest = {"template": template, "marked": marked, "prompt": prompt, "special": special, "longest": longest}
    seconds = max(SECONDS, len(row) / 1e7)
    answer = _HELPER.ask(f"{row[:-1]}, {json.dumps(rest)[1:]}", seconds)
    if answer.get("fault") == "row":
        raise MalformedRow(f"the chat template refuses it: {answer['error']}")
    if answer.get("fault") == "length":
        raise DataError(
            f"the chat template writes {answer['error']:,} characters for a conversation of {len(row):,}; look for a "
            f"loop or a repetition in it. {_ELSEWHERE}"
        )
    _raise_fault(answer)
    text_value(answer["text"], "what the chat template writes")
    return ChatText(answer["text"], [(start, stop) for start, stop in answer["spans"] if start < stop])


_ELSEWHERE = (
    "The template is what model.chat_template names; where it names none, chat_template.jinja in the tokenizer's "
    "folder, or chat_template in tokenizer_config.json"
)


def _template_of(tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None) -> str:
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise DataError(f"the tokenizer's chat template: {error}") from error
    if not isinstance(template, str):
        raise DataError(f"the tokenizer's chat template is of type {type(template).__name__}, not text. {_ELSEWHERE}")
    return template


@lru_cache(maxsize=8)
def _marked(template: str) -> bool:
    answer = _HELPER.ask(json.dumps({"template": template}), SECONDS)
    if answer.get("fault") == "row":
        raise DataError(f"the chat template cannot be compiled: {answer['error'].rstrip('.')}. {_ELSEWHERE}")
    _raise_fault(answer)
    return bool(answer["marked"])


def _raise_fault(answer: dict[str, Any]) -> None:
    match answer.get("fault"):
        case "template":
            raise DataError(f"the chat template cannot be compiled: {answer['error'].rstrip('.')}. {_ELSEWHERE}")
        case "memory":
            raise DataError(
                f"the chat template needs more than {MEMORY >> 30} GiB of memory for one conversation; look for a "
                f"repetition in it. {_ELSEWHERE}"
            )
        case "time":
            raise DataError(
                f"the chat template takes more than {answer['error']:g} s for one conversation; look for a loop "
                f"in it. {_ELSEWHERE}"
            )
        case "crash":
            raise DataError(f"evaluating the chat template ended its process ({answer['error']}). {_ELSEWHERE}")


class _Helper:
    """The helper of this process, started when first needed, and restarted after it has ended."""

    def __init__(self) -> None:
        self._renew()
        # A fork shares the pipes of its parent, and may have been made while another thread held the lock.
        os.register_at_fork(after_in_child=self._renew)
        atexit.register(self._close)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: str, seconds: float) -> dict[str, Any]:
        """The answer to a request (one line of JSON); a fault if the helper ended."""
        with self._lock:
            process = self._process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(f"{seconds:.3f} {request}\n".encode())
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = b""
            if line:
                return json.loads(line)
            code = self._close()
        if code == -signal.SIGPROF:
            return {"fault": "time", "error": seconds}
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"fault": "crash", "error": f"{name}, probably out of memory" if code == -9 else name}

    def _start(self) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("template_process.py")
        # -P: the script's folder is not searched for modules.
        command = [sys.executable, "-P", str(script), str(MEMORY)]
        environment = {name: value for name, value in os.environ.items() if _NEEDED.fullmatch(name)}
        # Address space is counted, and every thread takes some.
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise DataError(f"the process that evaluates chat templates cannot be started: {error.strerror}") from error
        assert process.stdout is not None
        if not process.stdout.readline():
            raise DataError(f"the process that evaluates chat templates does not start: run {' '.join(command)}")
        return process

    def _close(self) -> int:
        """End the helper; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.communicate()
        return process.returncode


_HELPER = _Helper()
