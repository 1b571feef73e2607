"""Sparsified models on disk: save, load, and build the model a recipe names."""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from sparsetrain import __version__
from sparsetrain.cache_folder import cache_fault
from sparsetrain.errors import ModelError
from sparsetrain.methods.base import MethodConfig
from sparsetrain.methods.registry import METHODS, parse_attention
from sparsetrain.modeling.layers import RECORD_FORMAT, new_modules, sparsify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsetrain.recipe.schema import ModelSection

RECORD_FILE = "sparsetrain.json"
ADAPTER_FILE = "adapter_config.json"
"""What peft writes into a folder of adapters."""

HUB_ARGUMENTS = frozenset({"revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download"})
"""Arguments of ``from_pretrained`` that say where a checkpoint lies."""

OWN_MODELS = "sparsetrain:"
"""Prefix of the checkpoints that ship with the package."""


def save(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a transformers folder: weights, config with the method, tokenizer if given, and ``sparsetrain.json``.

    Args:
        state_dict: the weights by name, where the model itself holds only shards of them (ZeRO-3).

    Raises:
        ModelError: the model was never sparsified, or has LoRA adapters in it.
    """
    record = getattr(model.config, "sparsetrain", None)
    if record is None:
        raise ModelError("this model has no attention method to save; call sparsetrain.sparsify(model, ...) first")
    if getattr(model, "peft_config", None) is not None:
        raise ModelError(
            "this model has LoRA adapters, which an ordinary folder cannot hold; fold them into the weights first "
            "(sparsetrain.modeling.adapters.merge_adapters, in a PeftModel merge_and_unload), or save them alone "
            "(save_adapters, beside it)"
        )
    path = Path(path)
    model.save_pretrained(path, state_dict=None if state_dict is None else dict(state_dict))
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    about = {**record, "base": model.config._name_or_path, "versions": versions}
    write_record(path, about)


def write_record(path: Path, about: Mapping[str, Any]) -> None:
    """Write ``sparsetrain.json`` as the last file of a folder, and give the weights its mode.

    safetensors makes files that only their owner may read; this one is as the user's umask says.
    """
    record = path / RECORD_FILE
    record.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for weights in path.glob("*.safetensors"):
        with suppress(OSError):  # some file systems know no modes
            weights.chmod(record.stat().st_mode & 0o777)


def load(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model that was saved with its attention method, and put the method back in.

    Args:
        path: a local folder, a Hub id, or ``sparsetrain:tiny``. A folder of LoRA adapters comes with its base.
        kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map``, ``revision``, ...); of a
            folder of adapters, to :func:`~sparsetrain.modeling.adapters.load_adapters`.

    Raises:
        ModelError: the folder cannot be read, records no method, lacks the weights of what the method adds to the
            model, or was written by a newer sparsetrain.
    """
    if "attn_implementation" in kwargs:
        raise ModelError("attn_implementation: sparsetrain.load restores the recorded method; leave it out")
    path = _resolve(str(path), "path")
    if (Path(path) / ADAPTER_FILE).is_file():
        return _load_adapters(path, kwargs)
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read a model from {path}: {_first_line(error)}") from error
    attention = recorded_attention(config.get("sparsetrain"), path)
    try:
        with _expecting_new_modules():
            model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        # TypeError and AttributeError are what transformers makes of an argument it does not know, such as a dtype.
        raise ModelError(f"cannot load the model in {path}: {_first_line(error)}") from error
    sparsify(model, attention)
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS & kwargs.keys()}
    if not _restore_new_modules(model, attention, path, hub):
        raise ModelError(
            f"{path} records {attention.method} but holds no weights of {' or '.join(attention.new_modules)}; if they "
            "were never trained, load it with transformers and call sparsetrain.sparsify(model, ...)"
        )
    return model


