"""A check before training whether a teacher's outputs for a few real images are usable."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

import torch
from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.models.backbone import Backbone
from refilled.outputs import Outputs
from refilled.words import count_of

PROBE_IMAGES = 8
"""Number of images of a probe; enough to detect a constant embedding, and quick."""

_SAME = 1e-6
"""Embeddings that differ by less than this share of their largest value are regarded as equal."""

_STEADY = 0.05
"""Share of the spread over images by which an embedding may vary with its batch; bfloat16 rounds by this much."""

_FAR = 0.3
"""Divergence, in nats per channel, of the first batch norm's input from its input in training.

It was at most 0.13 with the correct mean and std, for two ResNets of CIFAR-10 on 8 or 64 images of birds, CIFAR-100 and
Tiny-ImageNet. It was at least 0.45 with mean and std 0.5, and at least 1.0 without normalisation.
"""

_NORMALIZATIONS = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean 0.5, std 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none (mean 0, std 1)": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "numbers from 0 to 255 (mean 0, std 1/255)": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    "CLIP's": ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
}
"""Usual normalisations."""

_BETTER = 3.0
"""Factor by which the divergence of another normalisation must be smaller to be reported."""

_SHOWN = 3  # images in a message


def probe(
    teacher: Backbone, images: Tensor, sources: Sequence[str], *, constant_allowed: bool = False
) -> tuple[str, ...]:
    """Embed a few images with a frozen teacher, and refuse a teacher whose outputs no training could use.

    Args:
        teacher: The teacher, in evaluation mode.
        images: uint8 ``(N, 3, S, S)``, from the training images of the task.
        sources: The names of the images, for messages.
        constant_allowed: Whether one embedding for all images is a warning only, as for a network that a run trained
            too briefly.

    Returns:
        Warnings for the user that do not prevent training.

    Raises:
        ModelError: The teacher fails on the images, or its outputs have a wrong shape, are not finite, are not
            floating-point numbers, or are the same embedding for all images.
    """
    outputs = _ask(teacher, images)
    _refuse_wrong_shape(outputs, teacher, len(images))
    refuse_non_finite(outputs.embedding, sources)
    refuse_non_finite(outputs.logits, sources, "logits")
    constant = _constant(outputs.embedding, images)
    if constant and not constant_allowed:
        raise ModelError(constant[0])
    return (*constant, *_unsteady(teacher, images, outputs.embedding), *_misnormalized(teacher, images))


def refuse_non_finite(rows: Tensor, sources: Sequence[str], what: str = "embedding", hint: str = "") -> None:
    """Refuse the outputs of a teacher for some images if any is NaN or infinite.

    Args:
        rows: One row ``(N, ...)`` per image.
        sources: The names of the N images.
        what: The kind of output.
        hint: A possible fix, if one is known.

    Raises:
        ModelError: An output is not finite; the message names the images.
    """
    bad = (~rows.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if not bad:
        return
    shown = ", ".join(sources[row] for row in bad[:_SHOWN]) + (", ..." if len(bad) > _SHOWN else "")
    raise ModelError(
        f"the teacher's {what} is not finite (NaN or infinite) for {len(bad)} of "
        f"{count_of(len(rows), 'image')}: {shown}. The cause is the teacher or these images, and no setting of the "
        f"training can fix it{hint}"
    )


def _ask(teacher: Backbone, images: Tensor) -> Outputs:
    try:
        with torch.no_grad():
            outputs: Outputs = teacher(images.to(teacher.mean.device))
    except Exception as error:  # a user's module may raise anything
        asked = f"{teacher.input_size or images.shape[-1]} pixels"
        reason = str(error).strip().splitlines()[:1] or [""]
        raise ModelError(
            f"the teacher fails on images of this task, which it gets at {asked}: {type(error).__name__}: {reason[0]}. "
            "If it needs images of another size, give --teacher-size"
        ) from error
    return outputs


def _refuse_wrong_shape(outputs: Outputs, teacher: Backbone, count: int) -> None:
    for what, rows, width in (
        ("embedding", outputs.embedding, teacher.embedding_dim),
        ("logits", outputs.logits, teacher.num_classes),
    ):
        if tuple(rows.shape) != (count, width):
            raise ModelError(
                f"the teacher must return one row of {count_of(width, 'number')} per image as its {what}; for "
                f"{count_of(count, 'image')} it returned a tensor of shape {tuple(rows.shape)}"
            )
        if not rows.is_floating_point():
            raise ModelError(f"the teacher's {what} must be floating-point numbers, but is {rows.dtype}")


def _constant(embedding: Tensor, images: Tensor) -> tuple[str, ...]:
    """Return a complaint if different images have the same embedding."""
    if (images == images[:1]).all():  # one image, or several equal ones
        return ()
    if (embedding - embedding[:1]).abs().max() > _SAME * embedding.abs().max():
        return ()
    return (
        f"the teacher's embedding is the same for all of {len(images)} different images, so there is nothing to learn "
        "from it. Check its weights, and the mean, std and size of the images that it expects",
    )


def _unsteady(teacher: Backbone, images: Tensor, embedding: Tensor) -> tuple[str, ...]:
    """Warn of a teacher that draws random numbers, or whose output depends on the other images of the batch."""
    half = len(images) // 2
    if half == 0:
        return ()
    again = _ask(teacher, images[:half]).embedding
    spread = (embedding - embedding.mean(0)).square().mean().sqrt()
    difference = (again - embedding[:half]).square().mean().sqrt()
    if difference <= _STEADY * spread:
        return ()
    return (
        "the teacher returns different embeddings for the same image, by chance or depending on the other images of "
        f"the batch (difference {100 * (difference / spread).item():.0f} % of the spread over images): dropout or "
        "batch normalisation is in training mode",
    )


def _misnormalized(teacher: Backbone, images: Tensor) -> tuple[str, ...]:
    """Warn if the first batch norm's input differs from that of training, but not with another mean and std.

    Images of other kinds than in training also cause a difference, but a smaller one, with every normalisation.
    """
    given = tuple(teacher.mean.flatten().tolist()), tuple(teacher.std.flatten().tolist())
    found = _divergence(teacher, images)
    if found is None or found < _FAR:
        return ()
    others: dict[str, float] = {}
    try:
        for name, (mean, std) in _NORMALIZATIONS.items():
            teacher.set_preprocessing(mean, std)
            divergence = _divergence(teacher, images)
            others[name] = math.inf if divergence is None else divergence
    finally:
        teacher.set_preprocessing(*given)
    best = min(others, key=lambda name: others[name])
    if others[best] * _BETTER > found:
        return ()
    return (
        "the teacher seems to expect another normalisation: the input of its first batch normalisation differs from "
        f"that of its training (divergence {found:.2g}), but less with {best} ({others[best]:.2g}); see "
        "--teacher-mean and --teacher-std",
    )


class _SeenEnoughError(Exception):
    """The first batch normalisation was reached."""


def _divergence(teacher: Backbone, images: Tensor) -> float | None:
    r"""Return the divergence of the first batch norm's input from its running statistics.

    This is the median over channels of the Kullback-Leibler divergence of the two normal distributions,
    :math:`\frac12 (\ln \frac{v_r}{v} + \frac{v + (m - m_r)^2}{v_r} - 1)`. None if there is no such layer, or if it
    was never trained.
    """
    seen: list[tuple[nn.Module, Tensor]] = []

    def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append((module, arguments[0]))
        raise _SeenEnoughError

    layers = [m for m in teacher.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with torch.no_grad(), suppress(_SeenEnoughError):
            teacher(images.to(teacher.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    if not seen or seen[0][1].ndim != 4:
        return None
    layer, numbers = seen[0]
    mean, variance = numbers.mean((0, 2, 3)), numbers.var((0, 2, 3)).clamp_min(1e-12)
    own_mean, own_variance = cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var).clamp_min(1e-12)
    if not own_mean.any():
        return None
    ratio = variance / own_variance
    return (0.5 * (ratio - ratio.log() - 1 + (mean - own_mean).square() / own_variance)).median().item()
