"""Fit a method's modules to the first rows before step 1 (``attention.init: attention``)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from transformers import PreTrainedModel

from sparsetrain.counted import counted
from sparsetrain.data import RowStream, collate
from sparsetrain.modeling import fit_method, sparse_layers
from sparsetrain.modeling.fit import needs_fit

TOKENS_A_CHANNEL = 4
"""Tokens for a fit per channel of the hidden size."""

MOST_ROWS = 64
"""Maximum number of rows read for a fit."""


def fit_to_first_rows(
    model: PreTrainedModel, rows: RowStream, device: torch.device, say: Callable[[str], None]
) -> None:
    """Fit the modules that need it to the attention of the original model; training then starts with the same rows.

    A resumed run fits them too, before it reads the checkpoint: that holds only trained parameters, and these may be
    frozen.

    Raises:
        ModelError: The rows have too few usable tokens.
    """
    if not needs_fit(model):
        return
    method = next(method for _, layer, method in sparse_layers(model) if method is not None and method.needs_fit(layer))
    wanted = TOKENS_A_CHANNEL * model.config.get_text_config().hidden_size
    state, batches, found = rows.state_dict(), [], 0
    for row in islice(rows, MOST_ROWS):
        telling = method.fit_tokens(row.lengths)
        if telling > 0:
            batches.append(collate([row]).to(device))
            found += telling
        if found >= wanted:
            break
    rows.load_state_dict(state)
    fit_method(
        model,
        (
            {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "cu_seqlens": batch.cu_seqlens}
            for batch in batches
        ),
    )
    say(f"the method's new modules: fitted to the model's attention in {counted(len(batches), 'row')}")
