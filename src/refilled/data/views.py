"""Random views of the training images, for students and teachers: augmented, and optionally mixed in pairs."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refilled.data.keyed import keyed_bits, keyed_integers
from refilled.data.policies import AutoAugment, alter
from refilled.data.store import JoinedImages, SeenPixels, gathered
from refilled.data.transforms import Augmentation, augment
from refilled.errors import TaskError


@dataclass(frozen=True)
class Mixing:
    """How the images of a view are mixed. Each keeps ``share`` of its targets and gets the rest from its partner."""

    share: float
    patch: tuple[slice, slice] | None = None
    """Rows and columns of the pixels that come from the partner (CutMix). None: the images are blended (mixup)."""

    def __call__(self, images: Tensor, partners: Tensor) -> Tensor:
        """Mix each of the images ``(N, 3, S, S)`` with its partner. Blended uint8 images become floats in [0, 1]."""
        if self.patch is None:
            scale = 255 if images.dtype == torch.uint8 else 1
            return torch.lerp(partners / scale, images / scale, self.share)
        mixed = images.clone()
        mixed[..., *self.patch] = partners[..., *self.patch]
        return mixed


@dataclass(frozen=True)
class Views:
    """Random views of images, augmented and optionally mixed in pairs: a pure function of (seed, view, index).

    A view has the same pixels for teacher and student, and in every run. The teacher can therefore embed the mixed
    images themselves (Beyer et al., CVPR 2022), once for all runs.

    Attributes:
        augmentation: See :func:`augment`.
        mixup: If above 0, images are blended with a share drawn from Beta(mixup, mixup) (Zhang et al., ICLR 2018).
        cutmix: If above 0, a square patch is replaced by that of the partner. The share of the area outside it is drawn
            from Beta(cutmix, cutmix) (Yun et al., ICCV 2019). With both above 0, each applies to half of the views.
        auto_augment: With the two below, changes of each image before it is mixed: see :func:`alter`.
        color_jitter: Strength of changes in brightness, contrast and saturation.
        random_erasing: Probability that a rectangle is replaced by noise.
    """

    augmentation: Augmentation
    mixup: float = 0.0
    cutmix: float = 0.0
    auto_augment: AutoAugment = "none"
    color_jitter: float = 0.0
    random_erasing: float = 0.0

    @property
    def mixed(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def load(self, pixels: SeenPixels, indices: Tensor, *, seed: int, view: int) -> Tensor:
        """Return a view of the images at ``indices`` ``(N,)``: ``(N, 3, S, S)``, uint8, or float if blended."""

        def augmented(chosen: Tensor) -> Tensor:
            images = augment(gathered(pixels, chosen), chosen, seed=seed, view=view, kind=self.augmentation)
            return alter(
                images,
                chosen,
                seed=seed,
                view=view,
                auto_augment=self.auto_augment,
                color_jitter=self.color_jitter,
                random_erasing=self.random_erasing,
            )

        if not self.mixed:
            return augmented(indices)
        mixing = self.mixing(pixels.shape[-1], seed=seed, view=view)
        return mixing(augmented(indices), augmented(self.partners_in(pixels, indices, seed=seed, view=view)))

    def partners_in(self, pixels: SeenPixels, indices: Tensor, *, seed: int, view: int) -> Tensor:
        """Return the index of each image's partner ``(N,)``, drawn from the same part of joined images.

        The partner of a labelled image therefore has a label too.
        """
        if not isinstance(pixels, JoinedImages):
            return self.partners(indices, len(pixels), seed=seed, view=view)
        first, second = pixels.lengths
        among_first = self.partners(indices, first, seed=seed, view=view)
        among_second = first + self.partners(indices, second, seed=seed, view=view)
        return torch.where(indices.cpu() < first, among_first, among_second)

    def partners(self, indices: Tensor, count: int, *, seed: int, view: int) -> Tensor:
        """Return the index of each image's partner in a view ``(N,)``, drawn from 0 .. ``count`` - 1."""
        return torch.from_numpy(keyed_integers(count, seed, "partner", view, indices.cpu().numpy()))

    def mixing(self, side: int, *, seed: int, view: int) -> Mixing:
        """Draw how the images of a view, of side length ``side``, are mixed with their partners.

        Raises:
            TaskError: Neither ``mixup`` nor ``cutmix`` is above 0.
        """
        if not self.mixed:
            raise TaskError("these views are not mixed; set mixup or cutmix above 0")
        generator = np.random.default_rng(int(keyed_bits(seed, "mixing", view)))
        if self.cutmix <= 0 or (self.mixup > 0 and generator.random() < 0.5):
            return Mixing(float(generator.beta(self.mixup, self.mixup)))
        length = round(side * (1 - generator.beta(self.cutmix, self.cutmix)) ** 0.5)
        top, left = (int(start) for start in generator.integers(side - length + 1, size=2))
        return Mixing(1 - (length / side) ** 2, (slice(top, top + length), slice(left, left + length)))
