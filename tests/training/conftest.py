"""A recipe small enough to train in a second, and the runs that several tests look at, made once for all workers."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ports import free_port
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training import drafts
from training.preloaded import Fork
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sparsetrain.cli import main
from sparsetrain.data.synthetic import WORDINGS
from sparsetrain.recipe import Recipe, load_recipe
from sparsetrain.recipe.yaml_source import dump_yaml
from sparsetrain.training.distributed.engine import init_world
from sparsetrain.world import World

VOCABULARY = 384
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = 300.0

COMMANDS = """
import json, sys
from sparsetrain.cli import main
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""


@dataclass(frozen=True)
class RunFolder:
    """What a run left behind."""

    path: Path

    @property
    def lines(self) -> list[dict]:
        """Every line of the metrics, in the order written."""
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def steps(self) -> list[dict]:
        """The metrics of each optimizer step."""
        return [line for line in self.lines if "loss" in line]

    def values(self, name: str) -> list[float]:
        """One metric, step by step."""
        return [line[name] for line in self.steps]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The exported model."""
        return load_file(self.path / "final/model.safetensors")

    @property
    def checkpoints(self) -> list[str]:
        """Names of the folders in the checkpoint folder, whole or not."""
        return sorted(path.name for path in (self.path / "checkpoints").glob("step-*"))

    def state(self, checkpoint: str) -> dict:
        """``state.json`` of a checkpoint."""
        return json.loads((self.path / "checkpoints" / checkpoint / "state.json").read_text())


class Ranks:
    """Processes of one run, started together and writing one log."""

    def __init__(self, command: Sequence[str] | Sequence[Sequence[str]], log: Path, ranks: int | None = 1) -> None:
        """Start them.

        Args:
            command: what each runs: a command; arguments of ``sparsetrain``, list by list and one after the other; or
                arguments of ``python`` that begin with ``-c``, for a process that has the libraries already.
            log: what they say is added to it.
            ranks: how many to start, with the environment of a launcher; None for a launcher that does so itself. Where
                there are GPUs, but fewer than these, the test is skipped.
        """
        if torch.cuda.is_available() and (ranks or 1) > torch.cuda.device_count():
            pytest.skip(f"each rank has a GPU: needs {ranks}, and there are {torch.cuda.device_count()}")
        self.log_file = log
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        self.processes: list[subprocess.Popen | Fork] = []
        port = free_port()
        forked = command[0] == "-c" or not isinstance(command[0], str)
        if not isinstance(command[0], str):
            command = ["-c", COMMANDS, json.dumps(command)]
        if forked and torch.cuda.is_available():  # whose contexts no fork survives
            command, forked = [sys.executable, *command], False
        with log.open("a") as file:
            for rank in range(ranks or 1):
                if ranks is not None and ranks > 1:
                    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                if forked:
                    self.processes.append(Fork(command[1:], log, environment))
                    continue
                self.processes.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
                )

    @property
    def log(self) -> str:
        """Standard output and standard error of all ranks."""
        return self.log_file.read_text()

    def wait(self, *codes: int) -> str:
        """Wait for the end, require the exit codes (0 by default, one for all or one a rank), and return the log."""
        deadline = time.monotonic() + TIMEOUT
        try:
            found = [process.wait(max(1.0, deadline - time.monotonic())) for process in self.processes]
        finally:
            self.kill()
        wanted = list(codes or (0,))
        wanted = wanted * len(found) if len(wanted) == 1 else wanted
        assert found == wanted, "\n".join(self.log.splitlines()[-60:])
        return self.log

    def wait_until(self, happened: Callable[[], bool], alive: bool = True) -> None:
        """Look every few milliseconds until something is so; while the processes live, unless ``alive`` is False."""
        deadline = time.monotonic() + TIMEOUT
        while not happened():
            assert not alive or any(process.poll() is None for process in self.processes), self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        """Send a signal to every rank."""
        for process in self.processes:
            process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL whatever still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def make_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer that knows the words of the passkey task and splits numbers into digits."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    wording = WORDINGS["passkey"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([wording.introduction, wording.needle, wording.question] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)


def make_corpus(file: Path) -> None:
    """Documents of very different lengths, some longer than a row."""
    rng = random.Random(0)
    words = ["the", "pass", "key", "is", "green", "sky", "blue", "sun", "1", "2", "3", "info", "text", "quiz", "again"]
    texts = [" ".join(rng.choices(words, k=rng.choice([3, 10, 40, 160]))) for _ in range(60)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def make_recipe(folder: Path) -> dict:
    """Two layers, six steps of four rows, the passkey task and text packed together."""
    return {
        "model": {
            "tokenizer": str(folder / "tokenizer"),
            "dtype": "float32",
            "architecture": {
                "model_type": "llama",
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "initializer_range": 0.2,
                "tie_word_embeddings": False,
            },
        },
        "attention": {"method": "power", "block": 16, "window": 2, "sinks": 1},
        "data": {
            "sources": [
                {"path": str(folder / "corpus.jsonl"), "weight": 3},
                {"synthetic": "passkey", "lengths": [160, 200]},
            ],
            "long_documents": "split",
        },
        "sequence": {"length": 256},
        "train": {
            "steps": 6,
            "micro_batch": 1,
            "global_batch_sequences": 4,
            "lr": 1e-2,
            "warmup": 2,
            "max_grad_norm": 0.5,
            "loss_chunk": 100,
            # A large eps: with a small one Adam turns the rounding of a gradient near zero into a whole step.
            "optimizer": {"eps": 1e-3, "weight_decay": 0.1},
        },
        "eval": {"at_start": False, "at_end": False},
        "wandb": {"mode": "disabled"},
    }


@pytest.fixture(scope="session")
def tiny(shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The tiny recipe ``tiny.yaml`` with its tokenizer and corpus."""

    def make(folder: Path) -> None:
        make_tokenizer(folder / "tokenizer")
        make_corpus(folder / "corpus.jsonl")
        (folder / "tiny.yaml").write_text(dump_yaml(make_recipe(folder)))

    return shared("tiny-recipe", make) / "tiny.yaml"


