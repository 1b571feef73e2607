"""The launch templates are what their schedulers and launchers read, and do what their comments say."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """``stub(name, script)``: puts a program of that name first on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name, script):
        file = folder / name
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    return make


@pytest.fixture
def batch(tmp_path, stub, monkeypatch):
    """``batch(code, restarts)``: the Slurm script with a srun that ends so; gives its exit code and what was called."""
    calls = tmp_path / "calls"

    def run(code, restarts="0"):
        calls.write_text("")
        stub("srun", f'echo "srun $MASTER_ADDR $*" >> {calls}; exit {code}')
        stub("scontrol", f'echo "scontrol $*" >> {calls}; [ "$1" != show ] || printf "node-7\\nnode-8\\n"')
        monkeypatch.setenv("SLURM_JOB_NODELIST", "node-[7-8]")
        monkeypatch.setenv("SLURM_JOB_ID", "42")
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        done = subprocess.run(["bash", str(LAUNCH / "slurm.sbatch"), "my.yaml", "name=two words"], check=False)
        return done.returncode, calls.read_text().splitlines()

    return run


def test_a_slurm_job_meets_at_its_first_node(batch):
    code, calls = batch(0)
    assert code == 0
    assert calls == [
        "scontrol show hostnames node-[7-8]",
        "srun node-7 --kill-on-bad-exit=0 python -m sparsetrain.launch.train my.yaml name=two words",
    ]


@pytest.mark.parametrize("code", [75, 138])
def test_a_preempted_slurm_job_is_queued_again(batch, code):
    ended, calls = batch(code)
    assert ended == 0
    assert calls[-1] == "scontrol requeue 42"


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_failed_slurm_job_is_not_queued_again(batch, code):
    ended, calls = batch(code)
    assert ended == code
    assert not any("requeue" in call for call in calls)


def test_a_restarted_slurm_job_resumes(batch):
    _, calls = batch(0, restarts="1")
    assert calls[1].endswith("my.yaml name=two words --resume")


def test_the_directives_of_slurm_come_before_the_first_command():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert directives
    assert max(directives) < first_command, "Slurm reads none after it"
    wanted = {"--requeue", "--open-mode=append", "--signal=USR1@300", "--ntasks-per-node=8", "--gpus-per-node=8"}
    assert wanted <= {lines[i].split()[1] for i in directives}


def test_deepspeed_reads_the_hostfile():
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(LAUNCH / "hostfile.example"))) == {"node-1": 8, "node-2": 8}


def test_the_job_of_kubernetes_starts_a_torchrun_that_finds_the_first_pod(tmp_path, stub):
    from torch.distributed.run import get_args_parser

    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pods = job["spec"]["template"]["spec"]
    (container,) = pods["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    nodes, gpus = variables["NODES"], variables["GPUS"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert str(job["spec"]["completions"]) == str(job["spec"]["parallelism"]) == nodes
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == gpus
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pods["volumes"]}

    stub("torchrun", f'printf "%s\\n" "$@" > {tmp_path}/arguments')
    environment = {**os.environ, **variables, "JOB_COMPLETION_INDEX": "1"}
    subprocess.run(container["command"], env=environment, check=True)
    read = get_args_parser().parse_args((tmp_path / "arguments").read_text().splitlines())
    assert (read.nnodes, read.nproc_per_node, read.node_rank) == (nodes, gpus, 1)
    # The first pod's name in the service's domain.
    assert read.master_addr == f"{job['metadata']['name']}-0.{pods['subdomain']}"
    assert service["metadata"]["name"] == pods["subdomain"]
    assert (read.module, read.training_script) == (True, "sparsetrain.launch.train")
    assert read.training_script_args == [variables["RECIPE"], "--resume"]
