"""What travels in the wheel, and that the folder ``kernels/`` never stands in for Hugging Face's package."""

from __future__ import annotations

import configparser
import fnmatch
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# Prints where `import kernels` leads: a file, or what it is instead; as things are, and then with a package installed.
PROBE = """
import importlib, importlib.util, sys
from transformers.utils import import_utils

def tell():
    spec = importlib.util.find_spec("kernels")
    regular = spec is not None and spec.origin is not None
    print("kernels:", importlib.import_module("kernels").__file__ if regular else "no package")
    print("transformers sees:", import_utils._is_package_available("kernels", return_version=True))
    print("available:", import_utils.is_kernels_available())

print("on the path:", {root!r} in [entry or {root!r} for entry in sys.path])
tell()
{use}
print("installed:")
sys.path.append({site!r})
sys.modules.pop("kernels", None)
importlib.invalidate_caches()
importlib.reload(import_utils)
tell()
"""
USE_A_MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
print("logits:", tuple(LlamaForCausalLM(config)(torch.tensor([[1, 2]])).logits.shape))
"""


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def listed(text: str) -> list[str]:
    return text.split()


def folders(setup_cfg: configparser.ConfigParser) -> dict[str, Path]:
    """The folder of each top of a package tree."""
    pairs = (line.split("=") for line in setup_cfg["options"]["package_dir"].strip().splitlines())
    return {name.strip(): REPOSITORY / folder.strip() for name, folder in pairs}


def test_every_package_on_disk_is_listed(setup_cfg):
    found = set()
    for name, top in folders(setup_cfg).items():
        for folder in {file.parent for file in top.rglob("*.py")}:
            assert (folder / "__init__.py").exists(), f"{folder} has modules but is no package"
            found.add(".".join([name, *folder.relative_to(top).parts]))
    assert set(listed(setup_cfg["options"]["packages"])) == found


def test_every_other_file_travels_too(setup_cfg):
    patterns = {
        name: [pattern.strip() for pattern in text.split(",")]
        for name, text in setup_cfg["options.package_data"].items()
    }
    for name, top in folders(setup_cfg).items():
        files = [file for file in top.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")]
        for file in (str(file.relative_to(top)) for file in files):
            flat = [pattern.replace("**/", "") for pattern in patterns.get(name, [])]
            assert any(fnmatch.fnmatch(file, pattern) for pattern in flat), f"{name} leaves {file} behind"


def test_the_folder_named_kernels_is_no_package():
    assert not (REPOSITORY / "kernels/__init__.py").exists()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages with something in the place of Hugging Face's ``kernels``."""
    folder = tmp_path / "site"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels/__init__.py").write_text("__version__ = '99.0'\n")
    (folder / "kernels-99.0.dist-info").mkdir()
    (folder / "kernels-99.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0\n")
    return folder


def installed_here() -> bool:
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def by_command(code: str) -> list[str]:
    return ["-c", code]


def by_pytest(code: str, folder: Path) -> list[str]:
    body = "".join(f"    {line}\n" for line in code.strip().splitlines())
    (folder / "probe_in_pytest.py").write_text(f"def test_probe():\n{body}")
    return [
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "-c",
        "pyproject.toml",
        str(folder / "probe_in_pytest.py"),
    ]


def by_launcher(code: str) -> list[str]:
    """As the deepspeed launcher starts the script: the script's folder comes first on the path."""
    folder, script = str(REPOSITORY / "launch"), str(REPOSITORY / "launch/train.py")
    start = f"import runpy, sys; sys.path[0] = {folder!r}; runpy.run_path({script!r}, run_name='probe')"
    return ["-c", f"{start}\n{code}"]


WAYS = {"command": by_command, "pytest": by_pytest, "launcher": by_launcher}


@pytest.mark.parametrize("way", WAYS)
def test_the_folder_stands_in_for_no_kernels_package_and_hides_none(tmp_path, site, way):
    """Installed or not, with the repository's root on the path, as DeepSpeed's launcher for several nodes puts it."""
    use = USE_A_MODEL if way == "command" else ""
    code = PROBE.replace("{root!r}", repr(str(REPOSITORY))).replace("{site!r}", repr(str(site))).replace("{use}", use)
    arguments = by_pytest(code, tmp_path) if way == "pytest" else WAYS[way](code)
    search = [REPOSITORY, tmp_path, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search))}
    answer = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    before, _, after = answer.stdout.partition("installed:\n")
    assert "on the path: True" in before
    assert f"kernels: {site}/kernels/__init__.py" in after
    assert "transformers sees: (True, '99.0')" in after
    assert way != "command" or "logits: (1, 2, 8)" in before
    if installed_here():
        pytest.skip("Hugging Face's kernels package is installed here")
    assert "kernels: no package" in before
    assert "available: False" in before
