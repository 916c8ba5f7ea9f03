"""The examination of a machine, as ``refilled doctor`` prints it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.runs import choice, doctor


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "_SECONDS", 0.0)
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("REFILLED_DATA", str(tmp_path / "images"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def examined(*arguments, code=0):
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.slow
def test_a_machine_that_works_is_described(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x").write_bytes(bytes(1000))
    before = torch.get_rng_state()
    found = json.loads(examined("--json", "--offline").stdout)
    assert torch.equal(torch.get_rng_state(), before)
    assert found["problems"] == []
    assert found["packages"]["torch"] == torch.__version__
    assert found["cache"]["bytes"] == 1000
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["x"]
    assert found["data_root"] == {"folder": str(tmp_path / "images"), "exists": False, "from": "REFILLED_DATA"}
    assert found["hub"]["reached"] is None
    assert found["threads"] == torch.get_num_threads()
    for step in found["precision"]["cpu_steps"].values():
        assert step["seconds"][step["faster"]] == min(step["seconds"].values()) > 0
    assert set(found["precision"]["cpu_steps"]) == set(doctor.NETWORKS)


@pytest.mark.slow
def test_a_missing_extra_gets_its_install_line_and_is_no_problem(monkeypatch):
    version = metadata.version

    def without_optuna(name):
        if name == "optuna":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_optuna)
    found = json.loads(examined("--json", "--offline").stdout)
    assert found["extras"]["tune"]["install"] == "pip install 'refilled[tune]'"
    assert found["extras"]["tune"]["missing"] == ["optuna>=5.0"]
    assert "dev" not in found["extras"]
    assert "refilled[tune]" in examined("--offline").stdout


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "file" / "cache"))
    found = json.loads(examined("--json", "--offline", code=1).stdout)
    assert len(found["problems"]) == 1
    assert "set REFILLED_CACHE" in found["problems"][0]
    assert "set REFILLED_CACHE" in examined("--offline", code=1).output


def test_a_package_that_cannot_be_imported_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no_such_package"))
    assert "no_such_package cannot be imported" in examined("--offline", code=1).output


@pytest.mark.parametrize("status", [200, 404])
def test_the_hub_is_asked_once_unless_offline(monkeypatch, status):
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert doctor._hub(offline=False)["reached"] is True
        assert doctor._hub(offline=True)["reached"] is None
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert doctor._hub(offline=False)["reached"] is None
        server.shutdown()
        thread.join()
    assert len(asked) == 1
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert doctor._hub(offline=False)["reached"] is False  # nobody listens there any more
