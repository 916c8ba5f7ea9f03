"""Saved states survive crashes and damage, or say so."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refilled.errors import CheckpointError, RunError
from refilled.files import write_atomic
from refilled.training.checkpoints import LAST, PREVIOUS, discard_states, hold, load_state, save_state
from soak import repetitions


def state(number):
    return {"weight": torch.full((3, 2), float(number)), "random": torch.arange(5, dtype=torch.uint8)}, {
        "number": number
    }


def test_a_state_survives_a_round_trip(tmp_path):
    assert load_state(tmp_path) == (None, [])
    tensors, data = state(1)
    save_state(tmp_path, tensors, data)
    loaded, problems = load_state(tmp_path)
    assert problems == []
    assert loaded.data == data
    assert loaded.tensors.keys() == tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensors[name]) for name in tensors)


@pytest.mark.slow
@settings(max_examples=repetitions("R5"), deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_state_is_detected_and_the_previous_one_is_used(tmp_path_factory, where, bit, cut):
    folder = tmp_path_factory.mktemp("run")
    save_state(folder, *state(1))
    save_state(folder, *state(2))
    content = bytearray((folder / LAST).read_bytes())
    place = int(where * len(content))
    content[place] ^= 1 << bit
    (folder / LAST).write_bytes(content[:place] if cut else content)
    loaded, problems = load_state(folder)
    assert loaded.data == {"number": 1}
    assert "damaged" in problems[0]
    assert LAST in problems[0]


def test_if_all_states_are_damaged_the_error_names_them(tmp_path):
    save_state(tmp_path, *state(1))
    save_state(tmp_path, *state(2))
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{LAST}.*{PREVIOUS}.*--overwrite"):
        load_state(tmp_path)


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "link"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_crash_at_any_point_of_a_save_leaves_this_or_the_previous_state_whole(tmp_path, monkeypatch, call, nth):
    save_state(tmp_path, *state(1))
    save_state(tmp_path, *state(2))
    seen = 0

    def crashing(original):
        def crash(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == nth:
                raise OSError("no space left")
            return original(*args, **kwargs)

        return crash

    owner = type(tmp_path) if call in ("open", "replace") else os
    monkeypatch.setattr(owner, call, crashing(getattr(owner, call)))
    try:
        save_state(tmp_path, *state(3))
        finished = True
    except OSError:
        finished = False
    monkeypatch.undo()
    loaded, problems = load_state(tmp_path)
    assert problems == []
    assert loaded.data["number"] in ((3,) if finished else (2, 3))


def test_a_failed_write_leaves_only_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.slow
def test_only_one_process_holds_a_folder(tmp_path):
    script = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from refilled.training.checkpoints import hold
        with hold(Path({str(tmp_path)!r})):
            print("held", flush=True)
            sys.stdin.read()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by process {other.pid}"), hold(tmp_path):
            pass
        other.kill()
        other.wait()
    with hold(tmp_path):  # a killed process holds nothing
        pass


@pytest.mark.slow
def test_only_one_of_two_commands_on_a_folder_trains(tmp_path):
    for number in range(repetitions("R4")):
        out = str(tmp_path / str(number))
        tiny = ["digits:0-4", "--model", "wrn_10_1", "--shots", "4", "--epochs", "1", "--threads", "1", "--out", out]
        command = [sys.executable, "-W", "ignore", "-m", "refilled", "train", *tiny]
        both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        said = {process.pid: process.communicate(timeout=120)[1] for process in both}
        codes = {process.pid: process.returncode for process in both}
        assert sorted(codes.values()) == [0, 2], said
        (winner,) = (pid for pid, code in codes.items() if code == 0)
        (loser,) = codes.keys() - {winner}
        told = " ".join(said[loser].split())
        assert f"process {winner}" in told or "finished run" in told
        assert "Traceback" not in told
        assert (tmp_path / str(number) / "DONE").exists()


def test_discarding_removes_states_and_leftovers_only(tmp_path):
    save_state(tmp_path, *state(1))
    save_state(tmp_path, *state(2))
    (tmp_path / ".last.ckpt.123.tmp").write_bytes(b"torn")
    (tmp_path / "result.json").write_text("{}")
    discard_states(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
