"""What a checkpoint from outside may not do: choose the code that runs here, or be read as a pickle.

Transformers and peft read more from a folder than weights and numbers. A config may name attention and expert kernels
that are fetched from the Hub and run, an index may lead to a pickle, an adapter's config may name a module to import.
None of it is followed. ``trust_remote_code`` allows the model's own Python files, and nothing else of this.
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
"""What older versions of peft wrote beside it."""

IMPLEMENTATIONS = frozenset(
    f"{prefix}{part}_implementation{suffix}"
    for part in ("attn", "experts")
    for prefix in ("", "_")
    for suffix in ("", "_internal", "_autoset")
) | {"use_kernels", "kernel_config", "fusion_config", "distributed_config"}
"""Fields of a config that say which code computes a part of the model. The name of a repository fetches it."""

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
"""Fields of an adapter's config that only say which tensors there are, or nothing that is read here."""


def disarmed(values: Mapping[str, Any], *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The values of a ``config.json``, nested ones too, without those that choose code.

    What is left of attention is the method's, and the rest of a model is computed by transformers as it is installed.
    """
    dropped = IMPLEMENTATIONS if trust_remote_code else IMPLEMENTATIONS | {"auto_map"}

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: kept(inner) for name, inner in value.items() if name not in dropped}
        return [kept(inner) for inner in value] if isinstance(value, list) else value

    harmless: dict[str, Any] = kept(values)
    return harmless


def check_weight_files(path: str, weights: object = None, variant: str | None = None, **hub: Any) -> list[str]:
    """Refuse a checkpoint whose weights lie in anything but safetensors within it, and adapters in a model's place.

    Args:
        path: a folder or a Hub id.
        weights: the config's ``transformers_weights``, if it has one.
        variant: as transformers takes it.
        hub: where to find the files (``revision``, ``subfolder``, ...).

    Returns:
        The names of its files.

    Raises:
        ModelError: names the file and what it leads to.
    """
    if locate(path, ADAPTER_FILE, hub) is not None:
        raise ModelError(
            f"{path} holds adapters ({ADAPTER_FILE}), and a model was asked for; fold them into their base first "
            "(sparsetrain export --merge), or take that file away if it does not belong there"
        )
    files = weight_files(path, hub, weights, variant)
    if files is None and (pickle := _pickle(path)):
        raise ModelError(
            f"{path} holds its weights as a pickle ({pickle}), which is never read; convert to safetensors"
        )
    return files or []


def check_adapter_files(path: Path) -> None:
    """Refuse a folder whose adapters are a pickle.

    Raises:
        ModelError: names the file.
    """
    if (path / PICKLED_ADAPTERS).is_file() and not (path / "adapter_model.safetensors").is_file():
        raise ModelError(f"{path} holds adapters as a pickle ({PICKLED_ADAPTERS}), which is never read; convert them")


def check_adapter_config(config: LoraConfig, path: Path) -> None:
    """Refuse adapters that need more than their tensors put beside the base: other modules imported, or another base.

    Raises:
        ModelError: names the field.
    """
    usual = type(config)().to_dict()
    for name, value in config.to_dict().items():
        if name == "init_lora_weights":
            # Any other way to begin changes the base, which the tensors of the adapters do not undo.
            strange = not isinstance(value, bool)
        else:
            strange = name not in APPLIED and value != usual.get(name)
        if strange:
            raise ModelError(
                f"{path / ADAPTER_FILE}: {name}={value!r:.100} is not supported in adapters; set its default"
            )


def _pickle(path: str) -> str | None:
    """The first pickled weights of a local folder."""
    found = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in Path(path).glob(ending))
    return next((name for name in found if name != "training_args.bin"), None)
