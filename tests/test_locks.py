"""Locks hold between processes, also in the form that Windows has."""

import subprocess
import sys
import textwrap

import pytest

# Windows's locks by those of this system, in a process that has no fcntl to import.
WINDOWS = """
import fcntl, multiprocessing.util, os, subprocess, sys, tempfile, types
def locking(descriptor, mode, length):
    where = os.lseek(descriptor, 0, os.SEEK_CUR)
    fcntl.lockf(descriptor, fcntl.LOCK_UN if mode == 0 else fcntl.LOCK_EX | fcntl.LOCK_NB, length, where)
sys.modules["msvcrt"] = types.SimpleNamespace(LK_UNLCK=0, LK_NBLCK=2, locking=locking)
sys.modules["fcntl"] = None
"""
systems = pytest.mark.parametrize(
    "system", ["", pytest.param(WINDOWS, marks=pytest.mark.skipif(sys.platform == "win32", reason="it is Windows"))],
    ids=["this", "windows"],
)  # fmt: skip


def python(system: str, code: str, *arguments: str) -> subprocess.Popen[str]:
    program = system + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@systems
@pytest.mark.parametrize("byte", [None, 0, 7])
def test_a_lock_is_held_until_it_is_released_or_its_process_is_killed(system, byte, tmp_path):
    path = str(tmp_path / ".lock")
    holding = f"""
        import sys
        from refilled.locks import lock, unlock
        with open(sys.argv[1], "a+") as file:
            lock(file, {byte})
            print("held", flush=True)
            sys.stdin.readline()
            if {byte} is not None:
                unlock(file, {byte})
                print("released", flush=True)
                sys.stdin.readline()
    """
    asking = f"""
        import sys
        from refilled.locks import lock
        with open(sys.argv[1], "a+") as file:
            print(lock(file, {byte}, wait=False), lock(file, 99, wait=False) if {byte} is not None else "")
    """
    waiting = f"""
        import sys
        from refilled.locks import lock
        with open(sys.argv[1], "a+") as file:
            print(lock(file, {byte}))
    """

    def asked() -> str:
        return python(system, asking, path).communicate(timeout=60)[0].strip()

    with python(system, holding, path) as holder:
        assert holder.stdout.readline() == "held\n"
        assert asked() == ("False True" if byte is not None else "False")
        if byte is not None:
            holder.stdin.write("\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == "released\n"
            assert asked() == "True True"
        waiter = python(system, waiting, path)
        holder.kill()
        assert waiter.communicate(timeout=60)[0] == "True\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="it is Windows")
def test_training_and_prediction_need_no_call_that_windows_lacks(tmp_path):
    program = WINDOWS + "from refilled.cli.app import main\nmain()"

    def refilled(*arguments: str) -> None:
        subprocess.run([sys.executable, "-W", "ignore", "-c", program, *arguments], cwd=tmp_path, check=True)

    tiny = [
        "--teacher",
        "refilled/letters",
        "--student",
        "wrn_10_1",
        "--preset",
        "good",
        "--shots",
        "4",
        "--views",
        "2",
    ]
    refilled("distill", "digits:5-9", *tiny, "--epochs", "1", "--threads", "1", "--quiet", "--out", "run")
    refilled("evaluate", "run")
    assert (tmp_path / "run" / "DONE").exists()
