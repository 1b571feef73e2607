"""Start a run in Weights & Biases, or offline where there is no login or no usable server."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sparsetrain.evaluation.metrics import METRICS_FILE
from sparsetrain.training.output.attempt import brief

if TYPE_CHECKING:
    from sparsetrain.recipe.schema import Recipe

INIT_TIMEOUT = 30.0
"""Seconds to wait for the W&B server before recording offline."""
FINISH_TIMEOUT = 60.0
"""Seconds to wait for the last upload when a run ends."""

UPLOAD_TIMEOUT = 3600.0
"""The same for a run that uploads its checkpoints."""


def start_run(recipe: Recipe, folder: Path, resume_id: str | None, say: Callable[[str], None]) -> Any:
    """The W&B run of a recipe; None if W&B is disabled or cannot be used, which a warning says.

    Args:
        folder: The run folder, which gets all files of W&B.
        resume_id: The id of the run to continue.
        say: Prints a line for the user.
    """
    # W&B's own error telemetry would delay the exit by ten seconds without network access.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        mode = _wandb().setup().settings.mode if recipe.wandb.mode == "auto" else recipe.wandb.mode
        if mode == "disabled":
            return None
        run = None if mode in ("offline", "dryrun") else _start_online(recipe, folder, resume_id, say)
        if run is None:
            run = _init("offline", recipe, folder, resume_id)
            say(f"W&B: offline; upload later with `wandb sync {run.settings.sync_dir}`")
        return run
    except (Exception, SystemExit) as error:
        say(f"warning: W&B cannot be used ({brief(error)}); metrics go only to {folder / METRICS_FILE}")
        return None


def _start_online(recipe: Recipe, folder: Path, resume_id: str | None, say: Callable[[str], None]) -> Any:
    """As :func:`start_run`; None if the run has to be recorded offline."""
    if find_wandb_login() is None:
        say("W&B: no login found (`wandb login` or WANDB_API_KEY), so this run is recorded offline")
        return None
    try:
        run = _init("online", recipe, folder, resume_id)
    except (Exception, SystemExit) as error:
        say(f"warning: W&B cannot be used online ({_refusal(error)}), so this run is recorded offline")
        _wandb().teardown()
        return None
    say(f"W&B: {run.url}  (if an upload fails: `wandb sync {run.settings.sync_dir}`)")
    return run


def _init(mode: str, recipe: Recipe, folder: Path, resume_id: str | None) -> Any:
    wandb = _wandb()
    settings = {
        "init_timeout": INIT_TIMEOUT,
        "finish_timeout": UPLOAD_TIMEOUT if recipe.wandb.artifacts else FINISH_TIMEOUT,
        "console": "off",
        "silent": True,
        "disable_code": True,
    }
    known = {name: value for name, value in settings.items() if name in wandb.Settings.model_fields}
    run = wandb.init(
        mode=mode,
        project=recipe.wandb.project,
        entity=recipe.wandb.entity,
        name=recipe.wandb.name or recipe.name,
        tags=recipe.wandb.tags,
        config=recipe.model_dump(mode="json"),
        dir=str(folder),
        id=resume_id,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(**known),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def find_wandb_login() -> str | None:
    """The source of a W&B login (an environment variable, the netrc file, W&B's settings); None without a login.

    Raises:
        ImportError: wandb is not installed.
    """
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    settings = _wandb().setup().settings
    if settings.api_key:
        return "the W&B settings"
    hosts = {urlsplit(settings.base_url).netloc}
    if settings.base_url == type(settings).model_fields["base_url"].default:
        hosts.add("api.wandb.ai")  # the public service has had several names; its logins are under this one
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for place in places:
        try:
            logins = netrc.netrc(Path(place).expanduser()).hosts
        except (OSError, netrc.NetrcParseError):
            continue
        if any(host in logins and logins[host][2] for host in hosts):
            return place
    return None


def _refusal(error: BaseException) -> str:
    """The reason why a run could not be started online, with a fix."""
    said, server = str(error), _wandb().setup().settings.base_url
    if "error 401" in said or "error 403" in said:
        return f"{server} refuses the login; `wandb login --relogin`, or correct wandb.entity: {brief(error)}"
    if "deadline exceeded" in said or "timed out" in said.lower() or "timeout" in said.lower():
        return f"{server} gave no usable answer within {INIT_TIMEOUT:g} seconds"
    return brief(error)


def _wandb() -> Any:
    import wandb

    return wandb
