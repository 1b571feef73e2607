"""The environment of launchers: what Slurm says is adopted where it means ranks, and only there."""

from __future__ import annotations

import os
import re
import socket
import time
from datetime import timedelta

import pytest
from ports import free_port
from training.preloaded import Fork

from sparsetrain.errors import TrainingError
from sparsetrain.training.distributed import launcher
from sparsetrain.training.distributed.launcher import SLURM_PORTS, adopt_slurm, check_ranks, interface_to, meeting

STEP = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_JOB_ID": "1234567",
}


def test_a_task_of_srun_is_a_rank():
    environment = {**STEP, "MASTER_ADDR": "node-7"}
    adopt_slurm(environment)
    found = {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    assert found == {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    assert int(environment["MASTER_PORT"]) in SLURM_PORTS
    assert environment["MASTER_ADDR"] == "node-7"


def test_a_task_that_sees_one_gpu_uses_it():
    environment = {**STEP, "MASTER_ADDR": "node-7", "CUDA_VISIBLE_DEVICES": "3"}
    adopt_slurm(environment)
    assert environment["LOCAL_RANK"] == "0"
    assert environment["RANK"] == "11"


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},  # a batch script
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {**STEP, "RANK": "0"},  # torchrun under srun
    ],
)
def test_elsewhere_nothing_is_adopted(environment):
    before = dict(environment)
    adopt_slurm(environment)
    assert environment == before


def test_several_nodes_need_an_address():
    with pytest.raises(TrainingError, match="export MASTER_ADDR="):
        adopt_slurm(dict(STEP))


def test_one_node_needs_none():
    environment = {**STEP, "SLURM_STEP_NUM_NODES": "1"}
    adopt_slurm(environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_unequal_nodes_are_refused():
    with pytest.raises(TrainingError, match="15 tasks on 2 nodes"):
        adopt_slurm({**STEP, "SLURM_STEP_NUM_TASKS": "15", "MASTER_ADDR": "node-7"})


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID"])
def test_what_srun_would_not_say_is_refused(name):
    with pytest.raises(TrainingError, match=f"{name}='abc' in the environment is not a number"):
        adopt_slurm({**STEP, "MASTER_ADDR": "node-7", name: "abc"})
    with pytest.raises(TrainingError, match="16 tasks on 0 nodes"):
        adopt_slurm({**STEP, "MASTER_ADDR": "node-7", "SLURM_STEP_NUM_NODES": "0"})


def test_a_task_that_does_not_know_its_number_is_refused():
    with pytest.raises(TrainingError, match="SLURM_PROCID is not"):
        adopt_slurm({name: value for name, value in STEP.items() if name != "SLURM_PROCID"})


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "node-7"}, "WORLD_SIZE=2 means several ranks, but RANK"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK='x' in the environment is not a number"),
        ({"RANK": "0"}, "RANK=0 is set, but WORLD_SIZE=None, the number of all ranks, is not larger"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is set, but WORLD_SIZE=2, the number of all ranks, is not larger"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
            "WORLD_SIZE=2, but LOCAL_RANK (the rank within its host) is not set",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "WORLD_SIZE=2, but MASTER_ADDR (the address of rank 0) is not set",
        ),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE='x' in the environment is not a number"),
    ],
)
def test_half_a_launcher_is_refused(environment, said):
    with pytest.raises(TrainingError, match=re.escape(said)):
        check_ranks(environment)


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}])
def test_without_a_launcher_a_process_is_alone(environment):
    check_ranks(environment)
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("0", "0", "1")


def test_what_a_launcher_says_is_left_alone():
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node-7", "MASTER_PORT": "29500"}
    before = dict(environment)
    check_ranks(environment)
    assert environment == before
    alone = {"RANK": "0", "WORLD_SIZE": "1"}
    check_ranks(alone)
    assert alone["LOCAL_RANK"] == "0"


@pytest.fixture
def ranks(monkeypatch):
    """``ranks(address, here)``: the environment of one of two ranks, so many of them on this host."""

    def set_variables(address, here):
        # Set first, so that what the code under test sets is undone too.
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(here)}
        for name, value in {**variables, "MASTER_ADDR": address, "MASTER_PORT": "29500"}.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_a_name_without_an_address_is_no_obstacle_on_one_host(ranks):
    ranks("no-such-host.invalid", here=2)
    with meeting(1.0):
        assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_between_hosts_gloo_takes_the_interface_on_the_way_to_the_master(ranks):
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    ranks("127.0.0.1", here=1)
    with meeting(1.0):
        assert os.environ["GLOO_SOCKET_IFNAME"] == loopback
    assert interface_to("no-such-host.invalid") is None


def test_what_torch_says_is_told_with_address_and_rank(ranks):
    ranks("127.0.0.1", here=2)
    with (
        pytest.raises(
            TrainingError, match=r"rank 0 of 2 \(host .*\) could not connect to the others at 127\.0\.0\.1:29500: no"
        ),
        meeting(1.0),
    ):
        raise RuntimeError("no route to host\nmore")


def test_a_rank_whose_others_never_come_gives_up(tmp_path):
    script = (
        "import time\nfrom sparsetrain.training.distributed.launcher import meeting\n"
        "with meeting(0.005):\n    time.sleep(60)"
    )
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert Fork([script], tmp_path / "log", environment).wait(300) == 3
    said = (tmp_path / "log").read_text()
    assert "error (rank 1): rank 1 of 2" in said
    assert "no answer within 0.005 minutes (deepspeed.timeout)" in said


JOIN = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from sparsetrain.training.distributed.launcher import join

failures, Group = [int(sys.argv[1])], distributed_c10d.ProcessGroupGloo

class Failing(Group):
    # The connection is made, as far as the other rank can tell, and lost again.
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if failures[0]:
            failures[0] -= 1
            raise RuntimeError("Gloo connectFullMesh failed: no error")

distributed_c10d.ProcessGroupGloo = Failing
try:
    join(torch.device("cpu"), timedelta(minutes=1))
except RuntimeError as error:
    sys.exit(str(error))
total = torch.ones(())
dist.all_reduce(total)
print(total.item())
"""


@pytest.mark.parametrize("failures", [2, 3])
def test_when_one_rank_fails_to_connect_all_try_again(failures, tmp_path):
    port = free_port()
    ends = []
    for rank in range(2):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ends.append(Fork([JOIN, str(failures * rank)], tmp_path / f"{rank}", {**os.environ, **variables}))
    codes = [process.wait(300) for process in ends]
    said = [(tmp_path / f"{rank}").read_text() for rank in range(2)]
    if failures < 3:
        assert [each.splitlines()[-1] for each in said] == ["2.0", "2.0"], said
        assert codes == [0, 0]
    else:
        assert all("rank 1: Gloo connectFullMesh failed: no error" in each for each in said), said
        assert codes == [1, 1]


LEAVES = """
import torch.distributed as dist
from sparsetrain.training.distributed.launcher import leave_group
leave_group()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
leave_group()
print(dist.is_initialized())
"""


def test_a_process_that_is_done_leaves_its_group(tmp_path):
    assert Fork([LEAVES], tmp_path / "log", dict(os.environ)).wait(300) == 0
    assert (tmp_path / "log").read_text().split()[-1:] == ["False"]


def test_it_does_not_wait_for_ever_for_ranks_that_are_gone(monkeypatch):
    monkeypatch.setattr(launcher, "PATIENCE", timedelta(seconds=0.1))
    monkeypatch.setattr(launcher.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(launcher.dist, "destroy_process_group", lambda: time.sleep(20))
    began = time.monotonic()
    launcher.leave_group()
    assert time.monotonic() - began < 10
