"""Equal weights in fresh processes; what a process keeps of its memory, and what it gives back."""

import os
import platform
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from soak import repetitions

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")


@pytest.mark.slow
@glibc
def test_a_step_gets_the_memory_that_the_step_before_freed():
    code = """
import resource, torch
from refilled.runs.determinism import use_machine
use_machine(threads=1)
def step():
    blocks = [torch.ones(size, 1024, 256) for size in (1, 8, 16, 16)]  # MB
faults = []
for _ in range(10):  # the first ones settle where the blocks lie
    step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(*faults)
"""
    *_, before, _, last = map(int, _run(code).split())
    assert last - before < 100  # pages of 4 KiB, of 20,992 in the blocks of two steps


@pytest.mark.slow
@glibc
def test_kept_memory_is_given_back_on_demand():
    code = """
import re, torch
from pathlib import Path
from refilled.runs.determinism import give_memory_back, use_machine
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
use_machine(threads=1)
before = resident()
blocks = [torch.ones(16, 1024, 256) for _ in range(16)]  # 16 MB each
del blocks
kept = resident()
give_memory_back()
print(kept - before, resident() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("nothing tells how much memory is resident")
    kept, left = map(int, _run(code).split())
    assert kept > 200
    assert left < 50


@pytest.mark.slow
def test_the_number_of_threads_is_the_one_asked_for():
    code = """
import torch
from refilled.runs.determinism import use_machine
use_machine(threads=2)
use_machine(threads=None)
print(torch.get_num_threads())
"""
    assert _run(code).strip() == "2"


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_fresh_processes_train_the_same_weights_with_any_hash_seed(tmp_path):
    tiny = ["digits:5-9", "--teacher", "refilled/letters", "--student", "wrn_10_1", "--preset", "good"]
    tiny += ["--shots", "4", "--epochs", "2", "--threads", "1", "--quiet"]
    digests = set()
    for number in range(repetitions("R18")):
        out = tmp_path / str(number)
        command = [sys.executable, "-W", "ignore", "-m", "refilled", "distill", *tiny, "--out", str(out)]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": str(number)}, check=True)
        digests.add((sha256((out / "model.safetensors").read_bytes()).hexdigest(), (out / "log.jsonl").read_text()))
    assert len(digests) == 1
