"""The base class of every model, teacher or student."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.outputs import Outputs

M = TypeVar("M", bound=nn.Module)

_LEAST_SIZE = 224  # pixels; the training size of most vision transformers

Pooling = Literal["pooled", "token", "mean", "both"]
"""The output of a network that is its embedding, if there is a choice; see :class:`Backbone`."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Backbone(nn.Module):
    """An image classifier: an embedding and a linear classifier on it.

    A family implements :meth:`embed`; this class has everything else. Images are RGB ``(N, 3, H, W)``, uint8 or float
    in [0, 1], in the size of the data. Each model resizes and normalises them itself, so that a teacher and a student
    with different inputs get the same view.

    Args:
        embedding_dim: Size d of the embedding.
        feature_channels: Channels of the feature maps that :meth:`embed` returns, shallow to deep.
        num_classes: Number C of classes; 0 for an extractor without a classifier, whose logits are ``(N, 0)``.
        mean: Mean of each channel that the model expects, on the scale [0, 1].
        std: Standard deviation of each channel, on the same scale.
        input_size: Side length in pixels that images are resized to; None: no resizing.
        channels: 3, or 1 for a grayscale model, which gets the luma of the RGB images (ITU-R BT.601, as Pillow's
            ``L``). If mean and std have three channels, their luma is used.

    Raises:
        ModelError: The mean, std, input size or channels are invalid.
    """

    mean: Tensor
    std: Tensor
    required_size: int | None = None
    """The only side length that the model takes; None if it takes several."""
    size_step: int | None = None
    """The step between possible side lengths, of a model that is built for one side length at a time."""
    pooling: Pooling = "pooled"
    """The kind of embedding: the model's pooled output, its class token, the mean of its patches, or both."""

    def __init__(
        self,
        embedding_dim: int,
        feature_channels: Sequence[int],
        num_classes: int,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        input_size: int | None = None,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ModelError(
                f"the model takes images of {channels} channels; images here have 3 (RGB), or 1 (grayscale)"
            )
        self.channels = channels
        self.embedding_dim = embedding_dim
        self.feature_channels = tuple(feature_channels)
        self.num_classes = num_classes
        self.input_size: int | None = None
        self.class_names: tuple[str, ...] | None = None  # names of the classes, if known
        self.architecture: str | None = None  # the name for create_model, if there is one
        self.image_size: int | None = None  # the native size of its data
        self.code: str | None = None  # SHA-256 of the user's Python file that it comes from
        self.notes: tuple[str, ...] = ()  # notes for the user about loading
        self.grey_range: tuple[float, float] | None = None  # black and white of images of more than 8 bits
        # Not persistent, because they belong to the description of the model (model.json) and not to its weights.
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(1, channels, 1, 1), persistent=False)
        self.set_preprocessing(mean, std, input_size)
        self.classifier: nn.Module = nn.Linear(embedding_dim, num_classes) if num_classes else NoClassifier()

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images to their embedding ``(N, d)`` and feature maps, shallow to deep."""
        raise NotImplementedError

    def forward(self, images: Tensor, features: bool = False) -> Outputs:
        """Return the outputs; feature maps are included only if requested, because they cost memory."""
        embedding, maps = self.embed(self.normalize(images))
        return Outputs(self.classifier(embedding), embedding, maps if features else ())

    def normalize(self, images: Tensor) -> Tensor:
        """Resize and normalise images, uint8 or float in [0, 1], as the model expects."""
        if self.channels == 1:
            images = luma(images, self.mean.dtype)
        size = self.input_size
        if size is not None and images.shape[-2:] != (size, size):
            if images.dtype == torch.uint8 and images.is_cuda:  # only the CPU resizes uint8
                images = images / 255
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        if images.dtype == torch.uint8:  # in place takes half the time of new tensors
            mean, std = _as_laid_out(images, 255 * self.mean), _as_laid_out(images, 255 * self.std)
            return images.to(self.mean.dtype).sub_(mean).div_(std)
        return (images.to(self.mean.dtype) - self.mean).div_(self.std)

    def set_preprocessing(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: int | None = None,
    ) -> None:
        """Change the parameters of :meth:`normalize`; None keeps the present value."""
        for name, values in (("mean", mean), ("std", std)):
            if values is None:
                continue
            right_number = len(values) == 3 or len(values) == self.channels
            if not right_number or not all(0 <= value <= 1 for value in values) or (name == "std" and 0 in values):
                raise ModelError(f"{name} must be three numbers on the scale 0 to 1, std above 0; got {list(values)}")
            numbers = torch.tensor(values).view(1, -1, 1, 1)
            getattr(self, name).copy_(numbers if len(values) == self.channels else luma(numbers, numbers.dtype))
        if input_size is not None:
            if input_size < 1:
                raise ModelError(f"the input size must be a positive number of pixels; got {input_size}")
            if self.required_size not in (None, input_size):
                raise ModelError(f"this model takes images of {self.required_size} pixels only; got {input_size}")
            self.input_size = input_size

    def adapt_size(self, image_size: int | None) -> None:
        """Adapt a model with a variable input size to images of ``image_size`` pixels.

        The new size is the larger of that and 224 pixels, in whole patches, but no more than the model was trained at.
        A note records it. Models that take images of any size, or of only one, do not change.
        """
        if self.size_step is None or self.input_size is None:
            return
        side = max(1, round(max(image_size or 0, _LEAST_SIZE) / self.size_step)) * self.size_step
        if side < self.input_size:
            trained_at = f"was trained at {self.input_size}"
            self.notes += (f"the teacher sees {side} pixels and {trained_at}; --teacher-size sets another size",)
            self.set_preprocessing(input_size=side)

    def set_pooling(self, pooling: Pooling) -> None:
        """Choose the kind of embedding; most models have only one.

        Raises:
            ModelError: The model has no such output.
        """
        if pooling != self.pooling:
            raise ModelError(f"this model has no '{pooling}' embedding: its only one is '{self.pooling}'")

    def default_pooling(self) -> Pooling:
        """Return the kind of output that was trained to represent the whole image."""
        return self.pooling

    def reset_classifier(self, generator: torch.Generator) -> None:
        """Re-initialise the classifier from the initial distribution of :class:`torch.nn.Linear`."""
        with torch.no_grad():
            for parameter in self.classifier.parameters():
                bound = self.embedding_dim**-0.5
                drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
                parameter.copy_(bound * drawn)


class NoClassifier(nn.Module):
    """The classifier of an extractor without one; its logits are ``(N, 0)``."""

    def forward(self, embedding: Tensor) -> Tensor:
        """Map ``(N, d)`` to ``(N, 0)``."""
        return embedding[:, :0]


def freeze(model: M) -> M:
    """Set a model to evaluation mode without gradients, and return it."""
    model.eval().requires_grad_(False)
    for module in model.modules():
        module.training = False  # in case a user's module overrides train() and eval()
    return model


def trainable_copy(teacher: Backbone, class_names: tuple[str, ...], generator: torch.Generator) -> Backbone:
    """Return a copy of a teacher with gradients and a fresh classifier for other classes.

    Raises:
        ModelError: The teacher is a grayscale model, or it has no name from which its copy could be rebuilt.
    """
    if teacher.channels != 3:
        raise ModelError("a grayscale model cannot be fine-tuned, because students take RGB images")
    if teacher.architecture is None:
        raise ModelError(
            "a network from a Python file or from transformers cannot be fine-tuned: it has no name to rebuild it by. "
            "Give the teacher as a student folder, timm/<name>, or <architecture>:WEIGHTS"
        )
    model = deepcopy(teacher).requires_grad_(True)
    model.num_classes, model.class_names = len(class_names), class_names
    model.classifier = nn.Linear(model.embedding_dim, model.num_classes)
    model.reset_classifier(generator)
    return model


def luma(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert RGB images ``(N, 3, H, W)`` to grayscale ``(N, 1, H, W)``: uint8 to [0, 1], floats on their own scale."""
    scale = 255 if images.dtype == torch.uint8 else 1
    weights = torch.tensor(_LUMA, dtype=dtype, device=images.device).view(1, 3, 1, 1) / scale
    return (images.to(dtype) * weights).sum(1, keepdim=True)  # no matrix product: autocast would round it


def _as_laid_out(images: Tensor, values: Tensor) -> Tensor:
    """Repeat the channels' values ``(1, 3, 1, 1)`` along a row of channels-last images.

    The CPU then processes whole rows instead of three numbers at a time, in a fifth of the time.
    """
    if not images.is_contiguous(memory_format=torch.channels_last):
        return values
    return values.expand(-1, -1, 1, images.shape[-1]).contiguous(memory_format=torch.channels_last)


def global_average_pool(maps: Tensor) -> Tensor:
    """Average ``(N, C, H, W)`` over its pixels to ``(N, C)``, in float32 or better.

    Distances between embeddings are small differences of large sums, which are lost in the rounding of bfloat16.
    """
    return maps.mean((2, 3), dtype=torch.promote_types(maps.dtype, torch.float32))


def initialize_convolutions(model: nn.Module) -> None:
    """Initialise all convolutions as He et al. (ICCV 2015): variance 2 / fan-out, with fan-out per group."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1] // module.groups
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
