from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from matplotlib.figure import Figure

from sparsetrain.recipe.schema import Recipe
from sparsetrain.training.output import wandb_run
from sparsetrain.training.output.system import SystemUse
from sparsetrain.training.output.tracking import Tracker
from sparsetrain.training.output.wandb_run import find_wandb_login


def recipe(mode: str = "auto") -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny-power",
            "model": {"path": "sparsetrain:tiny"},
            "attention": {"method": "power", "block": 32},
            "data": {"sources": [{"synthetic": "passkey"}]},
            "sequence": {"length": 512},
            "train": {"steps": 10, "lr": 1e-3},
            "wandb": {"mode": mode, "tags": ["test"]},
        }
    )


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch, tmp_path):
    """A machine where W&B was never used, and a working directory to keep clean."""
    for name in os.environ:
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    wandb.teardown()
    yield
    wandb.teardown()
    assert list((tmp_path / "cwd").iterdir()) == [], "nothing may be left in the working directory"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def server(monkeypatch):
    """Enough of a W&B server to start a run; ``alive.clear()`` makes it accept requests and never answer."""
    state = SimpleNamespace(queries=[], alive=threading.Event(), status=200)
    state.alive.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
            while not state.alive.is_set():
                time.sleep(0.1)
            state.queries.append(query)
            name = query.get("variables", {}).get("name")
            run = {"id": "x", "name": name, "displayName": name, "config": "{}", "historyLineCount": 0}
            run["project"] = {"id": "p", "name": "sparsetrain", "entity": {"id": "e", "name": "someone"}}
            data = {"upsertBucket": {"bucket": run, "inserted": True}, "viewer": {"id": "v", "entity": "someone"}}
            data["createRunFiles"] = {"runID": "x", "uploadHeaders": [], "files": []}
            body = json.dumps({"data": {**data, "model": None, "serverInfo": None}}).encode()
            self.send_response(state.status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{http.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    yield state
    wandb.teardown()
    state.alive.set()
    http.shutdown()
    http.server_close()


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_lines_of_json_on_disk_at_once(tmp_path):
    tracker = Tracker(recipe("disabled"), tmp_path / "run", rank=0)
    tracker.log({"loss": torch.tensor(2.5), "lr": np.float32(0.5), "tokens": 4096}, step=1)
    tracker.log({"loss": float("nan")}, step=2)
    assert metrics(tmp_path / "run") == [
        {"step": 1, "loss": 2.5, "lr": 0.5, "tokens": 4096},
        {"step": 2, "loss": None},
    ]
    assert tracker.run_id is None
    tracker.finish()
    tracker.finish()
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_resumed_run_drops_the_steps_it_will_repeat(tmp_path):
    tracker = Tracker(recipe("disabled"), tmp_path, rank=0)
    for step in (1, 2, 3, 4):
        tracker.log({"loss": step}, step)
    tracker.finish()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    tracker = Tracker(recipe("disabled"), tmp_path, rank=0)
    tracker.rewind(2)
    tracker.log({"loss": 30}, 3)
    tracker.finish()
    assert [(line["step"], line["loss"]) for line in metrics(tmp_path)] == [(1, 1), (2, 2), (3, 30)]


def test_other_ranks_write_nothing(tmp_path, said):
    tracker = Tracker(recipe("offline"), tmp_path, rank=1, resume_id="abc", say=said.append)
    tracker.log({"loss": 1.0}, 1)
    tracker.image("report", tmp_path / "none.png", 1)
    tracker.summary({"x": 1})
    tracker.rewind(0)
    tracker.finish()
    assert list(tmp_path.glob("*.jsonl")) == []
    assert said == []


def test_without_a_login_a_run_is_recorded_offline(tmp_path, said):
    tracker = Tracker(recipe("auto"), tmp_path / "run", rank=0, say=said.append)
    tracker.log({"loss": 2.5}, 1)
    picture = tmp_path / "report.png"
    Figure(figsize=(1, 1)).savefig(picture)
    tracker.image("report", picture, 1)
    tracker.summary({"passkey": 0.5})
    tracker.finish()
    wandb.teardown()  # W&B's own process writes the file, and may still be at it
    assert len(said) == 2
    assert "no login found" in said[0]
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert str(folder) in said[1]
    assert tracker.run_id in folder.name
    assert list(folder.glob("files/media/images/report_*.png"))
    recorded = next(folder.glob("*.wandb")).read_bytes()
    assert b"loss" in recorded
    assert b"tiny-power" in recorded
    assert b"passkey" in recorded


def test_an_offline_run_keeps_its_id_when_resumed(tmp_path, said):
    first = Tracker(recipe("offline"), tmp_path, rank=0, say=said.append)
    first.finish()
    second = Tracker(recipe("offline"), tmp_path, rank=0, resume_id=first.run_id, say=said.append)
    second.finish()
    assert second.run_id == first.run_id is not None
    assert not any("warning" in text for text in said)


def test_online_the_run_is_continued_with_the_recipe_as_config(tmp_path, said, server):
    tracker = Tracker(recipe("auto"), tmp_path, rank=0, resume_id="abc123", say=said.append)
    tracker.log({"loss": 2.5}, 1)
    tracker.finish()
    assert tracker.run_id == "abc123"
    assert [text.partition(" ")[0] for text in said] == ["W&B:"]
    upsert = next(q["variables"] for q in server.queries if "UpsertBucket" in q.get("query", ""))
    assert upsert["name"] == "abc123"
    assert upsert["project"] == "sparsetrain"
    config = json.loads(upsert["config"])
    assert config["attention"]["value"]["block"] == 32
    assert config["train"]["value"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "refuses the login; `wandb login --relogin`"), (500, "gave no usable answer within 2 seconds")],
)
def test_a_server_that_answers_with_an_error_is_told_from_one_that_refuses_the_key(
    tmp_path, said, server, monkeypatch, status, reason
):
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT", 2.0)
    server.status = status
    began = time.monotonic()
    tracker = Tracker(recipe("auto"), tmp_path, rank=0, say=said.append)
    tracker.log({"loss": 2.5}, 1)
    tracker.finish()
    assert time.monotonic() - began < 20
    assert reason in said[0]
    assert os.environ["WANDB_BASE_URL"] in said[0]
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert said[1] == f"W&B: offline; upload later with `wandb sync {folder}`"
    assert len(said) == 2


