"""Two nodes under Slurm's variables: two network namespaces with an address each and names that do not resolve."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch/slurm.sbatch"
NETWORK = "10.213.77"

# Starts task N in namespace N and ends as the worst of them did, as srun does.
SRUN = """
while [[ "$1" == --* ]]; do shift; done
tasks=()
for node in 0 1; do
    SLURM_PROCID=$node SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 \\
        ip netns exec {name}-$node unshare --uts sh -c "hostname node-$node; exec \\"\\$@\\"" sh "$@" &
    tasks+=($!)
done
worst=0
for task in "${{tasks[@]}}"; do wait "$task" || worst=$?; done
exit $worst
"""


@pytest.fixture
def nodes(tmp_path):
    """A folder for the path with a ``srun`` that starts one task on each of two nodes, and ``scontrol``."""
    name = f"st{os.getpid()}"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs ip and unshare")
    setup = [
        *(f"ip netns add {name}-{node}" for node in (0, 1)),
        f"ip link add {name}v0 netns {name}-0 type veth peer name {name}v1 netns {name}-1",
        *(f"ip -n {name}-{node} addr add {NETWORK}.{node + 1}/24 dev {name}v{node}" for node in (0, 1)),
        *(f"ip -n {name}-{node} link set {device} up" for node in (0, 1) for device in ("lo", f"{name}v{node}")),
    ]
    try:
        for command in setup:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
        folder = tmp_path / "bin"
        folder.mkdir()
        programs = {"srun": SRUN.format(name=name), "scontrol": f"echo {NETWORK}.1; echo {NETWORK}.2"}
        for program, script in programs.items():
            file = folder / program
            file.write_text(f"#!/bin/bash\n{script}")
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
        yield folder
    finally:
        for node in (0, 1):
            subprocess.run(["ip", "netns", "del", f"{name}-{node}"], capture_output=True)


def test_a_slurm_job_trains_on_two_nodes(tmp_path, tiny, nodes, ranks_of, run_folder, monkeypatch, stages):
    for name, value in {
        "PATH": f"{nodes}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_NODELIST": "both",
        "SLURM_JOB_ID": "7",
    }.items():
        monkeypatch.setenv(name, value)
    run = run_folder(tmp_path / "run")
    command = ["bash", str(SCRIPT), str(tiny), "--output", str(run.path)]
    ranks_of(command, tmp_path / "log").wait()
    # The same ranks as on one host take the same steps.
    assert run.values("loss") == stages(2)[2].values("loss")
