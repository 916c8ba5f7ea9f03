"""A folder of your own images, from Python: what the package sees, and a run on it.

photos/robin/1.jpg
photos/wren/1.jpg
...
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from refilled import Run
from refilled.data import load_task
from refilled.runs.experiment import distill


def draw_photos(folder: Path, per_class: int = 30) -> Path:
    """Make a folder of two classes, reddish and bluish noise instead of photographs."""
    chance = np.random.default_rng(0)
    for channel, name in ((0, "robin"), (2, "wren")):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = chance.integers(0, 200, (16, 16, 3))
            pixels[..., channel] += 40
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def main(folder: Path | None = None, epochs: int = 10) -> float:
    """Describe the task, train a student on it and return the test accuracy in percent."""
    with tempfile.TemporaryDirectory() as other:
        place = folder or Path(other)
        photos = draw_photos(place / "photos")
        task = load_task(str(photos), val=0.0)
        print(f"{len(task.classes)} classes: {', '.join(task.classes)}; {task.image_size} pixels")
        print(f"{len(task.train)} training and {len(task.test)} test images; fingerprint {task.fingerprint[:16]}")
        print(*task.notes, sep="\n")
        run = Run(task=str(photos), method="vanilla", student="wrn_10_1", epochs=epochs, batch_size=12, val=0.0)
        result = distill(run, place / "run")
    print(f"student: {result.accuracy:.1f} % of the test images")
    return result.accuracy


if __name__ == "__main__":
    main()
