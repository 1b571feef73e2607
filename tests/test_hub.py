"""Reading what has a Hub id where the Hub does not answer."""

import shutil
import socket
import threading
import time
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import resources

import pytest
from huggingface_hub import constants, is_offline_mode

from sparsetrain import hub
from sparsetrain.cli import main
from sparsetrain.modeling.places import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def nobody_asked(monkeypatch):
    """A process that has not asked yet, of a user who has set no mode, and a Hub at a port where nobody listens."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_offline_by_us", False)
    monkeypatch.setattr(hub, "_asked_at", None)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{_free_port()}")


@contextmanager
def _hub(port=0):
    """A Hub that has nothing."""

    class Nothing(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", port), Nothing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _free_port():
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _seconds(*arguments):
    begin = time.monotonic()
    code = main(arguments)
    return code, time.monotonic() - begin


def test_a_mistyped_model_is_refused_in_seconds_without_a_network(capsys, caplog):
    code, seconds = _seconds("generate", "no/such-model", "--prompt", "x")
    # huggingface_hub alone tries for 46 seconds.
    assert code == 2
    assert seconds < 20
    assert "check its spelling" in capsys.readouterr().err
    assert f"{constants.ENDPOINT} cannot be reached (ConnectError" in caplog.text


def test_a_mistyped_dataset_is_refused_in_seconds_without_a_network(tmp_path, capsys):
    code, seconds = _seconds(
        *("run", "quickstart", "data.sources=[{path: no/such-data}]", "--output", str(tmp_path / "run"))
    )
    assert code == 2
    assert seconds < 20
    assert "Check the id, subset and split" in capsys.readouterr().err


def test_a_cached_model_is_used_in_seconds_without_a_network(tmp_path, monkeypatch, capsys):
    held = tmp_path / "models--org--tiny"
    shutil.copytree(resources.files("sparsetrain") / "assets/tiny", held / "snapshots" / COMMIT)
    (held / "refs").mkdir()
    (held / "refs/main").write_text(COMMIT)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path))
    # Files that it need not have, huggingface_hub alone looks for in 200 seconds.
    code, seconds = _seconds("generate", "org/tiny", "--prompt", "def ", "--max-new-tokens", "2")
    assert code == 0
    assert seconds < 20
    assert "2 new tokens" in capsys.readouterr().err


def test_a_hub_that_answers_is_asked_for_files(monkeypatch, caplog):
    with _hub() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert resolve("org/name", "model.path") == "org/name"
    assert not is_offline_mode()
    assert not caplog.records


def test_a_hub_that_is_back_is_asked_again(monkeypatch):
    resolve("org/name", "model.path")
    assert is_offline_mode()
    monkeypatch.setattr(hub, "VALID", 0.0)
    with _hub(int(constants.ENDPOINT.rsplit(":", 1)[1])):
        resolve("org/name", "model.path")
    assert not is_offline_mode()


def test_the_mode_that_a_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with _hub() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        resolve("org/name", "model.path")
    assert is_offline_mode()


def test_a_local_folder_asks_nobody(tmp_path):
    resolve(str(tmp_path), "model.path")
    assert hub._asked_at is None
