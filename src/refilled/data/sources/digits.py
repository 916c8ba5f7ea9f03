"""scikit-learn's handwritten digits: a small data set that needs no download."""

import numpy as np

from refilled.data.partition import hold_out
from refilled.data.source import ArrayPart, Source

SUMMARY = "1,797 handwritten digits, 10 classes, 8x8; comes with scikit-learn, needs no download"
CITATION = "Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998"


def open_digits() -> Source:
    """Open the digits. The test part is a fixed fifth of each class.

    References: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits().images, load_digits().target.astype(np.int64)
    pixels = np.round(images * (255 / 16)).astype(np.uint8)  # grey levels 0 .. 16
    rows = np.arange(len(labels))
    train, test = hold_out(rows, labels, rows, 0.2, seed=0, purpose="digits")
    return Source(
        classes=tuple(str(digit) for digit in range(10)),
        train=ArrayPart(labels[train], pixels[train], "digits-train"),
        test=ArrayPart(labels[test], pixels[test], "digits-test"),
        fixed=True,
        augmentation="crop",  # a mirrored digit is not a digit
        image_size=16,  # a model that halves the resolution three times still has 2x2 positions left
        licence="CC BY 4.0",
        citation=CITATION,
    )
