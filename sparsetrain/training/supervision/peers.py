"""The state of other ranks from their reports, and which rank to blame if none makes progress."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsetrain.training.supervision.connection import Message
from sparsetrain.world import rank_name


@dataclass
class Peer:
    """The last report of a rank, with times of this process's clock."""

    rank: int
    heard: float
    moved: float
    host: str = "unknown"
    report: Message = field(default_factory=lambda: {"place": "start", "order": 0, "moves": 0, "timed": False})
    done: bool = False
    """Whether the rank has announced its end."""

    @property
    def name(self) -> str:
        return rank_name(self.rank, self.host)

    def update(self, report: Message, now: float) -> None:
        if report["moves"] != self.report["moves"]:
            self.moved = now
        self.heard, self.report = now, report


def blame(live: list[Peer], waited: str) -> str:
    """A message that names the rank that the others wait for, if no rank makes progress."""
    earliest = min(peer.report["order"] for peer in live)
    behind = [peer for peer in live if peer.report["order"] == earliest]
    if len(behind) > 1:
        behind = [peer for peer in behind if not peer.report["waits"]] or behind
    if len(behind) == len(live):
        return (
            f"no rank has made progress for {waited}; all are in {behind[0].report['place']}. Each rank "
            "prints its stack before it exits; if it was still working, raise deepspeed.timeout"
        )
    names = ", ".join(peer.name for peer in behind[:4]) + (", ..." if len(behind) > 4 else "")
    return (
        f"{names} made no progress for {waited}, last seen in {behind[0].report['place']}, and the others wait. If it "
        "was still working, raise deepspeed.timeout"
    )
