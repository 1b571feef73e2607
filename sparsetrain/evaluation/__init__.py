"""What a model can do with a long context: perplexity by length, passkey retrieval, recall; reports and pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsetrain.evaluation.result import EvalResult, PasskeyResult, RecallResult, wilson_interval

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsetrain.evaluation.passkey import Passkey
    from sparsetrain.evaluation.perplexity import Perplexity
    from sparsetrain.evaluation.recall import Recall
    from sparsetrain.recipe.schema import EvalSection

__all__ = ["EvalResult", "PasskeyResult", "RecallResult", "check_inputs", "evaluate", "wilson_interval"]


def check_inputs(section: EvalSection, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
    """Make the inputs of :func:`evaluate` and drop them: a mistake ends a run before its training, not after.

    Raises:
        RecipeError, DataError: as :func:`evaluate` would.
    """
    _tasks(section, tokenizer, seed)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    section: EvalSection,
    *,
    device: torch.device | str,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Measure what the ``eval`` section asks for.

    With several ranks the work is dealt out and the counts are summed over the default process group. Every rank runs
    equally many forward passes, as ZeRO-3 needs, and returns the same result.

    Args:
        model: gone through :func:`sparsetrain.sparsify` (method ``full`` for dense attention). It is put into
            evaluation mode, and afterwards back into the mode it was in.
        seed: of the passkey prompts and the recall documents; held-out text is read in order.
        on_progress: called with the forward passes done and to do, on this rank.

    Raises:
        RecipeError: a length does not fit the tokens to score.
        DataError: the held-out source is too short, or a length cannot hold the synthetic task.
    """
    import torch

    from sparsetrain.evaluation.scoring import Place

    tasks = perplexity, passkey, recall = _tasks(section, tokenizer, seed)
    total = sum(task.num_forwards(world) for task in tasks if task is not None)
    done = 0

    def on_forward() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    place = Place(torch.device(device), rank, world, on_forward)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # no_grad and not inference_mode: ZeRO-3 swaps parameter data in forward, which inference tensors forbid.
        with torch.no_grad():
            return EvalResult(
                perplexity=perplexity.measure(model, place) if perplexity else {},
                perplexity_tokens=perplexity.tokens if perplexity else 0,
                passkey=passkey.measure(model, place) if passkey else None,
                recall=recall.measure(model, place) if recall else None,
            )
    finally:
        for module, training in modes:
            module.training = training


def _tasks(
    section: EvalSection, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Perplexity | None, Passkey | None, Recall | None]:
    """What the section asks for, with all inputs made."""
    from sparsetrain.evaluation.passkey import Passkey
    from sparsetrain.evaluation.perplexity import Perplexity
    from sparsetrain.evaluation.recall import Recall

    return (
        Perplexity(section.perplexity, tokenizer) if section.perplexity else None,
        Passkey(section.passkey, tokenizer, seed) if section.passkey else None,
        Recall(section.recall, tokenizer, seed) if section.recall else None,
    )
