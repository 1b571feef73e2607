"""The process that evaluates chat templates: requests on stdin, answers on stdout, one line of JSON each.

A template is an untrusted program. jinja2's sandbox isolates it from the machine, but limits neither time nor memory,
and no check inside Python can: ``10 ** 10 ** 9`` is a single call that never returns. The kernel can stop a process.
This file is run by path and imports nothing from the package, so that the process stays small.

It ends when its stdin is closed, so that it never outlives its parent.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """``{text, spans}`` of a conversation, ``{marked}`` of a template alone, or ``{fault, error}``."""
    from jinja2 import TemplateSyntaxError
    from jinja2.exceptions import TemplateAssertionError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = request["template"]
    try:
        if "messages" not in request:
            return {"marked": _marked(template)}
        rendered: Any = render_jinja_template(
            conversations=[request["messages"]],
            tools=request["tools"],
            chat_template=template,
            return_assistant_tokens_mask=request["marked"],
            add_generation_prompt=request["prompt"],
            **{**request["special"], **request["settings"]},
        )
    except (TemplateSyntaxError, TemplateAssertionError) as error:
        return {"fault": "template", "error": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"fault": "memory"}
    except RecursionError:
        return {"fault": "row", "error": "it calls itself without end"}
    except Exception as error:
        kind = "" if type(error).__name__ in ("TemplateError", "UndefinedError") else f"{type(error).__name__}: "
        return {"fault": "row", "error": f"{kind}{error}"[:500].strip() or type(error).__name__}
    text, spans = rendered[0][0], (rendered[1] or [[]])[0]
    if len(text) > request["longest"]:
        return {"fault": "length", "error": len(text)}
    return {"text": text, "spans": spans}


_NOTHING: dict[str, Any] = {
    **{"template": "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}", "messages": [], "tools": None},
    **{"marked": True, "prompt": False, "special": {}, "settings": {}, "longest": 9},
}
"""A request that has everything read which others need."""


def _marked(template: str) -> bool:
    """Whether the template marks what the assistant says, having compiled it."""
    from jinja2 import TemplateAssertionError, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(template).environment.parse(template)

    def marks(node: nodes.Node) -> list[nodes.CallBlock]:
        return [
            block
            for block in node.find_all(nodes.CallBlock)
            if isinstance(block.call.node, nodes.ExtensionAttribute) and block.call.node.name == "_generation_support"
        ]

    # What these hold is written somewhere else than where it is evaluated, so that its place in the text is not known.
    held = tree.find_all((nodes.Macro, nodes.AssignBlock, nodes.FilterBlock, nodes.CallBlock))
    for block in [*held, *(loop for loop in tree.find_all(nodes.For) if loop.recursive)]:
        if inner := marks(block):
            raise TemplateAssertionError(
                "{% generation %} cannot be inside of a macro, a call, a filter, a set or a recursive loop",
                inner[0].lineno,
            )
    return bool(marks(tree))


def _serve(memory: int) -> None:
    # Nothing but a request may be written to whoever asked.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # All that evaluating needs is read now; no file can be opened later.
    import html  # noqa: F401

    import jinja2.constants
    import jinja2.debug  # noqa: F401

    _answer({"template": ""})
    _answer(_NOTHING)
    time.tzset()
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        space = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
    # Where the sandbox had a hole: no file or connection can be opened, nothing written, and no process started.
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        with suppress(OSError, ValueError):
            resource.setrlimit(limit, (0, 0))
    answers.write(b"{}\n")
    answers.flush()
    for line in sys.stdin.buffer:
        seconds, _, body = line.partition(b" ")
        # Processor time, which other processes do not take; the default action of the signal ends this one.
        signal.setitimer(signal.ITIMER_PROF, float(seconds))
        try:
            answer = json.dumps(_answer(json.loads(body))).encode()
        except (MemoryError, RecursionError, ValueError) as error:
            fault = "memory" if isinstance(error, MemoryError) else "row"
            answer = json.dumps({"fault": fault, "error": str(error)[:500]}).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(answer + b"\n")
        answers.flush()


if __name__ == "__main__":
    # Whoever asked decides when it ends; a signal to all processes of a job is none of its business.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(BrokenPipeError):
        _serve(int(sys.argv[1]))
