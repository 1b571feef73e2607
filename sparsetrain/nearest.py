"""What a misspelt name was probably meant to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches

LONGEST = 64
"""Characters of a name that are compared; a comparison takes the product of both lengths."""


def nearest(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name that is most similar to ``name``; None if none is.

    Args:
        cutoff: similarity from 0 to 1 that is needed.
    """
    found = get_close_matches(str(name)[:LONGEST], list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def nearest_first(name: object, known: Iterable[str], *, most: int) -> list[str]:
    """The known names in the order of their similarity to ``name``, at most ``most`` of them."""
    return get_close_matches(str(name), list(known), n=most, cutoff=0.0)


def did_you_mean(
    name: object,
    known: Iterable[str],
    form: str = "; {}",
    *,
    otherwise: str = "",
    write: Callable[[str], str] = str,
    cutoff: float = 0.6,
) -> str:
    """``; did you mean ...?``, for the end of a message about an unknown name.

    Args:
        form: what stands around the question.
        otherwise: the text if no known name is similar.
        write: how the known name is written, such as ``repr``.
    """
    near = nearest(name, known, cutoff=cutoff)
    return otherwise if near is None else form.format(f"did you mean {write(near)}?")
