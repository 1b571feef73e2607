"""How often a run evaluates: what it says at its start, and what a plan of it says."""

from __future__ import annotations

from sparsetrain.recipe.schema import Recipe


def evaluations_of(recipe: Recipe, steps: int | None, *, at_start: bool) -> str:
    """``2 before training, 9 during it, 1 after it``; empty where nothing is evaluated.

    Args:
        steps: of the run; None where they follow from its data or its GPUs.
        at_start: whether it evaluates before training, which a run that goes on does not do again.
    """
    section = recipe.eval
    if section.empty:
        return ""
    before = at_start * (1 if recipe.attention.method == "full" else 2)
    moments = {f"{before} before training": before}
    if section.every is not None and steps is None:
        moments[f"1 every {section.every:,} steps"] = 1
    elif section.every is not None and steps is not None:
        during = (steps - 1) // section.every
        moments[f"{during} during it"] = during
    after = section.at_end * (1 + len(section.rows))
    moments[f"{after} after it"] = after
    return ", ".join(moment for moment, count in moments.items() if count)
