"""A run that is asked to stop says so at once, loses nothing, and can be resumed, whatever it is doing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sparsetrain.cli import main
from sparsetrain.training import run as training
from sparsetrain.training.output import evaluations
from sparsetrain.training.supervision import signals
from sparsetrain.training.supervision.signals import Outcome, Stopped, StopSignals

EVALUATION = (
    "eval={every: 2, at_start: false, at_end: true, tasks: [{task: passkey, lengths: [160], depths: 2, trials: 2}]}"
)

# Ranks are asked to stop while they load their models.
ASKED = """
import os, signal, sys, time
from sparsetrain.cli import main
from sparsetrain.training import run

def load(*arguments, **options):
    if os.environ["RANK"] in sys.argv[3]:
        time.sleep(0.5)
        os.kill(os.getpid(), int(sys.argv[4]))
    time.sleep(60)

run.load_model = load
sys.exit(main(["run", sys.argv[1], "--output", sys.argv[2]]))
"""


@pytest.fixture(autouse=True)
def _not_under_nohup():
    """A run that nohup started ignores SIGHUP, and so would it here if nohup had started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def arguments(tiny, tmp_path):
    """``arguments(*overrides)``: the command of a run of four steps, evaluated every other step and at the end."""

    def command(*overrides):
        return ["run", str(tiny), "train.steps=4", EVALUATION, *overrides, "--output", str(tmp_path / "run")]

    return command


@pytest.fixture
def ask(monkeypatch):
    """``ask(name, number, after=1)``: send this process a signal in the n-th call of a function that the run makes."""

    def patch(name, number, after=1):
        original, calls = getattr(training, name), iter(range(1, 1000))

        def asked(*given, **options):
            if next(calls) == after:
                signal.raise_signal(number)
            return original(*given, **options)

        monkeypatch.setattr(training, name, asked)

    return patch


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 0)]
)
@pytest.mark.parametrize("where", ["load_model", "build_rows"])
def test_before_training_it_ends_where_it_is(arguments, ask, capfd, where, number, code):
    handler = signal.getsignal(number)
    ask(where, number)
    assert main(arguments()) == code
    said = capfd.readouterr().err
    assert "stopping now (" in said
    assert "Traceback" not in said
    assert signal.getsignal(number) == handler


def test_a_request_that_a_library_swallows_is_heeded_all_the_same(arguments, monkeypatch, tmp_path):
    original = training.build_rows

    def swallowing(*given, **options):
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        return original(*given, **options)

    monkeypatch.setattr(training, "build_rows", swallowing)
    monkeypatch.setattr(signals, "PATIENCE", 300.0)
    assert main(arguments("eval.at_start=true")) == 75
    assert not (tmp_path / "run/evaluation.json").exists()


def stop_in_evaluation(monkeypatch, number, which):
    """Send a signal after the first batch of the n-th evaluation."""
    original, count, batches = evaluations.evaluate, iter(range(1, 100)), []

    def evaluate(*given, on_progress, **options):
        asked = next(count) == which

        def progress(done, total):
            batches.append((which, done, total))
            if asked and done == 1:
                signal.raise_signal(number)
                time.sleep(0.1)  # for the thread that says so
            on_progress(done, total)

        return original(*given, on_progress=progress, **options)

    monkeypatch.setattr(evaluations, "evaluate", evaluate)
    return batches


@pytest.fixture(scope="module")
def uninterrupted(tiny, shared, run_folder):
    def make(folder):
        assert main(["run", str(tiny), "train.steps=4", EVALUATION, "--output", str(folder / "run")]) == 0

    return run_folder(shared("uninterrupted-evaluated", make) / "run")


