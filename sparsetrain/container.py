"""Set environment variables that containers lack (a writable home, a user name) before libraries need them."""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
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


def prepare_environment(environment: Environment) -> list[str]:
    """Set cache folders if the home is not writable, and a user name if the system has none.

    What the environment already sets stays. Logins are still read from the home.

    Returns:
        What was done, for the user to read.
    """
    _name_the_user(environment)
    home = environment.get("HOME", "")
    if home and os.access(home, os.W_OK | os.X_OK):
        return []
    try:
        folder = _private_folder()
    except OSError as error:
        return [
            f"HOME={home} cannot be written to, and neither can the folder of temporary files ({error}); set HF_HOME "
            "and TMPDIR to folders that can"
        ]
    token = Path(home or "/", ".cache/huggingface/token")
    if "HF_HOME" not in environment and os.access(token, os.R_OK):
        environment.setdefault("HF_TOKEN_PATH", str(token))
    for variable, below in CACHES.items():
        environment.setdefault(variable, str(folder / below))
    cache = environment["HF_HOME"]
    return [
        f"HOME={home} cannot be written to, so caches go to {folder} (models and tokenised data to {cache}; set "
        "HF_HOME to keep them elsewhere)"
    ]


def _private_folder() -> Path:
    """A folder of temporary files that is this user's alone: the same at every call, unless its name is taken.

    Somebody who made it, or a link to it, before us could lay files there for us to load.

    Raises:
        OSError: none can be made.
    """
    folder = Path(tempfile.gettempdir()) / f"sparsetrain-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700)
    with contextlib.suppress(OSError):
        found = folder.lstat()
        others_may_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not others_may_write:
            return folder
    return Path(tempfile.mkdtemp(prefix="sparsetrain-"))


def _name_the_user(environment: Environment) -> None:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        # Torch's compiler and others name their folders by the user.
        environment.setdefault("USER", f"user-{os.getuid()}")