@pytest.fixture(scope="session")
def pretrained(tiny: Path, shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The tiny recipe's model as two folders of weights on disk: ``tied`` and ``untied`` output projections."""

    def make(folder: Path) -> None:
        recipe = load_recipe(tiny).recipe
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.parent / "tokenizer")
        for name in ("tied", "untied"):
            architecture = {**(recipe.model.architecture or {}), "tie_word_embeddings": name == "tied"}
            torch.manual_seed(0)
            config = AutoConfig.for_model(**architecture)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)

    return shared("pretrained", make)


@pytest.fixture(scope="session")
def tiny_recipe(tiny: Path) -> Callable[..., Recipe]:
    """``tiny_recipe("train.lr=1", ...)``: the recipe as an object."""
    return lambda *overrides: load_recipe(tiny, overrides).recipe


@pytest.fixture(scope="session")
def ranks_of() -> type[Ranks]:
    """``ranks_of(command, log, ranks)``: a command, or lists of arguments of ours, started as so many ranks."""
    return Ranks


@pytest.fixture(scope="session")
def start(tiny: Path) -> Callable[..., Ranks]:
    """``start(folder, "key=value", "--resume", ranks=2)``: train the tiny recipe in processes of its own."""

    def start_ranks(output: Path, *arguments: str, ranks: int = 1) -> Ranks:
        commands = [["run", str(tiny), *arguments, "--output", str(output)]]
        return Ranks(commands, output.with_suffix(".log"), ranks)

    return start_ranks


@pytest.fixture(scope="session")
def stages(tiny: Path, shared: Callable[..., Path]) -> Callable[[int], dict[int, RunFolder]]:
    """``stages(ranks)``: the tiny recipe trained by so many ranks, by ZeRO stage. Four ranks train stage 2 alone."""

    def runs(ranks: int) -> dict[int, RunFolder]:
        tried = [2] if ranks == 4 else [0, 1, 2, 3]

        def make(folder: Path) -> None:
            commands = [
                ["run", str(tiny), f"deepspeed.stage={stage}", "--output", str(folder / f"stage-{stage}")]
                for stage in tried
            ]
            Ranks(commands, folder / "log", ranks).wait()

        folder = shared(f"stages-{ranks}-ranks", make)
        return {stage: RunFolder(folder / f"stage-{stage}") for stage in tried}

    return runs


@pytest.fixture(scope="session")
def run_folder() -> type[RunFolder]:
    """``run_folder(path)``: reads what a run leaves in its folder."""
    return RunFolder


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``refused(*arguments, code=2)``: run the command, require the exit code, and return its one message."""
    # DeepSpeed's log handler keeps the standard output of the test that imported it, which is closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def message(*arguments: str, code: int = 2) -> str:
        capfd.readouterr()
        assert main(arguments) == code
        said = capfd.readouterr().err
        assert "Traceback" not in said
        # Ours begins a line. DeepSpeed's first import may try the linker, which has errors of its own to tell.
        error = f"\n{said}".partition("\nerror: ")[2].strip()
        assert error, said
        return error

    return message


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """``no_model()``: from here on a run must be refused before it loads its model."""

    def load_model(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    return lambda: monkeypatch.setattr("sparsetrain.training.run.load_model", load_model)


@pytest.fixture
def of_two_ranks() -> Callable[..., None]:
    """``of_two_ranks(checkpoint, rows_per_step=2)``: make it one that two ranks wrote, of which the second holds no
    part."""

    def rewrite(checkpoint: Path, **changed: int) -> None:
        def entry(name: str) -> dict[str, int | str]:
            content = (checkpoint / name).read_bytes()
            return {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}

        state = json.loads((checkpoint / "state.json").read_text())
        (checkpoint / "state.json").write_text(json.dumps(state | {"ranks": 2, **changed}))
        save_file({}, checkpoint / "rank-00001.safetensors")
        record = json.loads((checkpoint / "rank-00000.json").read_text())
        (checkpoint / "rank-00001.json").write_text(json.dumps(record | {"file": entry("rank-00001.safetensors")}))
        names = {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
        (checkpoint / "manifest.json").write_text(json.dumps({name: entry(name) for name in names}))

    return rewrite


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(kib)``: a folder with so little room."""
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("needs mount")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


@pytest.fixture(scope="module", autouse=True)
def _drafts_of_pictures() -> Iterator[None]:
    drafts.draw_drafts()
    yield
    drafts.draw_in_full()


@pytest.fixture
def rendered() -> Iterator[None]:
    """Pictures of runs in this process are what a user sees."""
    drafts.draw_in_full()
    yield
    drafts.draw_drafts()


@pytest.fixture
def world() -> World:
    """A process group of this process alone."""
    return init_world()


@pytest.fixture(autouse=True)
def _no_ranks_left_behind() -> Iterator[None]:
    """A run in this process says in the environment which rank it is; the next one must not read it."""
    yield
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
