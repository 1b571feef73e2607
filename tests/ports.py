"""Ports for ranks to meet at."""

from __future__ import annotations

import random
import socket

BELOW = 32768
"""From here on systems take ports for connections to others. Ranks listen seconds after one was chosen for them, and by
then somebody's connection may have it."""


def free_port() -> int:
    """A port nobody listens on, and nobody is given by chance."""
    while True:
        port = random.SystemRandom().randrange(15000, BELOW)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
