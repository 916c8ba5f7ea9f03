"""A run that runs out of memory."""

import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

RUN = ["digits:0-4", "--model", "wrn_16_2", "--batch-size", "64", "--image-size", "32"]
RUN += ["--epochs", "2", "--threads", "1"]
LIMITED = """
import resource, sys
from refilled.training import loop
taken = 0
step = loop._Training._learn
def limited(self, images, count):
    global taken
    taken += 1
    if taken == 6:
        import re
        used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
        images = images.repeat(64, 1, 1, 1)
    return step(self, images, count)
loop._Training._learn = limited
from refilled.cli.app import main
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is set from Linux's own figures")
def test_a_run_that_runs_out_of_memory_keeps_its_state_and_resumes(tmp_path):
    def refilled(*program: str, out: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", *program, "train", *RUN, "--quiet", "--out", out]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    broken = refilled("-c", LIMITED, out="run")
    assert broken.returncode == 2, broken.stderr
    assert "Traceback" not in broken.stderr
    assert "--image-memory 0" in broken.stderr
    resumed = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "refilled", "distill", "--resume", "run", "--quiet"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert refilled("-m", "refilled", out="whole").returncode == 0
    digests = {sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest() for name in ("run", "whole")}
    assert len(digests) == 1
