"""Read the launcher's environment variables, complete them, and connect the ranks to a process group."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sparsetrain.counted import counted
from sparsetrain.errors import TrainingError, first_line
from sparsetrain.rank_variables import check_numbers
from sparsetrain.world import World

Environment = MutableMapping[str, str]
"""The environment is always passed explicitly, because datasets replaces ``os.environ`` by a copy."""

SLURM_PORTS = range(20000, 30000)
"""Range of ports for the ranks of a Slurm job without MASTER_PORT; the job id selects one."""

ATTEMPTS = 3
"""Number of attempts to connect the ranks. gloo occasionally loses a connection while setting it up ("no error",
"connection reset"), on only one of two ranks, and gives up."""
PATIENCE = timedelta(minutes=1)
"""How long a rank that could not connect waits for the results of the others."""


def adopt_slurm(environment: Environment) -> None:
    """Under ``srun`` with one task per GPU, set torch's variables (RANK and so on) from those of Slurm.

    Does nothing if another launcher has set them, or outside of a job step with several tasks: a batch script has some
    of Slurm's variables, too.

    Raises:
        TrainingError: The address of rank 0 or the number of this task is unknown.
    """
    check_numbers(environment, ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID"))
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    if lacking := [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in environment]:
        raise TrainingError(f"SLURM_STEP_NUM_TASKS is set, as by srun, but {lacking[0]} is not; use srun")
    tasks, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if nodes < 1 or tasks % nodes:
        raise TrainingError(
            f"srun started {tasks} tasks on {nodes} nodes; start as many on each node (--ntasks-per-node)"
        )
    if "MASTER_ADDR" not in environment:
        if nodes > 1:
            raise TrainingError(
                "srun started tasks on several nodes, but MASTER_ADDR, the address of the first, is not set; "
                "before srun: "
                'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            )
        environment["MASTER_ADDR"] = "127.0.0.1"
    port = SLURM_PORTS[int(environment.get("SLURM_JOB_ID", "0")) % len(SLURM_PORTS)]
    environment.setdefault("MASTER_PORT", str(port))
    environment["RANK"] = environment["SLURM_PROCID"]
    # With --gpus-per-task each task sees only its own GPU, as number 0.
    own = environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    environment["LOCAL_RANK"] = "0" if own else environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = str(tasks)
    environment["LOCAL_WORLD_SIZE"] = str(tasks // nodes)


def check_ranks(environment: Environment) -> None:
    """Check the launcher's variables; without any, set those of a single process.

    Raises:
        TrainingError: A variable is missing or invalid.
    """
    check_numbers(environment)
    rank, size = environment.get("RANK"), environment.get("WORLD_SIZE")
    if rank is None:
        if int(size or 1) > 1:
            raise TrainingError(
                f"WORLD_SIZE={size} means several ranks, but RANK, which launchers set too, is missing; "
                "start the run through a launcher, or unset WORLD_SIZE"
            )
        environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
        return
    if size is None or int(rank) >= int(size):
        raise TrainingError(f"RANK={rank} is set, but WORLD_SIZE={size}, the number of all ranks, is not larger")
    if int(size) == 1:
        environment.setdefault("LOCAL_RANK", "0")
        return
    for name, what in (
        ("LOCAL_RANK", "the rank within its host"),
        ("MASTER_ADDR", "the address of rank 0"),
        ("MASTER_PORT", "the port of rank 0"),
    ):
        if not environment.get(name):
            raise TrainingError(f"WORLD_SIZE={size}, but {name} ({what}) is not set; start the run through a launcher")


def connect(device: torch.device | None = None, *, timeout: float) -> World:
    """Join the other ranks of the launcher; a process without one starts no process group and is alone.

    Args:
        device: of a process that is alone; by default the GPU if there is one. Each of several ranks has its own GPU.
        timeout: minutes to wait for the other ranks; collectives wait 20 times as long.

    Raises:
        TrainingError: the ranks cannot connect, or the environment variables about them are wrong.
    """
    adopt_slurm(os.environ)
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return World(0, 1, device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    check_ranks(os.environ)
    local, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available() and (device is None or device.type == "cuda")
    if cuda and local >= torch.cuda.device_count():
        raise TrainingError(
            f"LOCAL_RANK={local}, but this host has {counted(torch.cuda.device_count(), 'GPU')}; start one process for "
            "each"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    with meeting(timeout):
        join(device, timedelta(minutes=20 * timeout))
    share_cores(device)
    return World(dist.get_rank(), dist.get_world_size(), device)


def share_cores(device: torch.device) -> None:
    """Give each rank of this host as many threads as there are cores for it, where the work is done on the CPU."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_of_this_host(dist.get_world_size())))


@contextmanager
def meeting(timeout: float) -> Iterator[None]:
    """Context for the start of the process group: choose a working address and interface, and explain failures.

    Args:
        timeout: Minutes after which the process exits with the explanation.

    Raises:
        TrainingError: The ranks cannot connect.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    several_hosts = ranks_of_this_host(int(size)) != int(size)
    if not several_hosts and not _resolves(address):
        # A container's host name often has no address, and all ranks are on this host.
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if several_hosts and (interface := interface_to(address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)

    def message(reason: str) -> str:
        return (
            f"rank {rank} of {size} (host {socket.gethostname()}) could not connect to the others at {address}:{port}: "
            f"{reason}. Check that all ranks were started, that MASTER_ADDR is the address of rank 0's host, that the "
            "others can reach it, and that the port is free there"
        )

    def give_up() -> None:
        reason = f"no answer within {timeout:g} minutes (deepspeed.timeout)"
        print(f"error (rank {rank}): {message(reason)}", file=sys.stderr, flush=True)
        os._exit(TrainingError.exit_code)

    # torch uses one timeout for this and for all later collectives, and cannot be interrupted otherwise.
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
    """Start the process group on all ranks or on none; if one rank fails to connect, all of them try again.

    Ranks connect at MASTER_ADDR and MASTER_PORT. A single process opens no port.

    Args:
        device: The device of this rank, which selects NCCL or gloo.
        timeout: The timeout of collectives, and of the first wait for the other ranks.

    Raises:
        RuntimeError: A rank fails to connect in every attempt.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if int(os.environ["WORLD_SIZE"]) == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # Given the device, NCCL connects here instead of in the first collective, and splits later groups from this one.
    bound = device if backend == "nccl" else None
    for attempt in range(ATTEMPTS):
        own = dist.PrefixStore(f"attempt-{attempt}", store)
        problem = ""
        try:
            dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout, device_id=bound)
        except RuntimeError as error:
            problem = f"rank {rank}: {error}"
            own.set("problem", problem)
            # Group names contain a counter that must be equal on all ranks; destroying a group resets it.
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
    """Destroy the process group if there is one, at the end of a successful run.

    Otherwise NCCL's destructors warn on every rank, and print a stack trace if the store of rank 0 is gone. A rank does
    not wait for ever for ranks that have left.
    """
    if dist.is_initialized():
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(PATIENCE.total_seconds())


def interface_to(address: str) -> str | None:
    """The network interface that routes to an address; None if it cannot be determined.

    gloo binds to the address of the host's name, which in many containers does not exist or is 127.0.1.1.
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
            # An address of this host is reached through the loopback, but belongs to another interface.
            return name
    return None


def ranks_of_this_host(ranks: int) -> int:
    """How many of all ``ranks`` run on this host; all of them if the launcher does not set this."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True
