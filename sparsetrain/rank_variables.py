"""The environment variables by which launchers number the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsetrain.errors import TrainingError

RANK_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""Those that hold a number. transformers and DeepSpeed read them too, some while they are imported."""


def check_numbers(environment: Mapping[str, str], names: Sequence[str] = RANK_NUMBERS) -> None:
    """Refuse variables that are set to something else than a number.

    Raises:
        TrainingError: names the first.
    """
    for name in names:
        if not environment.get(name, "0").isdecimal():
            raise TrainingError(f"{name}={environment[name]!r} in the environment is not a number; unset or correct it")
