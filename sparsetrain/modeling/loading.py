"""Load a saved model, or adapters with their base model, with the recorded attention method."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sparsetrain.errors import ModelError
from sparsetrain.modeling.adapter_folder import load_adapters
from sparsetrain.modeling.configs import saved_source
from sparsetrain.modeling.decode_section import restore_decode
from sparsetrain.modeling.layers import sparsify
from sparsetrain.modeling.places import ADAPTER_FILE, HUB_ARGUMENTS, resolve
from sparsetrain.modeling.records import RECORD_FILE, check_same_method, recorded_attention, recorded_decode
from sparsetrain.modeling.side_files import check_side_files, read_object
from sparsetrain.modeling.storage import restore_new_modules
from sparsetrain.modeling.weights import load_weights


def load(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model that was saved with its attention method, and install the method again.

    Args:
        path: A local folder, a Hub id, or ``sparsetrain:tiny``. For a folder of LoRA adapters the base model is loaded
            too.
        kwargs: Passed to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map``, ``revision``, ...); for a
            folder of adapters, to :func:`~sparsetrain.modeling.adapter_folder.load_adapters`.

    Raises:
        ModelError: The folder cannot be read, records no method, lacks the weights of modules that the method adds, or
            was written by a newer sparsetrain.
    """
    if "attn_implementation" in kwargs:
        raise ModelError("attn_implementation: sparsetrain.load restores the recorded method; leave it out")
    path = resolve(str(path), "path")
    if (Path(path) / ADAPTER_FILE).is_file():
        return _load_with_base(path, kwargs)
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS & kwargs.keys()}
    code = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    check_side_files(path)
    source = saved_source(path, "path", **hub, **code)
    attention = recorded_attention(source.values.get("sparsetrain"), path)
    decode = recorded_decode(source.values["sparsetrain"], path)
    check_same_method(path, attention, decode)
    config = source.config()
    source.skeleton(config, **code)
    model = load_weights(path, "path", **{"config": config, **kwargs})
    sparsify(model, attention)
    if not restore_new_modules(model, attention, path, hub):
        raise ModelError(
            f"{path} records {attention.method} but holds no weights of {' or '.join(attention.new_modules)}; if they "
            "were never trained, load it with transformers and call sparsetrain.sparsify(model, ...)"
        )
    return restore_decode(model, decode)


def _load_with_base(path: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    accepted = [name for name in inspect.signature(load_adapters).parameters if name != "path"]
    for name in kwargs.keys() - set(accepted):
        raise ModelError(f"{path} holds adapters, which do not accept {name}; they accept {', '.join(accepted)}")
    model = load_adapters(path, **kwargs)
    decode = recorded_decode(read_object(Path(path) / RECORD_FILE), path)
    return restore_decode(model, decode)
