"""Whether the Hugging Face Hub answers, so that no look-up waits for one that does not.

Without a network, huggingface_hub tries every file that is not in its cache six times, 23 seconds in all, and a model
has many that it need not have. In its offline mode it reads the cache and nothing else.
"""

from __future__ import annotations

import logging
import os
import time

logger = logging.getLogger(__name__)

TIMEOUT = 5.0
"""Seconds that the Hub has for an answer."""
PAUSE = 1.0
"""Seconds until it is asked a second time."""
VALID = 60.0
"""Seconds for which what was found out holds."""

_offline_by_us = False
_asked_at: float | None = None


def read_cache_if_unreachable() -> None:
    """Before something is read by its Hub id: switch huggingface_hub to its offline mode, with a warning, where the Hub
    does not answer, and back once it does again. A mode that the user has set stays."""
    global _asked_at, _offline_by_us
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _offline_by_us:
        return
    if _asked_at is not None and time.monotonic() - _asked_at < VALID:
        return
    # Offline, nothing could be asked.
    constants.HF_HUB_OFFLINE = False
    fault = _ask(constants.ENDPOINT)
    if fault is not None and not _offline_by_us and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "%s cannot be reached (%s): what has a Hub id is read from the cache alone, as with HF_HUB_OFFLINE=1",
            constants.ENDPOINT,
            fault,
        )
    constants.HF_HUB_OFFLINE = _offline_by_us = fault is not None
    _asked_at = time.monotonic()


def _ask(address: str) -> str | None:
    """Why there is no answer, whatever it says; None if there is one."""
    from huggingface_hub.utils import get_session

    fault: str | None = None
    for pause in (0.0, PAUSE):
        time.sleep(pause)
        try:
            get_session().head(address, timeout=TIMEOUT)
            return None
        # Of its HTTP library, which is not the same in every version.
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
    return fault
