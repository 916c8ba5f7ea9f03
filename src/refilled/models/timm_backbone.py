"""Any model of the timm library (Wightman, 2019) as a teacher or a student."""

import re
import warnings
from contextlib import nullcontext
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.models.backbone import Backbone, NoClassifier, Pooling
from refilled.models.mixed_convolution import mix_convolutions
from refilled.network import hub

_BY_CLASS_TOKEN = re.compile(r"dino|eupe|lingbot")
"""Models trained by self-distillation, whose image-level loss is on the class token."""

_BY_PATCHES = re.compile(r"\.(\w*mae|mim_\w+|pt|\w*_pt)$")
"""Models trained only by masked image modelling, without an image-level loss."""


class TimmBackbone(Backbone):
    """A timm model, called through ``forward_intermediates`` and ``forward_head(pre_logits=True)``.

    The embedding is the input of timm's classifier; :meth:`set_pooling` chooses another output. The feature maps are
    timm's intermediates; some models have none. Mean and std are those of the training of timm's weights. The input
    size is timm's if the classifier is kept, and for models that are built for one size, such as plain vision
    transformers. Most of these can change to another size, which resamples their position embeddings.

    Args:
        body: The timm model. Its classifier is removed.
        num_classes: Number of classes of a fresh classifier. None: keep the classifier of ``body``, or have none if
            that is not a single linear layer, or is CLIP's projection.
    """

    def __init__(self, body: Any, num_classes: int | None = None) -> None:
        head = body.get_classifier()
        body.reset_classifier(0)
        has_maps = hasattr(body, "forward_intermediates")
        config = body.pretrained_cfg
        size = config["input_size"][-1]
        fixed = bool(config.get("fixed_input_size"))
        super().__init__(
            body.head_hidden_size,
            [level["num_chs"] for level in body.feature_info] if has_maps else (),
            num_classes or 0,
            config["mean"],
            config["std"],
            _size_of(body) if num_classes is None or fixed else None,
            channels=_channels(body),
        )
        self.body = body
        if fixed and hasattr(body, "set_input_size"):
            self.size_step = int(body.feature_info[-1]["reduction"])
        elif fixed:
            self.required_size = size
        mix_convolutions(self)
        if num_classes is None and isinstance(head, nn.Linear) and not _is_projection(head, body):
            self.classifier, self.num_classes = head, head.out_features

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images to their embedding ``(N, d)`` and timm's intermediates."""
        if not self.feature_channels:
            return self._pool(self.body.forward_features(images)), ()
        last, maps = self.body.forward_intermediates(images)
        return self._pool(last), tuple(maps)

    def set_preprocessing(
        self,
        mean: Any = None,
        std: Any = None,
        input_size: int | None = None,
    ) -> None:
        """Change the parameters of :meth:`normalize`; another size resamples the position embeddings, if any."""
        resized = self.size_step is not None and input_size not in (None, self.input_size)
        if resized:
            assert input_size is not None
            self._resize(input_size)
        super().set_preprocessing(mean, std, input_size)

    def set_pooling(self, pooling: Pooling) -> None:
        """Choose which output of a vision transformer is the embedding.

        ``pooled`` is the input of timm's classifier, ``token`` the class token, ``mean`` the mean of the patches'
        tokens, and ``both`` the concatenation of the two, each after the last norm. The classifier is removed unless
        this is its input.

        Raises:
            ModelError: The model has no tokens, or no class token.
        """
        if pooling == self._own_pooling():
            pooling = "pooled"
        if pooling == self.pooling:
            return
        has_tokens = hasattr(self.body, "num_prefix_tokens")
        if pooling != "pooled" and (
            not has_tokens or (pooling != "mean" and getattr(self.body, "cls_token", None) is None)
        ):
            what = "class token" if has_tokens else "tokens"
            raise ModelError(f"this model has no {what} and therefore no embedding '{pooling}'; use 'pooled'")
        self.pooling = pooling
        self.embedding_dim = self.body.head_hidden_size * (2 if pooling == "both" else 1)
        self.classifier, self.num_classes = NoClassifier(), 0

    def default_pooling(self) -> Pooling:
        """Return the kind of output that was trained to represent the whole image.

        For models trained by self-distillation (DINO, DINOv2, DINOv3, EUPE), it is the class token. For models trained
        only by masked image modelling (MAE, BEiT and EVA-02 before fine-tuning), no output was trained for this, and it
        is the mean of the patches. For all others, and if there is a classifier, it is the input of timm's classifier:
        the attention pooling of SigLIP, the class token of CLIP before its projection, the mean of the last map of
        convolutional networks.
        """
        if self.num_classes > 0:
            return "pooled"
        config = self.body.pretrained_cfg
        name = f"{config['architecture']}.{config.get('tag') or ''}"
        has_token = getattr(self.body, "cls_token", None) is not None
        if has_token and _BY_CLASS_TOKEN.search(name):
            return "token"
        if has_token and _BY_PATCHES.search(name) and "clip" not in name:
            return "mean"
        return "pooled"

    def _own_pooling(self) -> Pooling:
        """Return our name of timm's own pooling."""
        if hasattr(self.body, "head_dist"):  # two class tokens, averaged
            return "pooled"
        names: dict[str, Pooling] = {"token": "token", "avg": "mean"}
        return names.get(str(getattr(self.body, "global_pool", None)), "pooled")

    def _pool(self, last: Tensor) -> Tensor:
        if self.pooling == "pooled":
            embedding: Tensor = self.body.forward_head(last, pre_logits=True)
            return embedding
        parts = {"token": ("token",), "mean": ("mean",), "both": ("token", "mean")}[self.pooling]
        patches = last[:, self.body.num_prefix_tokens :]
        found = {"token": last[:, 0], "mean": patches.mean(1, dtype=torch.promote_types(last.dtype, torch.float32))}
        norm = getattr(self.body, "fc_norm", None) or nn.Identity()  # the last norm, if it comes after pooling
        return torch.cat([norm(found[part]) for part in parts], 1)

    def _resize(self, side: int) -> None:
        assert self.size_step is not None  # checked by the caller
        if side < self.size_step or side % self.size_step:
            near = max(1, side // self.size_step) * self.size_step
            raise ModelError(
                f"this model takes images whose side is a multiple of {self.size_step} pixels, such as {near} or "
                f"{near + self.size_step}; got {side}"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about slow paths, which run only once
                self.body.set_input_size((side, side))
        except Exception as error:  # each family raises different types
            raise ModelError(f"this model cannot take images of {side} pixels: {error}") from error


def first_convolution(body: Any) -> str | None:
    """Return the name of the first convolution of a timm model, if timm records one."""
    name = body.pretrained_cfg.get("first_conv")
    return name if isinstance(name, str) else None


def _channels(body: Any) -> int:
    name = first_convolution(body)
    return 3 if name is None else int(body.get_submodule(name).weight.shape[1])


def _size_of(body: Any) -> int:
    """Return the side length that a model is built for, or that of its published weights."""
    built_for = getattr(getattr(body, "patch_embed", None), "img_size", None)
    return int((built_for or body.pretrained_cfg["input_size"])[-1])


def _is_projection(head: nn.Linear, body: Any) -> bool:
    """Return whether the last layer is CLIP's projection to the space shared with texts; its bias is 0 in timm."""
    config = body.pretrained_cfg
    of_clip = "clip" in f"{config['architecture']}.{config.get('tag') or ''}"
    return of_clip and (head.bias is None or not head.bias.any())


def timm_classifiers(body: Any) -> list[str]:
    """Return the names of a timm model's classifiers, which are several in some models."""
    names = body.pretrained_cfg["classifier"]
    return [names] if isinstance(names, str) else list(names)


def timm_model(name: str, pretrained: bool = False, **options: Any) -> Any:
    """Build the timm model ``name``, with its published weights (downloaded on first use) or fresh ones.

    Args:
        name: The name in timm.
        pretrained: Whether to load the published weights.
        options: Further arguments of :func:`timm.create_model`, such as ``in_chans``.

    Raises:
        ModelError: Timm has no such name or weights, or cannot download them.
    """
    import timm  # takes a second, so import only when used

    if not timm.is_model(name):
        near = get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        guess = f"; did you mean {' or '.join(f'timm/{model}' for model in near)}?" if near else ";"
        raise ModelError(f"unknown timm model '{name}'{guess} timm.list_models() lists all")
    offline = None
    try:
        with hub() if pretrained else nullcontext() as offline:
            return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # timm and its downloads raise a dozen unrelated types
        if not pretrained:
            raise ModelError(f"timm/{name} cannot be built: {error}") from error
        why = f"{error}" if offline is None else f"they are not on this machine, and {offline}."
        raise ModelError(
            f"the published weights of timm/{name} cannot be loaded: {why} Without internet access, download the "
            f"file elsewhere and give timm/{name}:FILE.safetensors"
        ) from error