def _load_adapters(path: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    from sparsetrain.modeling.adapters import load_adapters

    accepted = [name for name in inspect.signature(load_adapters).parameters if name != "path"]
    for name in kwargs.keys() - set(accepted):
        raise ModelError(f"{path} holds adapters, which load without {name}; they take {', '.join(accepted)}")
    return load_adapters(path, **kwargs)


def load_config(section: ModelSection) -> Any:
    """The transformers config of the model a recipe names, without its weights.

    Raises:
        ModelError: it cannot be read, or has no such field as the recipe sets.
    """
    path = None if section.path is None else _resolve(section.path, "model.path")
    config = _pretrained_config(path, section) if path else _new_config(section.architecture or {})
    _override(config, section.config_overrides)
    return config


def load_model(
    section: ModelSection, attention: Mapping[str, Any] | MethodConfig, *, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer a recipe names, with its attention method put in.

    A method that the checkpoint records gives way to ``attention``. Where both are the same one, the modules it has
    added keep the checkpoint's weights.

    Args:
        section: the recipe's ``model`` section.
        attention: the recipe's ``attention`` section.
        seed: seed of the random weights (``model.architecture``).

    Raises:
        ModelError: the model or tokenizer cannot be loaded, they do not fit each other, or the model cannot take the
            method.
    """
    path = None if section.path is None else _resolve(section.path, "model.path")
    config = load_config(section)
    tokenizer = _load_tokenizer(path, section)
    _check_vocabulary(tokenizer, config)
    dtype = getattr(torch, section.dtype)
    if path:
        model = _load_weights(path, section, config, dtype)
    else:
        _take_special_tokens(config, tokenizer, section.architecture or {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    attention, recorded = parse_attention(attention), getattr(config, "sparsetrain", None)
    sparsify(model, attention)
    if path and recorded and recorded.get("attention", {}).get("method") == attention.method:
        _restore_new_modules(model, attention, path, {"revision": section.revision})
    return model, tokenizer


def check_dropout(model: PreTrainedModel) -> None:
    """Refuse to train with dropout in attention, which no method here computes.

    Raises:
        ModelError: names the setting.
    """
    config = model.config.get_text_config(decoder=True)
    for name in ("attention_dropout", "attn_pdrop"):
        if isinstance(share := getattr(config, name, None), float | int) and share > 0:
            raise ModelError(
                f"{name}={share}: attention dropout is not supported; switch it off with "
                f"model.config_overrides={{{name}: 0.0}}"
            )


def check_positions(model: PreTrainedModel, length: int) -> None:
    """Refuse rows longer than the model's config says it can read: rotary positions would go on, but what is exported
    would not say so, and learned positions would run out.

    Raises:
        ModelError: names both numbers and the setting.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ModelError(
            f"sequence.length={length} is beyond the model's max_position_embeddings={limit}; to train it for longer "
            f"contexts say so: model.config_overrides={{max_position_embeddings: {length}}}"
        )


def _restore_new_modules(model: PreTrainedModel, attention: MethodConfig, path: str, hub: dict[str, Any]) -> bool:
    """Give the modules that the method has added their weights from a checkpoint: transformers drops them in loading.

    Returns:
        False if the checkpoint holds none of them.

    Raises:
        ModelError: it holds only some, or some of another shape.
    """
    added = new_modules(model, attention)
    wanted = {f"{name}.{key}": tensor for name, module in added.items() for key, tensor in module.state_dict().items()}
    places = {place: name for name, tensor in wanted.items() for place in _names_on_disk(model, name, tensor)}
    saved = {places[place]: tensor for place, tensor in _read_tensors(path, places.keys(), hub).items()}
    if not saved:
        return not wanted
    for name, tensor in wanted.items():
        if name not in saved or saved[name].shape != tensor.shape:
            found = f"a tensor of shape {tuple(saved[name].shape)}" if name in saved else "nothing"
            raise ModelError(
                f"{path} holds {found} for {name}, where attention.method={attention.method} needs one of shape "
                f"{tuple(tensor.shape)}; give the attention section that the checkpoint was trained with"
            )
    for name, module in added.items():
        module.load_state_dict({key: saved[f"{name}.{key}"] for key in module.state_dict()})
    return True


def _names_on_disk(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> set[str]:
    """What a tensor may be called in a checkpoint: as in the model, and as transformers renames it when it saves."""
    return {name, *revert_weight_conversion(model, {name: tensor})}


@contextmanager
def _expecting_new_modules() -> Iterator[None]:
    """Keep transformers from reporting what methods add to a model as unexpected: it is read afterwards."""
    names = {name for config in METHODS.values() for name in config.new_modules}
    former = PreTrainedModel._keys_to_ignore_on_load_unexpected
    PreTrainedModel._keys_to_ignore_on_load_unexpected = [rf"\.{name}\." for name in sorted(names)]
    try:
        yield
    finally:
        PreTrainedModel._keys_to_ignore_on_load_unexpected = former


def _read_tensors(path: str, names: Iterable[str], hub: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Those of the tensors that a checkpoint holds, local or on the Hub, in one safetensors file or in several."""

    def locate(file: str) -> str | None:
        return cached_file(path, file, _raise_exceptions_for_missing_entries=False, **hub)

    index, wanted = locate(SAFE_WEIGHTS_INDEX_NAME), set(names)
    if index is None:
        files = {SAFE_WEIGHTS_NAME} if wanted else set()
    else:
        shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = {shards[name] for name in wanted & shards.keys()}
    found: dict[str, torch.Tensor] = {}
    for file in filter(None, map(locate, files)):
        with safe_open(file, framework="pt") as weights:
            found |= {name: weights.get_tensor(name) for name in wanted & set(weights.keys())}
    return found


def recorded_attention(record: dict[str, Any] | None, path: str | Path) -> MethodConfig:
    """The method that a record names: that of a model's config, or ``sparsetrain.json``.

    Raises:
        ModelError: there is no record, it is malformed, or a newer sparsetrain wrote it.
    """
    if record is None:
        raise ModelError(
            f"{path} records no attention method; load it with transformers and call sparsetrain.sparsify(model, ...)"
        )
    if not isinstance(record, dict) or not isinstance(record.get("format", 0), int):
        raise ModelError(f"the record of the attention method in {path} is damaged: it is {record!r:.100}")
    if record.get("format", 0) > RECORD_FORMAT:
        raise ModelError(
            f"{path} was written by sparsetrain {record.get('version')} (format {record['format']}); this version "
            f"({__version__}) reads format {RECORD_FORMAT}: upgrade sparsetrain"
        )
    try:
        return parse_attention(record.get("attention", {}))
    except ModelError as error:
        raise ModelError(f"{path} records a method this version ({__version__}) does not know: {error}") from None


def _resolve(name: str, field: str) -> str:
    """A local folder as a path, a Hub id as it is."""
    if name.startswith(OWN_MODELS):
        folder = Path(str(resources.files("sparsetrain"))) / "assets" / name.removeprefix(OWN_MODELS)
        if not folder.is_dir():
            shipped = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
            raise ModelError(f"{field}={name!r}: no such model ships with sparsetrain; there is {shipped or 'none'}")
        return str(folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(f"{field}={name!r}: there is no such folder")
    return name


def _pretrained_config(path: str, section: ModelSection) -> Any:
    try:
        return AutoConfig.from_pretrained(path, revision=section.revision, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise _unloadable("model.path", section.path, error) from error


def _new_config(architecture: dict[str, Any]) -> Any:
    fields = dict(architecture)
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"model.architecture.model_type={model_type!r} is unknown{_nearest(model_type, CONFIG_MAPPING)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    _check_fields(config_class(), fields, "model.architecture")
    try:
        return config_class(**fields)
    except Exception as error:  # each config class validates in its own way, with its own exceptions
        raise ModelError(f"model.architecture: {_first_line(error)}") from error


def _override(config: Any, overrides: dict[str, Any]) -> None:
    """Set fields of the config, or of its text part in a multimodal model."""
    text_config = config.get_text_config(decoder=True)
    targets = {name: config if hasattr(config, name) else text_config for name in overrides}
    for name, value in overrides.items():
        _check_fields(targets[name], {name: value}, "model.config_overrides")
        try:
            setattr(targets[name], name, value)
        except Exception as error:  # transformers' strict configs raise their own exceptions
            raise ModelError(f"model.config_overrides.{name}={value!r}: {_first_line(error)}") from error


def _check_fields(config: Any, fields: dict[str, Any], section: str) -> None:
    for name in fields:
        if not hasattr(config, name):
            known = [*config.to_dict(), *config.attribute_map]
            raise ModelError(f"{section}.{name}: {type(config).__name__} has no such field{_nearest(name, known)}")


def _load_tokenizer(path: str | None, section: ModelSection) -> PreTrainedTokenizerBase:
    own = section.tokenizer is None
    source = path if own else _resolve(str(section.tokenizer), "model.tokenizer")
    field = "model.path (tokenizer)" if own else "model.tokenizer"
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=section.revision if own else None, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unloadable(field, source, error) from error


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    needed, rows = max(tokenizer.get_vocab().values()) + 1, config.get_text_config(decoder=True).vocab_size
    if needed > rows:
        raise ModelError(
            f"the tokenizer has {needed} token ids but the model's embedding only {rows} rows; use the model's own "
            "tokenizer (model.tokenizer), or for random weights set vocab_size in model.architecture"
        )


def _take_special_tokens(config: Any, tokenizer: PreTrainedTokenizerBase, architecture: dict[str, Any]) -> None:
    """A config class's default special tokens belong to another tokenizer."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name not in architecture:
            setattr(config, name, getattr(tokenizer, name))


def _load_weights(path: str, section: ModelSection, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with _expecting_new_modules():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                revision=section.revision,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=section.trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise _unloadable("model.path", section.path, error) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"model.path={section.path!r} lacks {len(missing)} weights that {type(model).__name__} needs: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return model


def _unloadable(field: str, name: str | None, error: Exception) -> ModelError:
    if (fault := cache_fault(error)) is not None:
        return ModelError(f"{field}={name!r} cannot be loaded: {fault}")
    if Path(str(name)).is_dir():
        needed = "its tokenizer" if "tokenizer" in field else "config.json, safetensors and a tokenizer"
        fix = f"The folder must hold {needed}, complete and readable."
    else:
        fix = (
            f"If it is a Hub id, check its spelling, that this machine reaches the Hub (or download it before: "
            f"hf download {name}), and that you are logged in if it is gated (hf auth login)."
        )
    return ModelError(f"{field}={name!r} cannot be loaded: {_first_line(error)} {fix}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # transformers puts the reason on the line after "Validation error for field 'hidden_size':".
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _nearest(name: str, known: Any) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
