"""Trackers that cannot be reached, or are not there: one line, and the run goes on."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from transformers import TrainerCallback

from finetuning import tracking
from finetuning.command_line import read_command
from support.training import SAMPLE

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def wandb_server(monkeypatch):
    """A server that knows one key, as W&B's does: `viewer` is null for all others."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            knows = self.headers["Authorization"] == "Basic YXBpOnJpZ2h0"  # api:right
            body = json.dumps({"data": {"viewer": {"username": "me"} if knows else None}}).encode()
            self.send_response(401 if self.headers["Authorization"] == "Basic YXBpOm9sZA==" else 200)  # api:old
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
    yield server
    server.shutdown()


@pytest.fixture
def opened(monkeypatch):
    """The modes in which W&B runs were begun."""
    modes = []
    monkeypatch.setattr(
        tracking, "open_wandb", lambda *_: modes.append(tracking.os.environ.get("WANDB_MODE", "online"))
    )
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return modes


def test_a_key_that_the_server_knows_is_logged_online(wandb_server, opened, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "right")
    assert tracking.set_up(str(tmp_path), None) == ["tensorboard", "wandb"]
    assert opened == ["online"] and not capsys.readouterr().out


@pytest.mark.parametrize("key", ["wrong", "old"])
def test_a_wrong_key_is_one_line_and_files(wandb_server, opened, monkeypatch, tmp_path, capsys, key):
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert tracking.set_up(str(tmp_path), None) == ["tensorboard", "wandb"]
    assert opened == ["offline"]
    assert capsys.readouterr().out.count("\n") == 1


def test_no_network_is_one_line_within_ten_seconds(opened, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for server in ("http://127.0.0.1:9", "http://no-such-host.invalid"):
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", server)
        tracking.set_up(str(tmp_path), None)
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and f"W&B: {server} cannot be reached" in said and KEY not in said
    assert opened == ["offline", "offline"]


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE", 0.2)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # it listens, and nobody serves
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        started = time.monotonic()
        assert "timed out" in tracking.reason_against_wandb()
    assert time.monotonic() - started < 5


def test_wandb_disabled_is_one_line(opened, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert tracking.set_up(str(tmp_path), None) == ["tensorboard"]
    assert "WANDB_DISABLED" in capsys.readouterr().out and not opened


def test_other_trackers_are_refused_by_name_or_reported_to(opened, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(tracking, "wandb_key", lambda: None)
    assert tracking.set_up(str(tmp_path), None, ["mlflow"]) == ["tensorboard", "mlflow"]
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"report_to: comet_ml is not one of .*; report_to: trackio is not installed: pip"
    ):
        tracking.refuse_unknown_trackers(["comet_ml", "trackio"])


def test_a_command_and_a_recipe_take_several_trackers(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SAMPLE.read_text(encoding="utf-8") + "report_to: [mlflow, trackio]\n", encoding="utf-8")
    for words in (["--report_to", "mlflow", "trackio", "--max_steps", "1"], ["--config", str(recipe)]):
        assert read_command(SAMPLE, words)[1].report_to == ["mlflow", "trackio"]


def test_a_tracker_that_fails_is_told_once_and_the_training_goes_on(capsys):
    class FailingCallback(TrainerCallback):
        told = 0

        def on_log(self, args, state, control, **kwargs):
            FailingCallback.told += 1
            raise ConnectionError("no route to host")

    class KeptCallback(TrainerCallback):
        told = 0

        def on_log(self, args, state, control, **kwargs):
            KeptCallback.told += 1

    callback = tracking.NeverStops(FailingCallback(), KeptCallback())
    callback.on_train_begin(None, None, None)
    callback.on_log(None, None, None, logs={})
    callback.on_log(None, None, None, logs={})
    assert FailingCallback.told == 1 and KeptCallback.told == 2
    assert capsys.readouterr().out.splitlines() == [
        "Failing: told no more, because it failed (ConnectionError: no route to host). TensorBoard has the curves"
    ]
