"""Any model of the timm library (Wightman, 2019) as a teacher or a student."""

import re
import warnings
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.models.backbone import Backbone, NoClassifier, Pooling
from refilled.models.strided import mend_strided

_BY_CLASS_TOKEN = re.compile(r"dino|eupe|lingbot")
"""Trained by self-distillation: the loss about the whole image is that of the class token."""

_BY_PATCHES = re.compile(r"\.(\w*mae|mim_\w+|pt|\w*_pt)$")
"""Trained by masked image modelling alone: no loss is about the whole image."""


class TimmBackbone(Backbone):
    """A timm model seen through ``forward_intermediates`` and ``forward_head(pre_logits=True)``.

    The embedding is what timm's own classifier reads; see :meth:`set_pooling` for what else it may be. The feature
    maps are timm's intermediates, or none where the model cannot give them. Mean and std are those that timm's weights
    were trained with. The input size is timm's where the classifier is kept, and for models that are built for one
    size, such as plain vision transformers. Most of these can be brought to another one, which resamples their position
    embeddings.

    Args:
        body: The timm model. Its classifier is taken off.
        num_classes: Number of classes of a fresh classifier. None keeps the classifier of ``body``, or leaves
            the model without one where that is not a single linear layer, or is CLIP's projection.
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
        mend_strided(self)
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
        """Change what :meth:`normalize` does; another size resamples position embeddings where the model has some."""
        resized = self.size_step is not None and input_size not in (None, self.input_size)
        if resized:
            assert input_size is not None
            self._resize(input_size)
        super().set_preprocessing(mean, std, input_size)

    def set_pooling(self, pooling: Pooling) -> None:
        """Choose which output of a vision transformer is the embedding.

        ``pooled`` is what timm's classifier reads; ``token`` the class token, ``mean`` the mean of the patches' tokens,
        ``both`` the two, one behind the other, each after the last norm. The classifier is lost unless it reads just
        this.

        Raises:
            ModelError: the model has no tokens, or no class token.
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
            raise ModelError(
                f"this model has no {what}, so that it cannot give the embedding '{pooling}'; take 'pooled'"
            )
        self.pooling = pooling
        self.embedding_dim = self.body.head_hidden_size * (2 if pooling == "both" else 1)
        self.classifier, self.num_classes = NoClassifier(), 0

    def default_pooling(self) -> Pooling:
        """Say which output was trained to stand for the whole image.

        The class token of models trained by self-distillation (DINO, DINOv2, DINOv3, EUPE); the mean of the patches of
        those trained by masked image modelling alone (MAE, BEiT and EVA-02 before fine-tuning), where nothing was; and
        what timm's classifier reads for all others, and wherever there is a classifier: the attention pooling of
        SigLIP, the class token of CLIP before its projection, the mean of the last map of convolutional networks.
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
        """Say what timm's own pooling is called here, where it has another name."""
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
        norm = getattr(self.body, "fc_norm", None) or nn.Identity()  # where the last norm comes after pooling
        return torch.cat([norm(found[part]) for part in parts], 1)

    def _resize(self, side: int) -> None:
        assert self.size_step is not None  # whoever asks has checked it
        if side < self.size_step or side % self.size_step:
            near = max(1, side // self.size_step) * self.size_step
            raise ModelError(
                f"this model takes images whose side is a multiple of {self.size_step} pixels, such as {near} or "
                f"{near + self.size_step}; got {side}"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of slow paths, which are taken only once
                self.body.set_input_size((side, side))
        except Exception as error:  # each family checks in its own way
            raise ModelError(f"this model cannot be brought to images of {side} pixels: {error}") from error


def first_convolution(body: Any) -> str | None:
    """Return the name of the convolution of a timm model that sees the images, where timm knows of one."""
    name = body.pretrained_cfg.get("first_conv")
    return name if isinstance(name, str) else None


def _channels(body: Any) -> int:
    name = first_convolution(body)
    return 3 if name is None else int(body.get_submodule(name).weight.shape[1])


def _size_of(body: Any) -> int:
    """Return the side length that a model is built for at present, else that of its published weights."""
    built_for = getattr(getattr(body, "patch_embed", None), "img_size", None)
    return int((built_for or body.pretrained_cfg["input_size"])[-1])


def _is_projection(head: nn.Linear, body: Any) -> bool:
    """Whether the last layer leads to the space that CLIP shares with texts; timm gives it a bias of 0."""
    config = body.pretrained_cfg
    of_clip = "clip" in f"{config['architecture']}.{config.get('tag') or ''}"
    return of_clip and (head.bias is None or not head.bias.any())


def timm_model(name: str, pretrained: bool = False, **options: Any) -> Any:
    """Build the timm model ``name``, with its published weights (downloaded on first use) or fresh ones.

    Args:
        name: As timm knows it.
        pretrained: Whether with the published weights.
        options: Further arguments of :func:`timm.create_model`, such as ``in_chans``.

    Raises:
        ModelError: for a name or weights that timm does not have, or cannot fetch.
    """
    import timm  # takes a second, which those who do not use it need not wait

    if not timm.is_model(name):
        near = get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        guess = f"; did you mean {' or '.join(f'timm/{model}' for model in near)}?" if near else ";"
        raise ModelError(f"unknown timm model '{name}'{guess} timm.list_models() names all")
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # timm and the download below it raise a dozen unrelated kinds
        if not pretrained:
            raise ModelError(f"timm/{name} cannot be built: {error}") from error
        raise ModelError(
            f"the published weights of timm/{name} cannot be had: {error} Without a network, download the file "
            f"elsewhere and write timm/{name}:FILE.safetensors"
        ) from error
