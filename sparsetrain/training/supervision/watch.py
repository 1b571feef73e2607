"""Mutual supervision of ranks: if one dies, fails or hangs, all others stop within a set time and name it.

Rank 0 has a connection to each other rank. A thread in every process reports the progress of its main thread; rank 0
supervises the others, and each of them supervises rank 0. The following is detected:

- A connection closes without a goodbye message: the process has died. All others stop at once.
- The main thread of a rank raised an error: the rank reports it, and all others stop at once and name the rank.
- A rank was asked to stop before training: it reports this, and all others stop with its exit code.
- No message arrives within the timeout: the process is stopped, or its host cannot be reached.
- From the first step on, no rank makes progress within the timeout. All but one then wait in a collective; the rank to
  blame is in an earlier stage of the run than the others, or is the one that does not wait.

Times are differences of one process's monotonic clock: clocks of two hosts are not compared. The device is not polled.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

from sparsetrain.activity import activity, waits_for_others
from sparsetrain.errors import SparsetrainError, TrainingError, first_line
from sparsetrain.training.supervision.connection import Connection, Message, listen, own_address
from sparsetrain.training.supervision.peers import Peer, blame
from sparsetrain.training.supervision.signals import Outcome, Stopped
from sparsetrain.world import World, rank_name

GRACE = 3.0
"""Seconds for a main thread to raise its own error after another rank failed, and for a rank with a broken connection
to wait for the name of the failed rank."""
GRACE_ON_CUDA = 1.0
"""The same for NCCL, whose collectives raise no error: its watchdog aborts a process that lost a peer."""
ENDING = 90.0
"""Seconds for the main thread to then close metrics and W&B (at most a minute) and exit."""
CONNECT_TIMEOUT = 30.0
LONGEST_TICK = 10.0


class Watch:
    """A context manager that supervises the other ranks, and reports an error of this rank to them.

    With one rank it does nothing. After a failure of another rank, errors of the main thread become a
    :class:`~sparsetrain.errors.TrainingError` that names that rank; a process with a stuck main thread is ended with
    the same message and exit code.

    Args:
        timeout: Seconds without an answer, or from the first step on without progress.

    Raises:
        TrainingError: A rank has ended already or cannot reach rank 0, or (on exit) another rank failed.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self.world = world
        self.timeout = timeout
        self.tick = min(timeout / 8, LONGEST_TICK)
        """Seconds between two messages of a rank."""
        self.verdict: str | None = None
        """The failure of another rank, once it is known."""
        self.stop: Outcome | None = None
        """The outcome for this rank if another rank was asked to stop."""
        self.before_exit: Callable[[], None] = lambda: None
        """Called before a process with a stuck main thread is ended; it may take some seconds."""
        self.pass_on: Callable[[Outcome], None] = lambda outcome: None
        """Called in the supervising thread if another rank was asked to stop, to stop the main thread."""
        self._known = threading.Event()
        self._ending = threading.Event()
        self._closed = threading.Event()
        self._listener: socket.socket | None = None
        self._connections: dict[Connection, int | None] = {}
        """Open connections and their ranks; None until the rank has introduced itself."""
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, Peer] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        activity.reset()
        if self.world.size > 1:
            try:
                self._connect()
            except (RuntimeError, OSError) as error:
                raise TrainingError(
                    f"{rank_name(self.world.rank)} lost another rank while connecting ({first_line(error)}); see "
                    "the last output of that rank for the reason"
                ) from error
            self._thread = threading.Thread(target=self._run, name="sparsetrain-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        try:
            if error is not None:
                self.attribute(error)
        finally:
            self._say_goodbye()

    def attribute(self, error: BaseException) -> None:
        """Report an error of this rank to the others, or find out which rank caused it.

        Raises:
            TrainingError: Another rank caused it, which is named.
        """
        if self._thread is None or self._ending.is_set():
            return
        self._ending.set()
        if isinstance(error, Stopped):
            self.tell_stop(error.outcome)
            return
        own = isinstance(error, SparsetrainError)
        if not own:
            self._known.wait(GRACE if _is_of_connection(error) else 0.0)
            if self.stop is not None:
                raise Stopped(self.stop) from error
            if self.verdict is not None:
                raise TrainingError(self.verdict) from error
        said = " ".join((str(error) if own else f"{type(error).__name__}: {error}").split()).removesuffix(":")
        where = "" if own else f" ({activity})"
        self._tell({"fault": f"{rank_name(self.world.rank)} failed{where}: {said}"})

    def tell_stop(self, outcome: Outcome) -> None:
        """Report to the others that this rank was asked to stop, so that they stop too."""
        self._tell({"stop": outcome.value, "by": rank_name(self.world.rank)})

    # Meeting.

    def _connect(self) -> None:
        meeting: list[Any] = [None]
        if self.world.main:
            self._listener = listen()
            self._selector.register(self._listener, selectors.EVENT_READ)
            meeting = [(own_address(), self._listener.getsockname()[1], secrets.token_hex(16))]
        dist.broadcast_object_list(meeting, src=0)
        address, port, self._token = meeting[0]
        now = time.monotonic()
        others = range(1, self.world.size) if self.world.main else [0]
        self._peers = {rank: Peer(rank, now, now) for rank in others}
        problem = None
        if self.world.main:
            self._peers[0] = Peer(0, now, now, socket.gethostname())
        else:
            try:
                connection = Connection(socket.create_connection((address, port), timeout=CONNECT_TIMEOUT))
                self._add(connection, 0)
                connection.send({"token": self._token, "rank": self.world.rank, "host": socket.gethostname()})
            except OSError as error:
                problem = f"{rank_name(self.world.rank)} cannot reach rank 0 at {address}:{port} ({error})"
        problems: list[Any] = [None] * self.world.size
        dist.all_gather_object(problems, problem)
        if found := [each for each in problems if each is not None]:
            raise TrainingError(
                f"{found[0]}; {len(found)} of {self.world.size} ranks cannot. Ranks connect to one another on ports "
                "that the system chooses: open them between the hosts, and check that MASTER_ADDR is an address of "
                "rank 0's host that the others reach"
            )

    def _add(self, connection: Connection, rank: int | None) -> None:
        self._connections[connection] = rank
        self._selector.register(connection, selectors.EVENT_READ)

    def _drop(self, connection: Connection) -> None:
        del self._connections[connection]
        self._selector.unregister(connection)
        connection.close()

    # The thread.

    def _run(self) -> None:
        reported = time.monotonic()
        self._report(reported)
        while not self._closed.is_set() and self.verdict is None:
            self._receive(self.tick)
            now = time.monotonic()
            if now - reported < self.tick:
                continue
            if now - reported > self.timeout / 2:
                # This process was stopped, and perhaps all were; the state of the others is unknown meanwhile.
                for peer in self._peers.values():
                    peer.heard = peer.moved = now
            self._report(now)
            self._judge(now)
            reported = now
        if self.verdict is not None:
            self._stop()
        self._part()

    def _report(self, now: float) -> None:
        report = {"place": str(activity), "order": activity.order, "moves": activity.moves, "timed": activity.timed}
        report |= {"waits": waits_for_others(), "host": socket.gethostname()}
        self._tell({"report": report})
        if self.world.main:
            self._peers[0].update(report, now)

    def _tell(self, message: Message) -> None:
        for connection, rank in list(self._connections.items()):
            if rank is not None:
                connection.send(message)

    def _receive(self, seconds: float) -> None:
        """Wait for messages up to ``seconds`` (half a second at a time, to notice the end), and handle them."""
        for key, _ in self._selector.select(min(seconds, 0.5)):
            if isinstance(key.fileobj, Connection):
                self._hear(key.fileobj)
            elif self._listener is not None:
                with contextlib.suppress(OSError):  # the peer has closed already
                    self._add(Connection(self._listener.accept()[0]), None)

    def _hear(self, connection: Connection) -> None:
        try:
            for message in connection.receive():
                rank = self._connections[connection]
                if rank is None:
                    self._connections[connection] = self._introduced(message)
                else:
                    self._heard(self._peers[rank], message)
        except EOFError:
            rank = self._connections[connection]
            self._drop(connection)
            if rank is not None and not self._peers[rank].done:
                peer = self._peers[rank]
                self._declare_fault(
                    f"{peer.name} died; it was last seen in {peer.report['place']}. Its process ended without a "
                    "message, as when it is killed; if the host ran out of memory, the kernel log shows it (dmesg)"
                )

    def _introduced(self, message: Message) -> int:
        """The rank of a new connection.

        Raises:
            EOFError: The connection does not belong to this run.
        """
        rank = message.get("rank")
        if not hmac.compare_digest(_bytes(message.get("token")), _bytes(self._token)) or rank not in self._peers:
            raise EOFError
        self._peers[rank].host = str(message.get("host"))
        return int(rank)

    def _heard(self, peer: Peer, message: Message) -> None:
        if "report" in message:
            peer.host = message["report"]["host"]
            peer.update(message["report"], time.monotonic())
        elif "goodbye" in message:
            peer.done = True
        elif "stop" in message:
            peer.done = True
            self._leave_with(message)
        elif "fault" in message:
            peer.done = True
            self._declare_fault(message["fault"])

    def _judge(self, now: float) -> None:
        waited = f"{self.timeout / 60:g} minutes (deepspeed.timeout)"
        for peer in self._peers.values():
            if not peer.done and now - peer.heard > self.timeout:
                self._declare_fault(
                    f"{peer.name} has not answered for {waited}; it was last seen in {peer.report['place']}. Its "
                    "process is stopped, or its host cannot be reached"
                )
                return
        # Other ranks only check rank 0's connection; rank 0 checks the progress of all ranks, including itself.
        live = [peer for peer in self._peers.values() if not peer.done]
        timed = self.world.main and any(peer.report["timed"] for peer in live)
        if timed and now - max(peer.moved for peer in live) > self.timeout:
            self._declare_fault(blame(live, waited))

    def _declare_fault(self, verdict: str) -> None:
        if self.verdict is None:
            self.verdict = verdict
            if self.world.main:
                self._tell({"fault": verdict})
            self._known.set()

    def _leave_with(self, message: Message) -> None:
        """Another rank was asked to stop before training: stop this one too."""
        if self.verdict is None:
            self.stop = Outcome(message["stop"])
            if self.world.main:
                self._tell(message)
            self.verdict = f"{message['by']} was asked to stop"
            self._known.set()
            self.pass_on(self.stop)

    def _stop(self) -> None:
        """End the process. Keep reading meanwhile: closing a socket with unread data would discard sent messages."""
        deadline = time.monotonic() + (GRACE_ON_CUDA if self.world.device.type == "cuda" else GRACE)
        while not self._closed.is_set():
            self._receive(0.1)
            if time.monotonic() > deadline + (ENDING if self._ending.is_set() else 0.0):
                if self.stop is not None:
                    os._exit(self.stop.exit_code)
                print(f"\nerror (rank {self.world.rank}): {self.verdict}", file=sys.stderr)
                print(f"{rank_name(self.world.rank)} itself was here, in {activity}:", file=sys.stderr)
                traceback.print_stack(sys._current_frames().get(threading.main_thread().ident or 0), file=sys.stderr)
                sys.stderr.flush()
                try:
                    self.before_exit()
                    self._receive(0.0)
                finally:
                    os._exit(TrainingError.exit_code)

    # Parting.

    def _say_goodbye(self) -> None:
        self._tell({"goodbye": True})
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * GRACE)
        activity.timed = False

    def _part(self) -> None:
        """Close the connections after all messages have arrived: close for sending, and read until the others do so."""
        deadline = time.monotonic() + 2.0
        for connection in self._connections:
            connection.finish_sending()
        while self._connections and time.monotonic() < deadline:
            self._receive(0.1)
        for connection in list(self._connections):
            self._drop(connection)
        self._selector.close()
        if self._listener is not None:
            self._listener.close()


def _is_of_connection(error: BaseException) -> bool:
    """Whether an error may be caused by the end of another rank."""
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl", "peer"))


def _bytes(token: object) -> bytes:
    """Bytes of a token for comparison; an unknown sender may send any type."""
    return str(token).encode(errors="replace")
