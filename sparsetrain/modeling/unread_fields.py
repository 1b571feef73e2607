"""Find config fields that change attention or logits in some model families, but are ignored by this family.

Transformers keeps such fields without using them, so the model would not be what its config says.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

IDLE: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_pct": (1,),
    "rotary_dim": (),
    "rope_interleave": (),
    "sliding_window": (),
    "attention_chunk_size": (),
    "no_rope_layers": (),
    "no_rope_layer_interval": (),
    "alibi": (),
    "clip_qkv": (),
    "use_qk_norm": (),
    "qk_norm": (),
    "qk_layernorm": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
}
"""Names of such fields, and their neutral values; null, false, 0 and empty values are neutral too."""


def unread_fields(config: Any, fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name and the fault of each field that the config's family does not read.

    Args:
        config: The config of a decoder.
        fields: Its values, by name.
    """
    if not type(config).__module__.startswith("transformers."):
        return  # the fields that custom code reads are not known
    source = _source(Path(inspect.getfile(type(config))).parent)
    rope = getattr(config, "rope_parameters", None)
    within = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    for name, idle in IDLE.items():
        value = fields.get(name, within if name == "partial_rotary_factor" else None)
        if not value or value in idle or re.search(rf"\b{name}\b", source):
            continue
        if name == "sliding_window" and fields.get("use_sliding_window") is False:
            continue
        yield (
            name,
            f"{name}={value!r:.60} is not used by model_type={config.model_type}; remove it "
            "from the config, or correct model_type",
        )


@cache
def _source(folder: Path) -> str:
    """The source code of a family's config and model, which names each field that it reads."""
    files = sorted(file for kind in ("configuration", "modeling") for file in folder.glob(f"{kind}_*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)
