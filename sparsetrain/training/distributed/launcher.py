"""What launchers say about the ranks, and what the names of hosts leave unsaid. Read from and written to the
environment, before the process group exists."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sparsetrain.errors import TrainingError, first_line

Environment = MutableMapping[str, str]
"""Always given, and no default: datasets puts a copy in the place of ``os.environ``."""

SLURM_PORTS = range(20000, 30000)
"""Ports at which the ranks of a Slurm job meet where MASTER_PORT is not set; which one follows from the job's id."""

ATTEMPTS = 3
"""How often the ranks try to connect to one another. gloo now and then loses a connection while it makes it ("no
error", "connection reset"), on one of the two ranks only, and gives up."""
PATIENCE = timedelta(minutes=1)
"""How long a rank that could not connect waits to hear how the others fared."""


def adopt_slurm(environment: Environment) -> None:
    """Under ``srun`` with one task a GPU, say what Slurm says in the variables of torch (RANK and its like).

    Does nothing where another launcher has set them, or outside of a job step of several tasks: a batch script has
    some of Slurm's variables too.

    Raises:
        TrainingError: nobody says where rank 0 is, or which of the tasks this is.
    """
    _check_numbers(environment, ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID"))
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    if lacking := [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in environment]:
        raise TrainingError(f"SLURM_STEP_NUM_TASKS is set, as by srun, and {lacking[0]} is not; use srun")
    tasks, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if nodes < 1 or tasks % nodes:
        raise TrainingError(f"srun started {tasks} tasks on {nodes} nodes; start as many on each (--ntasks-per-node)")
    if "MASTER_ADDR" not in environment:
        if nodes > 1:
            raise TrainingError(
                "srun started tasks on several nodes, and MASTER_ADDR does not say which is the first; before srun: "
                'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            )
        environment["MASTER_ADDR"] = "127.0.0.1"
    port = SLURM_PORTS[int(environment.get("SLURM_JOB_ID", "0")) % len(SLURM_PORTS)]
    environment.setdefault("MASTER_PORT", str(port))
    environment["RANK"] = environment["SLURM_PROCID"]
    # With --gpus-per-task each task sees its own GPU alone, and that is number 0.
    own = environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    environment["LOCAL_RANK"] = "0" if own else environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = str(tasks)
    environment["LOCAL_WORLD_SIZE"] = str(tasks // nodes)


def settle_ranks(environment: Environment) -> None:
    """Check what launchers say about the ranks; where none says anything, say that this process is alone.

    Raises:
        TrainingError: a variable is missing, or is not what launchers set it to.
    """
    _check_numbers(environment, ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    rank, size = environment.get("RANK"), environment.get("WORLD_SIZE")
    if rank is None:
        if int(size or 1) > 1:
            raise TrainingError(
                f"WORLD_SIZE={size} makes this one of several ranks, and RANK, which launchers set too, does not say "
                "which; start the run through one, or unset WORLD_SIZE"
            )
        environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
        return
    if size is None or int(rank) >= int(size):
        raise TrainingError(f"RANK={rank} is set, and WORLD_SIZE={size} is not larger: it is the number of all ranks")
    if int(size) == 1:
        environment.setdefault("LOCAL_RANK", "0")
        return
    for name, what in (
        ("LOCAL_RANK", "which rank of its host this is"),
        ("MASTER_ADDR", "where the ranks meet"),
        ("MASTER_PORT", "where the ranks meet"),
    ):
        if not environment.get(name):
            raise TrainingError(f"WORLD_SIZE={size}, but {name} does not say {what}; start the run through a launcher")


def _check_numbers(environment: Environment, names: Sequence[str]) -> None:
    for name in names:
        if not environment.get(name, "0").isdecimal():
            raise TrainingError(
                f"{name}={environment[name]!r} in the environment is no number, as launchers set it; unset or mend it"
            )


@contextmanager
def meeting(timeout: float) -> Iterator[None]:
    """Around the start of the process group: choose an address and interface that work, explain what does not.

    Args:
        timeout: minutes after which the process ends with the explanation.

    Raises:
        TrainingError: the ranks do not find one another.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    several_hosts = ranks_of_this_host(int(size)) != int(size)
    if not several_hosts and not _resolves(address):
        # A container's own name often has no address, and no rank is anywhere else.
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if several_hosts and (interface := interface_to(address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)

    def message(reason: str) -> str:
        return (
            f"rank {rank} of {size} (host {socket.gethostname()}) did not find the others at {address}:{port}: "
            f"{reason}. Check that all ranks were started, that MASTER_ADDR is the address of rank 0's host and reached"
            " from the others, and that the port is free there"
        )

    def give_up() -> None:
        reason = f"no answer within {timeout:g} minutes (deepspeed.timeout)"
        print(f"error (rank {rank}): {message(reason)}", file=sys.stderr, flush=True)
        os._exit(TrainingError.exit_code)

    # torch has one timeout for this and for all collectives to come, and nothing else ends its wait.
    patience = threading.Timer(60 * timeout, give_up)
    patience.daemon = True
    patience.start()
    try:
        yield
    except Exception as error:
        raise TrainingError(message(first_line(error))) from error
    finally:
        patience.cancel()


def join(device: torch.device, timeout: timedelta) -> None:
    """Start the process group, on all ranks or on none; where one rank fails to connect, all of them try again.

    Ranks meet at the environment's MASTER_ADDR and MASTER_PORT. A process alone opens no port.

    Args:
        device: of this rank, which decides on NCCL or gloo.
        timeout: of the collectives of the group, and of the first wait for the other ranks.

    Raises:
        RuntimeError: some rank does not connect, time and again.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if int(os.environ["WORLD_SIZE"]) == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # With its device NCCL connects here and not in the first collective, and splits later groups off.
    bound = device if backend == "nccl" else None
    for attempt in range(ATTEMPTS):
        own = dist.PrefixStore(f"attempt-{attempt}", store)
        problem = ""
        try:
            dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout, device_id=bound)
        except RuntimeError as error:
            problem = f"rank {rank}: {error}"
            own.set("problem", problem)
            # Names of groups count up, and must be equal on all ranks; where a group was made, destroying it does this.
            distributed_c10d._world.group_count = 0
        if own.add("arrived", 1) == size:
            own.set("verdict", own.get("problem").decode() if own.check(["problem"]) else "")
        own.wait(["verdict"], PATIENCE if problem else timeout)
        problem = own.get("verdict").decode()
        if not problem:
            return
        if dist.is_initialized():
            dist.destroy_process_group()
    # The store lives in rank 0, which ends last.
    if own.add("told", 1) == size:
        own.set("all told", "")
    if rank == 0:
        own.wait(["all told"], PATIENCE)
    raise RuntimeError(problem)


def leave_group() -> None:
    """Leave the process group where there is one: the last thing that a process does whose run ended well.

    Left to its destructors, NCCL warns on every rank, and prints a stack where it looks for the store of a rank 0 that
    has ended already. A rank that the others have left does not wait for them for ever.
    """
    if dist.is_initialized():
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(PATIENCE.total_seconds())


def interface_to(address: str) -> str | None:
    """The network interface on the way to an address; None where that cannot be told.

    gloo binds to the address that the host's own name stands for, which in many containers is none, or 127.0.1.1.
    """
    import psutil

    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            # An address of this host itself is reached by the loopback, but bears the name of its own interface.
            return name
    return None


def ranks_of_this_host(ranks: int) -> int:
    """How many of all ``ranks`` run on this host; all of them where neither torch's launcher nor deepspeed's says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True
