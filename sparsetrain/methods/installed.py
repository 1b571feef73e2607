"""Attention methods of other installed packages."""

from sparsetrain.errors import ModelError
from sparsetrain.installed import Installed
from sparsetrain.methods.base import MethodConfig

INSTALLED: Installed[MethodConfig] = Installed(
    "sparsetrain.methods",
    MethodConfig,
    key="method",
    setting="attention.method",
    noun="a method",
    error=ModelError,
)