def test_a_server_that_is_not_there_costs_a_bounded_time(tmp_path, said, server, monkeypatch):
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT", 2.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    began = time.monotonic()
    tracker = Tracker(recipe("auto"), tmp_path, rank=0, say=said.append)
    tracker.finish()
    assert time.monotonic() - began < 20
    assert "gave no usable answer within 2 seconds" in said[0]
    assert "wandb sync" in said[1]


def test_a_server_that_does_not_answer_costs_a_bounded_time_at_the_start(tmp_path, said, server, monkeypatch):
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT", 1.0)
    server.alive.clear()
    began = time.monotonic()
    tracker = Tracker(recipe("online"), tmp_path, rank=0, resume_id="abc123", say=said.append)
    tracker.log({"loss": 2.5}, 1)
    tracker.finish()
    assert time.monotonic() - began < 20
    assert "cannot be used online" in said[0]
    assert "offline" in said[1]
    assert len(said) == 2
    assert tracker.run_id == "abc123"
    assert list((tmp_path / "wandb").glob("offline-run-*-abc123*"))


def test_a_server_that_goes_away_costs_a_bounded_time_at_the_end(tmp_path, said, server, monkeypatch):
    monkeypatch.setattr(wandb_run, "FINISH_TIMEOUT", 1.0)
    tracker = Tracker(recipe("online"), tmp_path, rank=0, say=said.append)
    server.alive.clear()
    began = time.monotonic()
    tracker.log({"loss": 2.5}, 1)
    tracker.finish()
    assert time.monotonic() - began < 20
    assert metrics(tmp_path) == [{"step": 1, "loss": 2.5}]
    (folder,) = (tmp_path / "wandb").glob("run-*")
    assert f"`wandb sync {folder}`" in said[0]


