"""Train the teacher that comes with the package, ``refilled/letters``: python docs/build_teacher.py.

It is the run ``refilled train letters --model wrn_10_2 --image-size 8 --epochs 24 --batch-size 128 --val 0``. Its
weights are then written as float16, so that the file is below a megabyte. On two CPU cores it takes some minutes.
"""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from refilled.config import Run
from refilled.files import write_atomic
from refilled.runs.experiment import complete

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "runs" / "letters"
EMBEDDED = ROOT / "src" / "refilled" / "models" / "embedded_weights" / "letters"
RUN = Run(task="letters", student="wrn_10_2", image_size=8, epochs=24, batch_size=128, val=0.0, threads=1)


def in_half(folder: Path, target: Path) -> None:
    """Write the model in ``folder`` with float16 weights to ``target``, with the record of its run."""
    state = load_file(folder / "model.safetensors")
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    if not all(value.isfinite().all() for value in half.values() if value.dtype == torch.float16):
        raise SystemExit(f"{folder} holds weights that float16 cannot represent")
    weights = save(half)
    document = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / "model.safetensors", weights)
    write_atomic(target / "model.json", json.dumps({**document, "sha256": sha256(weights).hexdigest()}).encode())
    for name in ("run.toml", "result.json"):
        shutil.copy(folder / name, target / name)


def main() -> None:
    """Train, unless it is done already, and write the embedded model."""
    result = complete(RUN, TRAINED)
    in_half(TRAINED, EMBEDDED)
    size = (EMBEDDED / "model.safetensors").stat().st_size
    print(f"{EMBEDDED}: {size:,} bytes; {result.accuracy:.2f} % of the letters' test images")


if __name__ == "__main__":
    main()
