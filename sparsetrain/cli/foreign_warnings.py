"""What other libraries say of themselves that no user of a command can act on."""

from __future__ import annotations

import logging
import os
import sys

NEEDLESS = {
    # It makes a default of continuous batching, which no command uses, under any launcher.
    "transformers.generation.configuration_utils": "Setting NCCL_GRAPH_MIXING_SUPPORT",
    # peft imports it, and it asks for a kernel of 4-bit products on a CPU, where no base is quantised.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # A run says on which device it is.
    "DeepSpeed": "Setting accelerator to CPU",
}
"""The beginning of each, by the name of its logger."""


class _Leaves(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Leaves) and other.beginning == self.beginning

    def __hash__(self) -> int:
        return hash(self.beginning)


def leave_out_needless() -> None:
    """Leave these warnings out in this process, and nothing else of their loggers; and where standard error is no
    terminal, bars, which would be a line for each step."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name, beginning in NEEDLESS.items():
        # A logger keeps one of several equal filters, so that a process may run several commands.
        logging.getLogger(name).addFilter(_Leaves(beginning))
