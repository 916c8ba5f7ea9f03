"""The recipe of a student: how long it is trained, by which steps, on which views of the images.

This module has no heavy imports, so that ``refilled --help`` is quick.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from refilled.errors import RunError, unknown
from refilled.ranges import AMOUNT, COUNT, PART, POSITIVE, SHARE, WHOLE, Range, check_fields

_Crops = Literal["auto", "none", "crop", "crop-flip", "resized-crop-flip"]
_Policy = Literal["none", "trivial", "rand"]
Precision = Literal["auto", "32-true", "bf16-mixed", "64-true"]

_SGD_ONLY_LR = 0.05


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The optimisation of a student. The defaults suit short runs; ``PRESETS["paper"]`` is the recipe of the paper.

    Attributes:
        epochs: Number of passes over the training images, in all stages together. With unlabelled images, an epoch is a
            pass over the kind that takes more steps; the other kind is repeated.
        least_steps: Minimum number of steps; with few images, epochs are added. The command line uses 1000 if neither
            epochs nor a preset with epochs is given.
        batch_size: Maximum number of images per step; an epoch is split into batches of nearly equal size.
        lr: Peak learning rate.
        optimizer: ``sgd``, or ``adamw`` (Loshchilov and Hutter, ICLR 2019), which needs an ``lr`` of about 0.001. For
            a student that starts from weights, the command line uses AdamW with this ``lr``, a weight decay of 0.05,
            batches of 16 and 1000 ``head_steps``, unless an optimizer, an ``lr`` or a preset with one is given.
        momentum: Momentum of SGD; the first beta of AdamW.
        nesterov: Use Nesterov momentum in SGD.
        weight_decay: Weight decay coefficient.
        ema: Decay of an exponential moving average of the student's weights, such as 0.99. The student of each stage
            is this average. The decay rises to this value over the first steps. 0: no average.
        head_steps: Number of steps at the start of each stage in which only the classifier and the weights of losses,
            such as projectors, are trained, on embeddings of the training images without augmentation, which are
            computed once. They suit a student that starts from weights (Kumar et al., ICLR 2022). 0: none.
        schedule: ``cosine``: from ``lr`` to 0 over each stage; ``step``: times 0.2 after each quarter of a stage (the
            paper); ``late-step``: times 0.1 after 62.5, 75 and 87.5 % of it (Tian et al., ICLR 2020).
        warmup: Number of epochs of linear warm-up at the start of each stage.
        sampler: ``shuffle``: all images in random order; ``balanced``: K images of each of P classes in every batch.
        images_per_class: Images per class in a batch of the balanced sampler (K).
        balance: Cross-entropy for classes of unequal size. ``logits`` adds the logarithm of each class's share of the
            training images to its logit in training (Menon et al., ICLR 2021); ``weights`` weighs each image by the
            inverse of that share. Both raise the balanced accuracy and may lower the accuracy.
        augmentation: ``auto`` chooses by the data; ``crop`` pads and crops; ``crop-flip`` also mirrors;
            ``resized-crop-flip`` enlarges a random part, for long runs with few images.
        auto_augment: ``trivial``: one random operation per image, such as a rotation by up to 135 degrees or a change
            of contrast (TrivialAugment, ICCV 2021); ``rand``: two moderate ones (RandAugment, NeurIPS 2020). The
            teacher sees the same image.
        color_jitter: Change brightness, contrast and saturation by factors between 1 - J and 1 + J; J is 0 to 1, often
            0.4. Grey images keep their saturation. 0: off.
        random_erasing: Probability that a rectangle of 2 to 33 % of an image is replaced by noise (Zhong et al., AAAI
            2020), for both student and teacher. 0: off.
        views: Number of augmented views per image to cycle through; the teacher's embeddings of them are computed once
            and cached on disk. None: a new view in every epoch, with the teacher run live.
        mixup: Blend each image and its label with another image, with a share drawn from Beta(mixup, mixup). The
            teacher embeds the mixed images. 0: off (Zhang et al., ICLR 2018).
        cutmix: Replace a square patch with that of another image; its share of the area is drawn from
            Beta(cutmix, cutmix) (Yun et al., ICCV 2019). Together with ``mixup``, each applies to half of the views.
        unlabelled_share: Share of unlabelled images in a batch, if a run has some. With few labelled images the share
            is larger, because a batch never contains a labelled image twice.
        unlabelled_span: Share of each stage, from its start, that uses unlabelled images; the rest of the stage uses
            only labelled ones.
        precision: ``auto`` uses bfloat16 if the hardware supports it, otherwise float32. On such CPUs a timm student is
            timed in both for two seconds, unless ``views`` is set, and the faster one is used and recorded.
        seed: Seed of initial weights, order, augmentation and choice of shots.
    """

    epochs: int = 60
    least_steps: int = 0
    batch_size: int = 64
    lr: float = 0.1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    ema: float = 0.0
    head_steps: int = 0
    schedule: Literal["cosine", "step", "late-step"] = "cosine"
    warmup: float = 1.0
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    images_per_class: int = 4
    balance: Literal["off", "weights", "logits"] = "off"
    augmentation: _Crops = "auto"
    auto_augment: _Policy = "none"
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    views: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    unlabelled_share: float = 0.5
    unlabelled_span: float = 1.0
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            epochs=COUNT,
            least_steps=WHOLE,
            batch_size=COUNT,
            lr=POSITIVE,
            momentum=PART,
            ema=PART,
            head_steps=WHOLE,
            weight_decay=AMOUNT,
            warmup=AMOUNT,
            color_jitter=SHARE,
            random_erasing=SHARE,
            views=COUNT,
            mixup=AMOUNT,
            cutmix=AMOUNT,
            unlabelled_share=Range(0, 1, above=True, below=True),
            unlabelled_span=SHARE,
            images_per_class=COUNT,
            seed=WHOLE,
        )
        for name, choices in (("augmentation", get_args(_Crops)), ("auto_augment", get_args(_Policy))):
            if getattr(self, name) not in choices:
                raise RunError(unknown(name, str(getattr(self, name)), choices))
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise RunError("nesterov needs a momentum above 0; raise --momentum, or add --no-nesterov")
        if self.optimizer == "adamw" and self.lr >= _SGD_ONLY_LR:
            raise RunError(f"lr = {self.lr} is a learning rate for SGD; AdamW needs about 0.001")

    def epochs_over(self, images: int, unlabelled: int = 0) -> int:
        """Return the number of epochs with this many labelled and unlabelled training images."""
        return max(self.epochs, math.ceil(self.least_steps / self.steps_over(images, unlabelled)))

    def steps_over(self, images: int, unlabelled: int = 0) -> int:
        """Return the number of steps per epoch, which is a pass over the kind of images that takes more steps."""
        known, others = self.batch_over(images, unlabelled)
        return max(math.ceil(images / known), math.ceil(unlabelled / others) if others else 0)

    def batch_over(self, images: int, unlabelled: int = 0) -> tuple[int, int]:
        """Return the maximum numbers of labelled and unlabelled images per step.

        Raises:
            RunError: A batch is too small for both kinds.
        """
        if not unlabelled:
            return min(self.batch_size, images), 0
        if self.batch_size < 2:
            raise RunError("labelled and unlabelled images share a batch; raise --batch-size to 2 or more")
        wanted = round(self.batch_size * (1 - self.unlabelled_share))
        known = min(max(1, wanted), images, self.batch_size - 1)
        return known, min(self.batch_size - known, unlabelled)
