"""``--offline`` uses no network, and a hub that cannot be reached is found out by one try."""

import re
import socket
import sys

import pytest
from huggingface_hub import constants

from refilled import network
from refilled.cli.app import main

NOWHERE = "http://192.0.2.1"  # reserved for documentation: nobody answers
DISTIL = ["distill", "digits:5-9", "--student", "wrn_10_1", "--epochs", "1", "--shots", "4", "--quiet", "--teacher"]
NEED_THE_HUB = {
    "timm": [*DISTIL, "timm/resnet10t"],
    "transformers": [*DISTIL, "hf:nobody/nothing"],
    "datasets": ["train", "hub:nobody/nothing"],
    "embed": ["embed", "timm/resnet10t", ".", "--out", "table.csv"],
    "teachers": ["teachers", "digits:5-9", "--candidates", "timm/resnet10t", "--quiet"],
    "few-shot": ["fewshot", "--data", "digits", "--teacher", "timm/resnet10t", "--quiet"],
}


@pytest.fixture
def connections(monkeypatch, tmp_path):
    """Record the tries to connect, which all fail; nothing is in the cache of the hub."""
    tried: list[object] = []

    def connect(self, address):
        tried.append(address)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in (*network.VARIABLES, "WANDB_MODE"):
        monkeypatch.setenv(name, "")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)
    network._fault_lately.cache_clear()
    yield tried
    network._fault_lately.cache_clear()


def said_by(capsys, *arguments: str) -> str:
    sys.argv = ["refilled", *arguments]
    with pytest.raises(SystemExit) as end:
        main()
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert end.value.code == 2, said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("arguments", NEED_THE_HUB.values(), ids=NEED_THE_HUB)
def test_a_hub_that_cannot_be_reached_is_asked_once(connections, capsys, arguments):
    said = said_by(capsys, *arguments)
    assert len(connections) == 1
    assert f"{NOWHERE} cannot be reached" in said
    assert "Network is unreachable" in said


@pytest.mark.slow
@pytest.mark.parametrize("arguments", NEED_THE_HUB.values(), ids=NEED_THE_HUB)
def test_offline_tries_no_connection(connections, capsys, arguments):
    said = said_by(capsys, arguments[0], "--offline", *arguments[1:])
    assert not connections
    assert "--offline or REFILLED_OFFLINE is set" in said


@pytest.mark.parametrize("name", network.VARIABLES)
def test_the_environment_forbids_the_network_too(connections, capsys, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    said = said_by(capsys, *NEED_THE_HUB["timm"])
    assert not connections
    assert "is set" in said
    assert "timm/resnet10t:FILE.safetensors" in said


def test_cifar100_is_not_downloaded_offline(connections, capsys, tmp_path):
    said = said_by(capsys, "--offline", "train", "cifar100:0-4", "--data-root", str(tmp_path))
    assert not connections
    assert "downloads are off" in said


def test_the_libraries_may_download_again_once_the_hub_answers(connections, monkeypatch):
    with network.hub() as reason:
        assert reason is not None
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    network._fault_lately.cache_clear()
    monkeypatch.setattr(network, "fault_of", lambda url: None)
    with network.hub() as reason:
        assert reason is None
        assert not constants.HF_HUB_OFFLINE
