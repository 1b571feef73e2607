"""A connection between two ranks: JSON messages over a socket, which shows at once when a process ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from typing import Any

Message = dict[str, Any]

SEND_TIMEOUT = 2.0
"""Seconds to wait for space in the send buffer; messages are small, so only a stopped process fills it."""
LONGEST = 1 << 20
"""Maximum bytes of a message; a longer one is invalid."""


class Connection:
    """Sends and receives messages. Any thread may send; one thread receives.

    Args:
        connection: A connected socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(SEND_TIMEOUT)
        self._lock = threading.Lock()
        self._partial = b""

    def fileno(self) -> int:
        """For ``select``."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send a message; errors are ignored, because the end of the other side is noticed when receiving."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message]:
        """The messages that have arrived. Call when the socket is readable.

        Raises:
            EOFError: The other side has closed, or sent an invalid message.
        """
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError as error:
            raise EOFError from error
        if not data or len(self._partial) > LONGEST:
            raise EOFError
        *lines, self._partial = (self._partial + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise EOFError from error
        if not all(isinstance(message, dict) for message in messages):
            raise EOFError
        return messages

    def finish_sending(self) -> None:
        """Close the sending direction; messages can still be received."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket."""
        with contextlib.suppress(OSError):
            self._socket.close()


def listen() -> socket.socket:
    """A listening socket on a free port of every address of this machine, including IPv6 if available."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def own_address() -> str:
    """An address of this machine that the other ranks can reach: MASTER_ADDR if it is this machine, else the address of
    the interface towards it. The host's name may not resolve, or resolve to a loopback address.
    """
    master, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    family, kind, protocol, _, address = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        try:
            probe.bind((address[0], 0))
        except OSError:
            # Connecting a datagram socket sends nothing; it only selects the interface.
            probe.connect(address)
            return str(probe.getsockname()[0])
    return master
