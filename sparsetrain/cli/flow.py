"""Help texts whose paragraphs fill the terminal, whatever its width."""

from __future__ import annotations

import inspect

import typer


def flowing(text: str | None) -> str | None:
    r"""A docstring with every paragraph on one line, which rich wraps; typer would keep the line ends of the source.

    A paragraph that begins with ``\b``, such as examples, keeps its lines.
    """
    if not text:
        return text
    paragraphs = inspect.cleandoc(text).split("\n\n")
    flown = [each if each.startswith("\b") else " ".join(each.split()) for each in paragraphs]
    # The mark is an empty line on the screen. Below the first paragraph typer removes indentation, which it prevents.
    return "\n\n".join([*flown[:2], *(each.removeprefix("\b\n") for each in flown[2:])])


def flow(app: typer.Typer) -> None:
    """The same for every command of an app."""
    for command in app.registered_commands:
        if command.callback is not None:
            command.help = flowing(command.help or command.callback.__doc__)
