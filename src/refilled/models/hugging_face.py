"""Image networks of Hugging Face's transformers (Wolf et al., EMNLP 2020) as teachers."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refilled.errors import ModelError
from refilled.models.backbone import Backbone, NoClassifier, Pooling
from refilled.models.module_outputs import describe_output, find_last_linear, linear_calls, read_embedding
from refilled.network import hub

_BY_PATCHES = ("vit_mae", "beit", "data2vec-vision", "ijepa")
"""Types trained by prediction of masked patches. Without a trained pooled output, they use the mean of patches."""

_NOT_NEEDED = ("pooler", "mask_token", "position_ids", "decoder")
"""Parts of the names of tensors that may be missing, because their output is then not used."""

_SIDE = 224  # pixels, the default


class HuggingFaceBackbone(Backbone):
    """An image network of transformers, without feature maps.

    If the network has a classifier, the embedding is the input of the classifier, and the classifier is kept. Otherwise
    the embedding is the pooled output (the class token of DINOv2, DINOv3 and CLIP, the attention pooling of SigLIP). If
    the weights have none, it is the class token. If there is no class token, or the network was trained only by masked
    patches, it is the mean of the patches. :meth:`set_pooling` chooses another output.

    Args:
        module: The network.
        mean: Mean of each channel that it expects, on the scale [0, 1].
        std: Standard deviation of each channel, on the same scale.
        input_size: Side length in pixels that images are resized to.
        pooler: Whether the weights of its pooled output, if it has one, were trained.

    Raises:
        ModelError: The network returns no embedding of images.
    """

    def __init__(
        self, module: Any, mean: Iterable[float], std: Iterable[float], input_size: int | None, pooler: bool = True
    ) -> None:
        module.float().eval()
        config = module.config
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = 0.0  # otherwise a masked autoencoder hides most of each image
        side, channels = input_size or _SIDE, getattr(config, "num_channels", 3)
        self._arguments = frozenset(inspect.signature(module.forward).parameters)
        patch = getattr(config, "patch_size", None)
        self._patch = patch if isinstance(patch, int) else None
        example = torch.linspace(-1, 1, 2 * channels * side * side).view(2, channels, side, side)
        with torch.no_grad(), linear_calls(module) as calls:
            output = self._call(module, example)
        last = find_last_linear(output, calls) if "logits" in output else None
        if "logits" in output and last is None:
            raise ModelError(f"the classifier of {type(module).__name__} is not one linear layer")
        embedding = read_embedding(output) if last is None else last.input
        super().__init__(embedding.shape[1], (), 0, tuple(mean), tuple(std), side, channels=channels)
        self.module, self._example = module, example
        self._classifies = last is not None
        self._has_pooled = last is not None or (pooler and "pooler_output" in output)
        if last is not None:
            self.classifier, self.num_classes = last.layer, last.layer.out_features
            self.class_names = tuple(str(config.id2label[number]) for number in range(self.num_classes))
        if self._patch is not None and self._is_plain() and self._takes(3 * self._patch):
            self.size_step = self._patch

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images to their embedding ``(N, d)``."""
        if self.pooling == "pooled" and self.num_classes > 0:
            with linear_calls(self.module) as calls:
                self._call(self.module, images)
            return next(call.input for call in reversed(calls) if call.layer is self.classifier), ()
        output = self._outputs(images)
        return read_embedding(output, self.pooling, self._prefix(output, images.shape[-1])), ()

    def set_pooling(self, pooling: Pooling) -> None:
        """Choose the embedding, ``pooled`` or from a transformer's tokens; the classifier is removed."""
        if pooling == self.pooling:
            return
        before, self.pooling = self.pooling, pooling
        try:
            with torch.no_grad():
                self.embedding_dim = self.embed(self._example)[0].shape[1]
        except ModelError:
            self.pooling = before
            raise
        self.classifier, self.num_classes, self.class_names = NoClassifier(), 0, None

    def default_pooling(self) -> Pooling:
        """Return the kind of output that was trained to represent the whole image."""
        if self._has_pooled:
            return "pooled"
        with torch.no_grad():
            output = self._outputs(self._example)
        tokens = output.get("last_hidden_state")
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            return "pooled"
        by_patches = self.module.config.model_type in _BY_PATCHES
        return "mean" if by_patches or not self._prefix(output, self._example.shape[-1]) else "token"

    def _outputs(self, images: Tensor) -> Any:
        """Run the network without its classifier."""
        return self._call(self.module.base_model if self._classifies else self.module, images)

    def _call(self, module: Any, images: Tensor) -> Any:
        options: dict[str, Any] = {}
        if "interpolate_pos_encoding" in self._arguments:
            options["interpolate_pos_encoding"] = True
        if (
            "noise" in self._arguments and self._patch is not None
        ):  # for a masked autoencoder, to keep the patches in order
            count = (images.shape[-1] // self._patch) ** 2
            options["noise"] = torch.arange(count, device=images.device).expand(len(images), -1)
        output = module(pixel_values=images, **options)
        if not hasattr(output, "keys"):
            raise ModelError(f"{type(module).__name__} returns an output without names: {describe_output(output)}")
        return output

    def _prefix(self, output: Any, side: int) -> int | None:
        """Return the number of tokens before the patches' tokens; None if the number of patches is not known."""
        tokens = output.get("last_hidden_state")
        if self._patch is None or not isinstance(tokens, Tensor) or tokens.ndim != 3:
            return None
        prefix = tokens.shape[1] - (side // self._patch) ** 2
        return prefix if prefix >= 0 else None  # fewer tokens if patches are merged

    def _is_plain(self) -> bool:
        """Return whether the tokens are all patches, as in plain vision transformers; others store sizes."""
        with torch.no_grad():
            return self._prefix(self._outputs(self._example), self._example.shape[-1]) is not None

    def _takes(self, side: int) -> bool:
        try:
            with torch.no_grad():
                self._call(self.module, F.interpolate(self._example[:1], (side, side)))
        except (RuntimeError, ValueError):
            return False
        return True


def load_hugging_face(
    name: str,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    input_size: int | None = None,
) -> HuggingFaceBackbone:
    """Load an image network of transformers from a folder, the cache or the hub; code in a repository is never run.

    Args:
        name: A folder written by ``save_pretrained`` or downloaded from the hub, or a name on the hub.
        mean: Mean of each channel; None: that of the image processor stored with the weights.
        std: Standard deviation of each channel; None: that of the image processor.
        input_size: Side length in pixels; None: that of the image processor.

    Raises:
        ModelError: The network does not exist, is incomplete or does not take images, or transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError("teachers of the form hf:NAME need transformers: pip install 'refilled[hf]'") from error
    with nullcontext() if Path(name).is_dir() else hub() as offline, _quiet(transformers):
        module, missing = _load(transformers, name, offline)
        processor = _processor(transformers, name)
    if needed := sorted(key for key in missing if not any(part in key for part in _NOT_NEEDED)):
        raise ModelError(f"hf:{name} lacks {len(needed)} tensors of its network: {', '.join(needed[:4])}")
    mean = mean or _numbers(processor, "image_mean", 0.0)
    std = std or _numbers(processor, "image_std", 1.0)
    if mean is None or std is None:
        raise ModelError(
            f"hf:{name} does not say how its images were normalised (it has no preprocessor_config.json): give "
            "--teacher-mean and --teacher-std"
        )
    vision = getattr(module, "vision_model", module)  # in networks for images and texts
    try:
        size = input_size or _size(processor) or getattr(vision.config, "image_size", None)
        teacher = HuggingFaceBackbone(vision, mean, std, size, pooler=not any("pooler" in key for key in missing))
    except (TypeError, RuntimeError, ValueError) as error:
        raise ModelError(f"hf:{name} is not an image network: {type(error).__name__}: {error!s:.200}") from error
    return teacher


def _load(transformers: Any, name: str, offline: str | None) -> tuple[Any, set[str]]:
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        kinds = getattr(config, "architectures", None) or [""]
        classifies = kinds[0].endswith("ForImageClassification")
        auto = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
        module, about = auto.from_pretrained(name, output_loading_info=True, trust_remote_code=False)
    except Exception as error:  # transformers and its downloads raise many unrelated types
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        where = "" if Path(name).is_dir() else ". Without internet access, download it elsewhere and give hf:FOLDER"
        why = reason[0] if offline is None else f"it is not on this machine, and {offline}"
        raise ModelError(f"hf:{name} cannot be loaded: {why}{where}") from error
    return module, set(about["missing_keys"])


def _processor(transformers: Any, name: str) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):  # it has none
        return None


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the reports of transformers; the errors and notes here have the relevant facts."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _numbers(processor: Any, name: str, otherwise: float) -> tuple[float, ...] | None:
    """Return the mean or std of an image processor, or ``otherwise`` if it does not normalise."""
    if processor is None:
        return None
    if not getattr(processor, "do_normalize", True):
        return (otherwise,) * 3
    values = getattr(processor, name, None)
    return None if values is None else tuple(float(value) for value in values)


def _size(processor: Any) -> int | None:
    """Return the side length of the images that an image processor returns."""
    for name in ("crop_size", "size") if getattr(processor, "do_center_crop", False) else ("size",):
        size = getattr(processor, name, None)
        for side in ("height", "shortest_edge"):
            value = size.get(side) if isinstance(size, dict) else getattr(size, side, None)
            if isinstance(value, int):
                return value
    return None
