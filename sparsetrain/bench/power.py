"""What ``sparsetrain bench power`` measures: the options of the command, checked and completed for this machine."""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.bench.attention_bench import MAX_CHECKED, AttentionBench, choose_opponents
from sparsetrain.bench.attention_opponents import OPPONENTS, Opponent, opponents_for
from sparsetrain.bench.options import resolve_shape
from sparsetrain.bench.problem import Problem, document_lengths
from sparsetrain.errors import BenchError
from sparsetrain.patterns import PowerPattern


@dataclass(frozen=True)
class PowerBench(AttentionBench[Problem]):
    """One benchmark. :func:`resolve` makes it from the command line."""

    pattern: PowerPattern
    packed: bool

    @property
    def ours(self) -> Opponent[Problem]:
        """The default backend."""
        return OPPONENTS[0]

    @property
    def subject(self) -> str:
        """The pattern in words."""
        packed = ", packed documents" if self.packed else ""
        return f"PowerAttention, block {self.pattern.block}, window {self.pattern.window}{packed}"

    def problem(self, length: int) -> Problem:
        """The problem at ``length`` tokens."""
        return self._problem(length, document_lengths(length) if self.packed else None)

    def check_problem(self) -> Problem:
        """A short problem in which some query reads a far block; packed, with a document of one token inside."""
        block, first_far = self.pattern.block, 1 << (self.pattern.window - 1).bit_length()
        blocks = min(first_far + self.pattern.sinks + 2, max(MAX_CHECKED // block, 2))
        length, last = blocks * block, block + block // 2
        return self._problem(length, (length - last - 1, 1, last) if self.packed else None)

    def facts(self) -> dict[str, object]:
        """The options as they are recorded with the results."""
        return super().facts() | {
            "block": self.pattern.block,
            "window": self.pattern.window,
            "sinks": self.pattern.sinks,
            "packed": self.packed,
        }

    def _problem(self, length: int, documents: tuple[int, ...] | None) -> Problem:
        return Problem(
            pattern=self.pattern,
            length=length,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
            batch=self.batch,
            documents=documents,
        )


def resolve(
    *,
    lengths: str | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 128,
    dtype: str | None = None,
    block: int = 256,
    window: int = 5,
    sinks: int = 1,
    batch: int = 1,
    packed: bool = False,
    opponents: str = "all",
    budget_ms: float = 150.0,
    check: bool = True,
    device: str | None = None,
) -> PowerBench:
    """Check the options and fill in what suits the machine: long sequences in bfloat16 on CUDA, short ones on a CPU.

    Raises:
        BenchError: an option has a value that cannot be measured.
    """
    shape = resolve_shape(device, lengths, heads, kv_heads, dtype)
    if packed and batch != 1:
        raise BenchError(f"--batch {batch} does not go with --packed, which packs one sequence; use --batch 1")
    fitting, known = opponents_for(shape.device.type, packed), {each.name for each in OPPONENTS}
    here = f"on {shape.device.type} {'with' if packed else 'without'} --packed"
    return PowerBench(
        **shape._asdict(),
        head_dim=head_dim,
        pattern=PowerPattern(block, window, sinks),
        batch=batch,
        packed=packed,
        opponents=choose_opponents(opponents, fitting, known, here),
        budget_ms=budget_ms,
        check=check,
    )
