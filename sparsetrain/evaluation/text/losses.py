"""The loss of each token of a text, and sums of it that can be paired with those of another model."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from sparsetrain.evaluation.text.windows import Scored, Windows

GROUPS = 64
"""Stretches of text whose losses are kept apart."""


class Losses(BaseModel):
    """Losses of some tokens of a text, in nats, summed over up to :data:`GROUPS` stretches of it.

    Two models' losses on the same tokens are compared stretch by stretch: how hard a stretch is cancels out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    tokens: int
    """Tokens that were scored."""
    sums: list[float]
    """Summed loss of each stretch. The tokens are spread evenly, the first stretches having one more."""

    @classmethod
    def of(cls, values: np.ndarray) -> Losses:
        """Losses of tokens in the order of the text, fp64 ``[n]``."""
        import numpy as np

        parts = np.array_split(values, min(GROUPS, len(values))) if len(values) else []
        return cls(tokens=len(values), sums=[math.fsum(part.tolist()) for part in parts])

    def mean(self) -> float:
        """The mean loss; NaN without tokens."""
        return math.fsum(self.sums) / self.tokens if self.tokens else math.nan

    def perplexity(self) -> float:
        """``exp`` of the mean; infinite where that is too large a number."""
        mean = self.mean()
        return math.inf if mean > 700 else math.exp(mean)

    def difference(self, other: Losses) -> tuple[float, float]:
        """This mean minus that of another model on the same tokens, and the standard error of the difference.

        The stretches are taken for independent draws; the error is NaN where there is only one.
        """
        mean, groups = self.mean() - other.mean(), len(self.sums)
        if groups < 2:
            return mean, math.nan
        each, longer = divmod(self.tokens, groups)
        sizes = [each + (index < longer) for index in range(groups)]
        pairs = zip(self.sums, other.sums, sizes, strict=True)
        spread = math.fsum((mine - theirs - mean * size) ** 2 for mine, theirs, size in pairs)
        return mean, math.sqrt(spread * groups / (groups - 1)) / self.tokens

    def comparable(self, other: Losses) -> bool:
        """Whether as many tokens were scored, in as many stretches. Whether they are the same is for others to say."""
        return bool(self.tokens) and self.tokens == other.tokens and len(self.sums) == len(other.sums)


def row_losses(model: PreTrainedModel, windows: Windows, row: Scored, device: torch.device) -> str:
    """The negative log-likelihood in nats of every token of a row that is scored, as text: fp32 in base64.

    The logits of a row never exist as a whole.

    Args:
        model: gone through :func:`sparsetrain.sparsify`.
    """
    import torch
    import torch.nn.functional as F

    from sparsetrain.data import collate
    from sparsetrain.evaluation.scoring import predictions

    parts = predictions(model, collate([windows.row(row.windows)]), device, windows.num_chunks)
    found = torch.cat([F.cross_entropy(logits, labels, reduction="none") for logits, labels, _ in parts])
    return base64.b64encode(found.cpu().numpy().astype("<f4").tobytes()).decode("ascii")


def joined_losses(rows: Sequence[str]) -> np.ndarray:
    """What :func:`row_losses` gave of every row of windows, fp64 ``[n]`` in the order of ``windows.scored``."""
    import numpy as np

    return np.concatenate([np.frombuffer(base64.b64decode(row), "<f4") for row in rows]).astype(np.float64)
