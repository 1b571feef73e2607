"""Before step 1, modules of a method that are fitted to text (``attention.init: attention``) see the first rows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from transformers import PreTrainedModel

from sparsetrain.data import RowStream, collate
from sparsetrain.modeling import fit_method, sparse_layers
from sparsetrain.modeling.fit import needs_fit

TOKENS_A_CHANNEL = 4
"""Tokens that a fit learns from, for each channel of the model."""

MOST_ROWS = 64
"""Rows that are looked at for them."""


def fit_to_first_rows(
    model: PreTrainedModel, rows: RowStream, device: torch.device, say: Callable[[str], None]
) -> None:
    """Fit the modules that wait for it to the model as it came; the rows are then read again.

    In a resumed run too, before the checkpoint is read: it holds only what is trained, and these may be frozen.

    Raises:
        ModelError: the rows told too little.
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
    say(f"the method's new modules: fitted to the model's attention in {len(batches)} rows")