def test_a_refused_key_is_no_reason_to_stop(tmp_path, said, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    tracker = Tracker(recipe("online"), tmp_path, rank=0, say=said.append)
    tracker.finish()
    assert "API key" in said[0]
    assert tracker.run_id is not None


def test_a_missing_package_is_no_reason_to_stop(tmp_path, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Tracker(recipe("online"), tmp_path, rank=0, say=said.append)
    tracker.log({"loss": 2.5}, 1)
    tracker.finish()
    assert len(said) == 1
    assert "metrics go only to" in said[0]
    assert len(metrics(tmp_path)) == 1


def test_a_failure_on_the_way_is_told_once(tmp_path, said):
    tracker = Tracker(recipe("offline"), tmp_path, rank=0, say=said.append)
    wandb.run.finish()
    said.clear()
    for step in (1, 2, 3):
        tracker.log({"loss": 2.5}, step)
    tracker.finish()
    assert len(said) == 1
    assert "from here on" in said[0]
    assert len(metrics(tmp_path)) == 3


def test_auto_follows_the_mode_that_wandb_is_set_to(tmp_path, said, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker(recipe("auto"), tmp_path, rank=0, say=said.append)
    tracker.finish()
    assert said == []
    assert not (tmp_path / "wandb").exists()


def test_logins_are_found_where_wandb_looks(tmp_path, monkeypatch):
    assert find_wandb_login() is None
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine api.example.com login user password 0\n")
    assert find_wandb_login() is None
    netrc.write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    assert find_wandb_login() == "~/.netrc"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert find_wandb_login() == "WANDB_API_KEY"


def test_tensorboard_gets_the_same_and_a_resumed_run_replaces_later_steps(tmp_path, said):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boarded = recipe("disabled").model_copy(update={"tracking": ["tensorboard"]})
    for steps, resumed_at in ((range(1, 5), -1), (range(3, 5), 2)):
        tracker = Tracker(boarded, tmp_path / "run", rank=0, say=said.append)
        tracker.rewind(resumed_at)
        for step in steps:
            tracker.log({"loss": 10.0 * len(steps) + step}, step)
        tracker.log({"finished": 1.0, "planned_steps": 4.0}, 4)
        tracker.text("first row", "a *row*\nof two lines", steps[0])
        tracker.finish()
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"], "what is kept for `sparsetrain runs` is no chart"
    assert metrics(tmp_path / "run")[-1] == {"step": 4, "finished": 1.0, "planned_steps": 4.0}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 41), (2, 42), (3, 23), (4, 24)]
    (shown,) = events.Tensors("first row/text_summary")[-1].tensor_proto.string_val
    assert shown == b"    a *row*\n    of two lines"
    assert said == []


def test_what_the_machine_uses_is_read_and_what_cannot_be_read_is_left_out(monkeypatch):
    said: list[str] = []
    cpu = {"system/cpu_percent", "system/memory_gb", "system/process_cpu_percent", "system/process_memory_gb"}
    found = SystemUse(torch.device("cpu"), said.append).metrics()
    assert found.keys() == cpu
    assert found["system/memory_gb"] > found["system/process_memory_gb"] > 0.1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 10**9, 10 * 10**9))
    monkeypatch.setattr("sparsetrain.training.output.system.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 97)
    use = SystemUse(torch.device("cuda"), said.append)
    assert [use.metrics()[f"system/{name}"] for name in ("gpu_memory_gb", "gpu_percent")] == [7.0, 97.0]
    assert said == []
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 1 / 0)
    assert [use.metrics().keys() for _ in range(2)] == [cpu | {"system/gpu_memory_gb"}] * 2
    assert said == ["warning: system/gpu_percent cannot be read (ZeroDivisionError: division by zero); it is left out"]


def test_a_checkpoint_becomes_an_artifact(tmp_path, said):
    uploading = recipe("offline")
    uploading = uploading.model_copy(update={"wandb": uploading.wandb.model_copy(update={"artifacts": True})})
    tracker = Tracker(uploading, tmp_path / "run", rank=0, say=said.append)
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002/state.json").write_text("{}")
    logged = []
    log = tracker._wandb.log_artifact

    def note(artifact, aliases):
        logged.append((artifact, aliases))
        return log(artifact, aliases=aliases)

    tracker._wandb.log_artifact = note
    tracker.artifact(tmp_path / "step-000002")
    tracker.finish()
    ((artifact, aliases),) = logged
    assert (artifact.type, aliases) == ("checkpoint", ["latest", "step-000002"])
    assert list(artifact.manifest.entries) == ["state.json"]
    assert not [line for line in said if "warning" in line]
