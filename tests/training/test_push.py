"""A run is published: its card says what the model is, without folders of this machine, and the Hub gets it all."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from made_runs import make_run
from safetensors.torch import load_file

import sparsetrain
from sparsetrain.cli import main
from sparsetrain.recipe import load_recipe
from sparsetrain.training.output.model_card import model_card


class Hub(ThreadingHTTPServer):
    """The part of the Hub's interface that a push needs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict] = {}
        self.asked: list[str] = []
        self.fails = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def say(self, content: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name = self.path.partition("?")[0].removeprefix("/api/models/").partition("/revision/")[0]
        if (found := self.server.repositories.get(name)) is None:
            self.say({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        else:
            siblings = [{"rfilename": file} for file in found["files"]]
            self.say({"id": name, "private": found["private"], "siblings": siblings, "tags": [], "downloads": 0})

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            private = asked["private"] if "private" in asked else asked["visibility"] == "private"
            self.server.repositories[f"{asked['organization']}/{asked['name']}"] = {"private": private, "files": {}}
            self.say({"url": f"{self.server.address}/{asked['organization']}/{asked['name']}"})
        elif self.server.fails:
            self.say({"error": "no"}, 403)
        elif "/preupload/" in self.path:
            sent = {"uploadMode": "regular", "shouldIgnore": False}
            self.say({"files": [{"path": each["path"], **sent} for each in json.loads(content)["files"]]})
        elif "/commit/" in self.path:
            name = re.match("/api/models/(.+?/.+?)/", self.path)[1]
            for line in map(json.loads, content.decode().splitlines()):
                if line["key"] == "file":
                    held = self.server.repositories[name]["files"]
                    held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = "0" * 40
            self.say(
                {"success": True, "commitOid": commit, "commitUrl": f"{self.server.address}/{name}/commit/{commit}"}
            )
        else:
            self.say({})


@pytest.fixture
def hub(monkeypatch):
    """A Hub of this machine, where somebody is logged in."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()


@pytest.fixture
def finished(tmp_path, stages):
    return shutil.copytree(stages(1)[2].path, tmp_path / "finished")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flags", [[], ["--public"]])
def test_a_push_makes_a_private_repository_with_every_file(finished, hub, tmp_path, capsys, flags):
    assert main(["export", str(finished), str(tmp_path / "out"), "--push", "org/model", *flags]) == 0
    assert hub.repositories["org/model"] == {"private": not flags, "files": files(tmp_path / "out")}
    assert f"{hub.address}/org/model ({'public' if flags else 'private'})" in capsys.readouterr().out


def test_a_dry_run_writes_the_folder_and_asks_nobody(finished, hub, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(finished), str(out), "--push", "org/model", "--dry-run", "--license", "apache2"]) == 0
    assert hub.asked == []
    said = capsys.readouterr().out
    assert "would make org/model (private) and send:" in said
    assert "judges apache2 when it is sent: https://huggingface.co/docs/hub/repositories-licenses" in said
    assert all(name in said for name in files(out))
    assert f"hf upload org/model {out} . --private" in said
    card = (out / "README.md").read_text()
    assert 'sparsetrain generate org/model --prompt "' in card
    assert "hf download" not in card


@pytest.mark.parametrize(
    ("held", "flags", "said"),
    [
        ({"private": True, "files": {"model.safetensors": b""}}, [], "it exists and holds model.safetensors"),
        ({"private": False, "files": {}}, [], "it exists and is public; add --public"),
        ({"private": True, "files": {".gitattributes": b""}}, ["--public"], "it exists and is private; leave --public"),
    ],
)
def test_a_repository_that_holds_files_or_is_seen_by_others_is_left_alone(
    finished, hub, tmp_path, refused, held, flags, said
):
    hub.repositories["org/model"] = {**held}
    assert said in refused("export", str(finished), str(tmp_path / "out"), "--push", "org/model", *flags)
    assert hub.repositories["org/model"] == held
    assert not (tmp_path / "out").exists()


def test_a_push_that_fails_keeps_the_folder_and_says_how_to_go_on(finished, hub, tmp_path, refused):
    hub.fails = True
    out = tmp_path / "out"
    error = refused("export", str(finished), str(out), "--push", "org/model")
    assert f"{out} is complete, but it was not pushed to org/model: " in error
    assert f"then hf upload org/model {out} ." in error
    sparsetrain.load(out)


def test_what_cannot_be_pushed_or_has_no_effect_is_refused(finished, hub, tmp_path, refused, monkeypatch):
    export = ["export", str(finished), str(tmp_path / "out")]
    for flags, said in (
        (["--push", "model"], "does not say whose it is; give ORG/NAME"),
        (["--push", "a/b/c"], "--push a/b/c: "),
        (["--public"], "--public has no effect without --push"),
        (["--dry-run"], "--dry-run has no effect without --push"),
        (["--dtype", "q4_k_m"], "--dtype q4_k_m is not known; choose one of float32, bfloat16, float16"),
        (["--license", "My License"], "is no identifier of the Hub"),
    ):
        assert said in refused(*export, *flags)
    assert "there is no export to GGUF: llama.cpp" in refused("export", str(finished), str(tmp_path / "model.gguf"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "nobody is logged in to the Hub" in refused(*export, "--push", "org/model")
    assert hub.asked == []
    assert not (tmp_path / "out").exists()


def test_weights_are_written_in_another_dtype(finished, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(finished), str(out), "--dtype", "bfloat16"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (finished / "final", out))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(after[name].equal(tensor.bfloat16()) for name, tensor in before.items())
    assert sparsetrain.load(out).dtype == torch.bfloat16


def test_the_card_has_license_base_data_and_metrics_and_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\nlicense: llama3.2\n---\n")
    sources = [{"path": str(tmp_path / "secret/books.jsonl")}, {"path": "org/set"}, {"synthetic": "passkey"}]
    run = make_run(tmp_path / "run", f"data.sources={json.dumps(sources)}", "model.path=base")
    recipe = load_recipe(run / "recipe.yaml").recipe
    (run / "report.md").write_text(f"# x\n\nText: {tmp_path}/secret/books.jsonl, by {run}\n")
    card = model_card(recipe, run, adapters=True, repository="me/adapters")
    head = ModelCard(card).data
    assert str(tmp_path) not in card
    assert (head.license, head.datasets, head.base_model) == ("llama3.2", ["org/set"], None)
    measured = {result.metric_name: result.metric_value for result in head.eval_results}
    assert measured["passkey"] == 0.875
    assert "`books.jsonl`, local files" in card
    assert "passkey prompts, generated" in card
    assert "path: /path/to/books.jsonl" in card
    assert "hf download me/adapters --local-dir adapters\nsparsetrain generate adapters --prompt" in card
    assert ModelCard(model_card(recipe, run, "org/base", adapters=True, license="mit")).data.base_model == "org/base"
