"""Write the weights of a model folder in another dtype, and verify it by loading it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from sparsetrain.modeling import load, save
from sparsetrain.modeling.records import RECORD_FILE
from sparsetrain.modeling.reread import checksums
from sparsetrain.modeling.weight_files import weight_files
from sparsetrain.training.output.merge import check_logits, check_same, some_logits


def convert(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> None:
    """Replace the weights of an ordinary model in ``folder``. What transformers keeps in fp32 for a family stays.

    Raises:
        ModelError: The model cannot be loaded.
        CheckpointError: Its logits differ by more than rounding to ``dtype`` explains, or what was written is not the
            same when it is loaded again.
    """
    record = json.loads((folder / RECORD_FILE).read_bytes())
    code = {"trust_remote_code": trust_remote_code}
    before = some_logits(load(folder, **code))
    model: Any = load(folder, dtype=dtype, **code)
    after = some_logits(model)
    check_logits(
        f"in {str(dtype).removeprefix('torch.')}, the model's logits", after, before, dtype, "leave --dtype out"
    )
    for name in weight_files(str(folder), {}) or ():
        # Its tensors may be read from the file as they are needed; a file that is open stays until then.
        (folder / name).unlink()
    (folder / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
    model.config._name_or_path = record["base"]
    save(model, folder)
    written = checksums(model)
    del model
    check_same(written, checksums(load(folder, dtype=dtype, **code)), "converted model")
