"""What ``sparsetrain generate`` says on standard error: what decides the text, how fast it was, what steps read."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from sparsetrain.counted import counted

if TYPE_CHECKING:
    from sparsetrain.inference.prompts import Prompt
    from sparsetrain.inference.writer import Usage


def note_model(model: Any, tokenizer: Any, prompts: list[Prompt], sampling: str, *, chat: bool) -> None:
    """Say on standard error what decides the text."""
    method = model.config.sparsetrain["attention"]["method"]
    print(f"note: attention {method}, {sampling}", file=sys.stderr)
    if tokenizer.chat_template and not chat and any(each.messages is None for each in prompts):
        print("note: this model has a chat template; --chat writes a prompt as a user's message", file=sys.stderr)
    if answered := sum(each.answered for each in prompts):
        print(
            f"note: behind an answer another one is written ({counted(answered, 'chat')}); leave the last turn out to "
            "have the one before it answered",
            file=sys.stderr,
        )


def note_decode(model: Any, prompt: int, new: int) -> None:
    """Say by which section steps read fewer keys, and where it leaves none out.

    Args:
        prompt: tokens of the longest.
        new: tokens that may follow it.
    """
    from sparsetrain.generation.settings import parse_decode

    record = model.config.sparsetrain.get("decode")
    if record is None:
        return
    section = parse_decode(record)
    words = [f"select={section.select}"]
    if section.prune is not None:
        words.append("prune.p by layer" if isinstance(section.prune.p, dict) else f"prune.p={section.prune.p:g}")
    if section.refresh is not None:
        words.append(f"refresh.every={section.refresh.every}")
        if section.refresh.keep is not None:
            words.append(f"refresh.keep={section.refresh.keep}")
        words.append(f"refresh.choose={section.refresh.choose}")
    print(f"note: steps read fewer keys: {', '.join(words)}", file=sys.stderr)
    candidates = section.candidate_tokens(prompt)
    if section.select in ("quest", "channels") and candidates >= prompt + new:
        print(
            f"note: these texts are no longer than decode.candidates={candidates:,}, so select={section.select} "
            "passes on every key",
            file=sys.stderr,
        )


def speed(usage: Usage) -> str:
    """Tokens read and written, with their time, and the size of the cache."""
    rate = f"{usage.decoded / usage.decode_seconds:,.1f} tokens/s" if usage.decoded else "no further tokens"
    return (
        f"{usage.prompt_tokens:,} prompt tokens in {usage.prefill_seconds:.2f} s, {usage.new_tokens:,} new tokens "
        f"({rate} after the first), cache {decimal(usage.cache_bytes)}"
        + (f" on the device and {decimal(usage.host_bytes)} in host memory" if usage.host_bytes else "")
    )


def kept_keys(usage: Usage) -> str | None:
    """The share of keys read by the layers that choose keys; None where no layer does."""
    observations = usage.observations
    kept = [each["kept"] for each in observations if "kept" in each]
    if not kept:
        uncounted = "what the steps read is not counted: compiled steps do not count"
        return uncounted if usage.observations and usage.decoded else None
    text = f"{sum(kept) / len(kept):.1%} of the keys read in a step"
    least, most = f"{min(kept):.1%}", f"{max(kept):.1%}"
    if least != most:
        text += f" ({least} to {most} by layer)"
    masses = [each for each in observations if "mass_mean" in each]
    if masses:
        mean, worst = sum(each["mass_mean"] for each in masses) / len(masses), min(each["mass_min"] for each in masses)
        text += f", which hold {mean:.1%} of the softmax weight ({worst:.1%} at least; sampled)"
    dropped = max(each["dropped"] for each in observations if "dropped" in each)
    return text + (f"; up to {dropped:.1%} of the keys found no room in a list" if dropped else "")
