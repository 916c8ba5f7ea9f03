"""Write scikit-learn's digits as a folder whose classes have 100 to 3 training images each and 60 test images each.

Use: python docs/comparisons/long_tail.py runs/long-tail
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TEST, MOST, FEWEST = 60, 100, 3


def write(folder: Path) -> None:
    """Write the images to ``folder/{train,test}/<digit>``."""
    digits, generator = load_digits(), np.random.default_rng(0)
    for digit in range(10):
        rows = generator.permutation(np.flatnonzero(digits.target == digit))
        count = round(MOST * (FEWEST / MOST) ** (digit / 9))
        for part, chosen in (("train", rows[TEST : TEST + count]), ("test", rows[:TEST])):
            place = folder / part / str(digit)
            place.mkdir(parents=True, exist_ok=True)
            for row in chosen:
                Image.fromarray((digits.images[row] * 15.9).astype(np.uint8)).save(place / f"{row:04}.png")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
