"""Keep untrusted checkpoints from running code: no code chosen by a config, no pickles.

Transformers and peft read more from a folder than weights and numbers. A config may name attention and expert kernels
that are downloaded from the Hub and run, an index may point to a pickle, an adapter's config may name a module to
import. All of these are refused or ignored. ``trust_remote_code`` allows only the model's own Python files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.errors import ModelError
from sparsetrain.modeling.places import ADAPTER_FILE
from sparsetrain.modeling.weight_files import locate, weight_files

if TYPE_CHECKING:
    from peft import LoraConfig

PICKLED_ADAPTERS = "adapter_model.bin"
"""The pickle that older versions of peft wrote."""

IMPLEMENTATIONS = frozenset(
    f"{prefix}{part}_implementation{suffix}"
    for part in ("attn", "experts")
    for prefix in ("", "_")
    for suffix in ("", "_internal", "_autoset")
) | {"use_kernels", "kernel_config", "fusion_config", "distributed_config"}
"""Fields of a config that choose the code for a part of the model. The name of a repository would download code."""

APPLIED = frozenset(
    {
        "r",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "ensure_weight_tying",
        "base_model_name_or_path",
        "task_type",
        "peft_type",
        "peft_version",
        "inference_mode",
        "revision",
        "auto_mapping",
    }
)
"""Fields of an adapter's config that are safe: they only describe tensors, or are not read here."""


def disarmed(values: Mapping[str, Any], *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The values of a ``config.json``, including nested ones, without those that choose code.

    Attention is then computed by the method, and the rest of the model by the installed transformers.
    """
    dropped = IMPLEMENTATIONS if trust_remote_code else IMPLEMENTATIONS | {"auto_map"}

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: kept(inner) for name, inner in value.items() if name not in dropped}
        return [kept(inner) for inner in value] if isinstance(value, list) else value

    harmless: dict[str, Any] = kept(values)
    return harmless


def check_weight_files(path: str, weights: object = None, variant: str | None = None, **hub: Any) -> list[str]:
    """Refuse a checkpoint with weights outside of its own safetensors files, and adapters where a model is expected.

    Args:
        path: A folder or a Hub id.
        weights: The config's ``transformers_weights``, if it has this field.
        variant: The ``variant`` argument of transformers.
        hub: Where to find the files (``revision``, ``subfolder``, ...).

    Returns:
        The names of the weight files.

    Raises:
        ModelError: The checkpoint is refused; names the file and its target.
    """
    if locate(path, ADAPTER_FILE, hub) is not None:
        raise ModelError(
            f"{path} holds adapters ({ADAPTER_FILE}), but a model is expected; merge them into their base first "
            "(sparsetrain export --merge), or remove that file if it does not belong there"
        )
    files = weight_files(path, hub, weights, variant)
    if files is None and (pickle := _pickle(path)):
        raise ModelError(
            f"{path} holds its weights as a pickle ({pickle}), which is never read; convert to safetensors"
        )
    return files or []


def check_adapter_files(path: Path) -> None:
    """Refuse a folder whose adapters are stored as a pickle.

    Raises:
        ModelError: They are; names the file.
    """
    if (path / PICKLED_ADAPTERS).is_file() and not (path / "adapter_model.safetensors").is_file():
        raise ModelError(f"{path} holds adapters as a pickle ({PICKLED_ADAPTERS}), which is never read; convert them")


def check_adapter_config(config: LoraConfig, path: Path) -> None:
    """Refuse adapters that need more than their tensors, such as imported modules or a changed base model.

    Raises:
        ModelError: They do; names the field of the config.
    """
    usual = type(config)().to_dict()
    for name, value in config.to_dict().items():
        if name == "init_lora_weights":
            # Other initialisations change the base weights, and the adapter tensors do not undo that.
            strange = not isinstance(value, bool)
        elif name == "trainable_token_indices":
            # Rows by the name of their layer; a bare list leaves that to peft.
            strange = value is not None and not isinstance(value, dict)
        else:
            strange = name not in APPLIED and value != usual.get(name)
        if strange:
            raise ModelError(
                f"{path / ADAPTER_FILE}: {name}={value!r:.100} is not supported in adapters; set its default"
            )


def _pickle(path: str) -> str | None:
    """The first pickled weight file of a local folder."""
    found = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in Path(path).glob(ending))
    return next((name for name in found if name != "training_args.bin"), None)