@pytest.mark.parametrize(
    ("number", "code", "which", "step"),
    [(signal.SIGTERM, 75, 1, 2), (signal.SIGINT, 0, 2, 4)],
    ids=["TERM during training", "INT at the end"],
)
def test_an_evaluation_stops_at_its_next_batch_and_is_made_up_for(
    arguments, monkeypatch, tmp_path, run_folder, uninterrupted, capfd, number, code, which, step
):
    batches = stop_in_evaluation(monkeypatch, number, which)
    run = run_folder(tmp_path / "run")
    assert main(arguments()) == code
    assert batches[-1][1] == 1, "it went on"
    said = capfd.readouterr().err
    assert "stopping after this batch of the evaluation; the trained weights are saved" in said
    assert ("Ctrl-C again leaves at once" in said) == (number == signal.SIGINT)
    assert "--resume" in said
    assert run.checkpoints == [f"step-{step:06d}"]

    monkeypatch.undo()
    assert main([*arguments(), "--resume"]) == 0
    assert run.values("loss") == uninterrupted.values("loss")
    results = [json.loads((each.path / "evaluation.json").read_text()) for each in (run, uninterrupted)]
    assert results[0] == results[1]
    evaluated = [[line["step"] for line in each.lines if "eval/passkey" in line] for each in (run, uninterrupted)]
    assert evaluated[0] == evaluated[1] == [2, 4]


def test_a_stop_during_the_export_comes_after_it(arguments, monkeypatch, tmp_path, run_folder, capfd):
    original = training.export

    def asked(*given, whole=False, **options):
        if whole:
            signal.raise_signal(signal.SIGTERM)
        return original(*given, whole=whole, **options)

    monkeypatch.setattr(training, "export", asked)
    run = run_folder(tmp_path / "run")
    assert main(arguments("train.steps=2")) == 75
    assert run.weights
    assert not (run.path / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("asked", "number", "code"), [("1", signal.SIGUSR1, 75), ("1", signal.SIGINT, 0), ("01", signal.SIGINT, 0)]
)
def test_ranks_stop_together_before_training(tiny, tmp_path, ranks_of, asked, number, code):
    command = ["-c", ASKED, str(tiny), str(tmp_path / "run"), asked, str(int(number))]
    began = time.monotonic()
    said = ranks_of(command, tmp_path / "log", 2).wait(code)
    assert "Traceback" not in said
    assert "error" not in said
    assert time.monotonic() - began < 55


def test_a_second_ctrl_c_interrupts():
    with StopSignals() as stop:
        stop.hold()
        signal.raise_signal(signal.SIGINT)
        assert stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_ctrl_c_that_another_rank_got_too_is_the_same_one():
    def hear(stop):
        stop.pass_on(Outcome.INTERRUPTED)
        time.sleep(1.0)

    with StopSignals() as stop:
        with pytest.raises(Stopped) as stopped:
            hear(stop)
        signal.raise_signal(signal.SIGINT)
        assert (stopped.value.outcome, stop.interrupted, stop.preempted) == (Outcome.INTERRUPTED, True, False)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_process_that_looks_at_no_signal_is_ended(tmp_path):
    code = """
import ctypes, os, signal, sys
from sparsetrain.training.supervision import signals
signals.PATIENCE = 0.2
with signals.StopSignals() as stop:
    stop.before_exit = lambda outcome: print("told", outcome.value, flush=True)
    # The system's handler runs in another thread then, and this one hears nothing.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(30)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(1.0)  # until it sleeps
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (75, "told preempted\n")


def test_workers_die_of_a_signal_and_the_run_hears_nothing_of_it():
    with StopSignals() as stop:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert not stop.preempted
        assert stop._end_at is None


def test_outside_of_the_main_thread_it_does_nothing():
    faults = []

    def use():
        try:
            with StopSignals():
                pass
        except Exception as fault:
            faults.append(fault)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert faults == []


def catches(process, number):
    """Whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("number", "delay"), [(signal.SIGTERM, 0.0), (signal.SIGUSR1, 0.0), (signal.SIGTERM, 2.0)])
def test_a_signal_while_starting(tiny, tmp_path, number, delay):
    command = [sys.executable, "-m", "sparsetrain.cli", "run", str(tiny), "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not catches(process, number):
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Traceback" not in said
