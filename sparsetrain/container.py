"""What containers lack: a home that can be written to, a name for the user. Settled before libraries look for them."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

Environment = MutableMapping[str, str]

CACHES = {
    "XDG_CACHE_HOME": "",
    "HF_HOME": "huggingface",
    "TRITON_HOME": "",
    "MPLCONFIGDIR": "matplotlib",
    "WANDB_CONFIG_DIR": "wandb-config",
    "WANDB_DATA_DIR": "wandb-data",
}
"""Variables that move caches and settings out of the home, and where below the new folder."""


def settle_in(environment: Environment) -> list[str]:
    """Give caches a folder where the home cannot be written to, and the user a name where the system knows none.

    What the environment already sets stays. Logins are still read from the home.

    Returns:
        What was done, for the user to read.
    """
    notes = []
    home = environment.get("HOME", "")
    if not (home and os.access(home, os.W_OK | os.X_OK)):
        folder = Path(tempfile.gettempdir()) / f"sparsetrain-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            # Somebody else's, who could lay files there for us to load.
            folder = Path(tempfile.mkdtemp(prefix="sparsetrain-"))
        token = Path(home or "/", ".cache/huggingface/token")
        if "HF_HOME" not in environment and os.access(token, os.R_OK):
            environment.setdefault("HF_TOKEN_PATH", str(token))
        for variable, below in CACHES.items():
            environment.setdefault(variable, str(folder / below))
        cache = environment["HF_HOME"]
        notes.append(
            f"HOME={home} cannot be written to, so caches go to {folder} (models and tokenised data to {cache}; set "
            "HF_HOME to keep them elsewhere)"
        )
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        # Torch's compiler and others name their folders by the user.
        environment.setdefault("USER", f"user-{os.getuid()}")
    return notes
