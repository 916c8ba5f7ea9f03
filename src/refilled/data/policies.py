"""Random changes of single images by torchvision's kernels, as a pure function of (seed, view, index).

References: Müller and Hutter, TrivialAugment, ICCV 2021; Cubuk et al., RandAugment, NeurIPS 2020; Zhong et al., Random
Erasing Data Augmentation, AAAI 2020. Operations and magnitudes are those of torchvision.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refilled.data.keyed import keyed_bits, keyed_integers, keyed_uniform
from refilled.errors import TaskError, unknown

AutoAugment = Literal["none", "trivial", "rand"]

OPERATIONS = (
    *("identity", "shear-x", "shear-y", "translate-x", "translate-y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
"""Operations of both policies; each is drawn equally often."""
LEVELS = 31
"""Magnitudes of an operation, from the weakest to the strongest."""
JITTERED = ("brightness", "contrast", "color")
"""What colour jitter changes, in random order."""

_ERASED_AREA, _ERASED_ASPECT, _ERASED_TRIES = (0.02, 0.33), (0.3, 3.3), 10


class _Space(NamedTuple):
    """The strongest magnitudes of a policy, and how many operations it applies."""

    operations: int
    """Operations per image."""
    level: int | None
    """The level of all operations. None: drawn for each."""
    shear: float
    translate: float
    """Pixels, or for RandAugment a share of the side."""
    degrees: float
    enhance: float
    """Of brightness, colour, contrast and sharpness: the largest difference of the factor from 1."""
    bits: int
    """Bits that posterize removes at most."""


_SPACES: Mapping[str, _Space] = {
    "trivial": _Space(1, None, 0.99, 32.0, 135.0, 0.99, 6),
    "rand": _Space(2, 9, 0.3, 150 / 331, 30.0, 0.9, 4),
}


class Operations(NamedTuple):
    """The operations that are drawn for N images, K for each, in the order of their application."""

    kinds: NDArray[np.int64]
    """``(N, K)``: places in :data:`OPERATIONS`."""
    magnitudes: NDArray[np.float64]
    """``(N, K)``: a signed number in the unit of the operation, 0 for those without one."""


class Rectangles(NamedTuple):
    """The rectangles that are erased in N images, ``(N,)`` each; those of height 0 erase nothing."""

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]


def alter(
    pixels: Tensor,
    indices: Tensor,
    *,
    seed: int,
    view: int,
    auto_augment: AutoAugment = "none",
    color_jitter: float = 0.0,
    random_erasing: float = 0.0,
) -> Tensor:
    """Change each image by drawn operations, then by colour jitter, and erase a rectangle of some.

    What happens to an image depends on (seed, view, index) alone. Images are changed one by one in contiguous memory,
    so that neither the batch nor its layout affects a rounding. A grey image, whose channels are equal, stays grey:
    changes of the saturation, which would only round, are left out, and the noise is grey.

    Args:
        pixels: uint8 images ``(N, 3, S, S)``, on any device.
        indices: Their ``(N,)`` integer positions in the training set.
        seed: The run's seed.
        view: Which view, as in :func:`~refilled.data.augment`.
        auto_augment: ``trivial``: TrivialAugment (Wide): one operation at a random level. Translations end at the side
            of the image, where that is below 32 pixels. ``rand``: RandAugment: two operations at level 9 of 30.
        color_jitter: J in [0, 1]: factors of brightness, contrast and saturation are drawn from [1 - J, 1 + J].
        random_erasing: Probability that a rectangle of 2 to 33 % of the area is replaced by uniform noise.

    Returns:
        uint8 ``(N, 3, S, S)`` in channels-last memory; ``pixels`` itself if nothing is to be changed.

    Raises:
        TaskError: ``auto_augment`` is unknown.
    """
    if auto_augment not in get_args(AutoAugment):
        raise TaskError(unknown("auto-augment policy", str(auto_augment), get_args(AutoAugment)))
    keys, side = indices.cpu().numpy(), pixels.shape[-1]
    place = {"seed": seed, "view": view}
    plan: list[list[tuple[str, float]]] = [[] for _ in keys]
    if auto_augment != "none":
        _add(plan, OPERATIONS, draw_operations(auto_augment, side, keys, **place))
    if color_jitter > 0:
        _add(plan, JITTERED, draw_jitter(color_jitter, keys, **place))
    if not any(plan) and random_erasing <= 0:
        return pixels
    altered = pixels.clone(memory_format=torch.channels_last)
    for row, changes in enumerate(plan):
        if changes:
            image = pixels[row].contiguous()
            for operation, magnitude in changes:
                image = apply(image, operation, magnitude)
            altered[row] = image
    if random_erasing > 0:
        _erase(altered, keys, random_erasing, **place)
    return altered


def draw_operations(policy: AutoAugment, side: int, keys: NDArray[np.int64], *, seed: int, view: int) -> Operations:
    """Draw the operations of a policy, other than ``none``, for images of ``side`` pixels with these indices."""
    space, turns = _SPACES[policy], np.arange(_SPACES[policy].operations)
    kinds = keyed_integers(len(OPERATIONS), seed, "operation", view, keys[:, None], turns)
    levels = keyed_integers(LEVELS, seed, "level", view, keys[:, None], turns)
    if space.level is not None:
        levels = np.full_like(kinds, space.level)
    magnitudes, signed = _table(policy, side)
    negative = keyed_integers(2, seed, "sign", view, keys[:, None], turns) == 1
    drawn = magnitudes[kinds, levels]
    return Operations(kinds, np.where(negative & signed[kinds], -drawn, drawn))


def draw_jitter(strength: float, keys: NDArray[np.int64], *, seed: int, view: int) -> Operations:
    """Draw order and strength of the changes in :data:`JITTERED`, whose factors are 1 plus the magnitude."""
    kinds = np.argsort(keyed_bits(seed, "jitter order", view, keys[:, None], np.arange(len(JITTERED))), axis=1)
    factors = keyed_uniform(seed, "jitter", view, keys[:, None], kinds)
    return Operations(kinds, strength * (2 * factors - 1))


def draw_rectangles(probability: float, side: int, keys: NDArray[np.int64], *, seed: int, view: int) -> Rectangles:
    """Draw which images lose a rectangle, and which one: the first of ten that fits, as in torchvision."""

    def draw(what: str, low: float, high: float) -> NDArray[np.float64]:
        return low + (high - low) * keyed_uniform(seed, what, view, keys[:, None], np.arange(_ERASED_TRIES))  # (N, 10)

    area, (low, high) = side**2 * draw("erased area", *_ERASED_AREA), _ERASED_ASPECT
    aspect = np.exp(draw("erased aspect", math.log(low), math.log(high)))
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < side) & (widths < side)
    first = (np.arange(len(keys)), fits.argmax(axis=1))
    erased = (keyed_uniform(seed, "erased", view, keys) < probability) & fits.any(axis=1)
    height, width = (np.where(erased, lengths[first], 0).astype(np.int64) for lengths in (heights, widths))
    top, left = (
        np.floor(keyed_uniform(seed, what, view, keys) * (side - length + 1)).astype(np.int64)
        for what, length in (("erased top", height), ("erased left", width))
    )
    return Rectangles(top, left, height, width)


def apply(image: Tensor, operation: str, magnitude: float) -> Tensor:
    """Return a uint8 image ``(3, S, S)`` after one of the :data:`OPERATIONS`."""
    from torchvision.transforms.v2 import functional as F  # slow to import, and off by default

    changed: Tensor
    match operation:
        case "identity":
            changed = image
        case "shear-x" | "shear-y":
            degrees = math.degrees(math.atan(magnitude))
            shear = [degrees, 0.0] if operation == "shear-x" else [0.0, degrees]
            changed = F.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0])
        case "translate-x" | "translate-y":
            shift = [int(magnitude), 0] if operation == "translate-x" else [0, int(magnitude)]
            changed = F.affine(image, angle=0.0, translate=shift, scale=1.0, shear=[0.0, 0.0])
        case "rotate":
            changed = F.rotate(image, angle=magnitude)
        case "brightness":
            changed = F.adjust_brightness(image, 1 + magnitude)
        case "color":
            changed = image if _is_grey(image) else F.adjust_saturation(image, 1 + magnitude)
        case "contrast":
            changed = F.adjust_contrast(image, 1 + magnitude)
        case "sharpness":
            changed = F.adjust_sharpness(image, 1 + magnitude)
        case "posterize":
            changed = F.posterize(image, bits=int(magnitude))
        case "solarize":
            changed = F.solarize(image, threshold=255 * magnitude)
        case "autocontrast":
            changed = F.autocontrast(image)
        case "equalize":
            changed = F.equalize(image)
        case _:
            raise TaskError(unknown("operation", operation, OPERATIONS))
    return changed


def _add(plan: Sequence[list[tuple[str, float]]], names: Sequence[str], drawn: Operations) -> None:
    for changes, kinds, magnitudes in zip(plan, drawn.kinds.tolist(), drawn.magnitudes.tolist(), strict=True):
        named = ((names[kind], magnitude) for kind, magnitude in zip(kinds, magnitudes, strict=True))
        changes += [change for change in named if change[0] != "identity"]


@lru_cache(maxsize=16)
def _table(policy: str, side: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the magnitude of each operation at each level ``(14, 31)``, and which operations have a sign ``(14,)``."""
    space = _SPACES[policy]
    shift = min(space.translate, side) if policy == "trivial" else space.translate * side
    none = torch.zeros(LEVELS)

    def up_to(strongest: float) -> Tensor:
        return torch.linspace(0.0, strongest, LEVELS, dtype=torch.float32)  # as in torchvision, to the nearest pixel

    signed = [up_to(most) for most in (*[space.shear] * 2, *[shift] * 2, space.degrees, *[space.enhance] * 4)]
    posterize = (8 - torch.arange(LEVELS, dtype=torch.float32) / ((LEVELS - 1) / space.bits)).round()
    rows = torch.stack([none, *signed, posterize, torch.linspace(1.0, 0.0, LEVELS, dtype=torch.float32), none, none])
    return rows.double().numpy(), np.array([1 <= row <= len(signed) for row in range(len(OPERATIONS))])


def _is_grey(image: Tensor) -> bool:
    red, green, blue = image
    return torch.equal(red, green) and torch.equal(red, blue)


def _erase(pixels: Tensor, keys: NDArray[np.int64], probability: float, *, seed: int, view: int) -> None:
    """Fill a rectangle of some of the images with noise that is uniform on 0 .. 255, in place."""
    from torchvision.transforms.v2 import functional as F

    drawn = draw_rectangles(probability, pixels.shape[-1], keys, seed=seed, view=view)
    for row in np.flatnonzero(drawn.height * drawn.width).tolist():
        top, left, height, width = (int(part[row]) for part in drawn)
        words = np.arange(-(-3 * height * width // 8))  # of 64 bits, for eight pixels each
        bits = keyed_bits(seed, "erased pixels", view, int(keys[row]), words).view(np.uint8)[: 3 * height * width]
        noise = torch.from_numpy(bits.reshape(3, height, width)).to(pixels.device)
        if _is_grey(pixels[row]):
            noise = noise[:1].expand_as(noise)
        F.erase(pixels[row], top, left, height, width, noise, inplace=True)
