"""The start of ``refilled predict``, beside ``import torch``: new processes in turn.

``python benchmarks/start.py`` trains two small students briefly, one of them from timm, and predicts one image.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

from PIL import Image


def main() -> None:
    """Print medians of the times and of the ratios within a round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        Image.effect_noise((32, 32), 64).convert("RGB").save(image)
        commands = {"import torch": ["-c", "import torch"]}
        for student in ("wrn_10_1", "timm/mobilenetv3_small_050"):
            out = str(Path(folder) / student.replace("/", "_"))
            few = ["--model", student, "--shots", "8", "--epochs", "1", "--precision", "32-true", "--out", out]
            run("-m", "refilled", "train", "digits:5-9", *few)
            commands[f"predict, {student}"] = ["-m", "refilled", "predict", out, str(image)]
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                times[name].append(run(*command))
    base = times["import torch"]
    print("| | median, s | ratio |\n|---|---:|---:|")
    for name, taken in times.items():
        print(f"| {name} | {median(taken):.2f} | {median(t / b for t, b in zip(taken, base, strict=True)):.2f} |")


def run(*command: str) -> float:
    """Run Python in a new process; return the seconds."""
    start = perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return perf_counter() - start


if __name__ == "__main__":
    main()
