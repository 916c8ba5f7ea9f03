"""Any model of the timm library (Wightman, 2019) as a teacher or a student."""

from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.models.backbone import Backbone
from refilled.models.strided import mend_strided


class TimmBackbone(Backbone):
    """A timm model seen through ``forward_intermediates`` and ``forward_head(pre_logits=True)``.

    The embedding is what timm's own classifier reads; the feature maps are timm's intermediates, or none where
    the model cannot give them. Mean and std are those that timm's weights were trained with. The input size is
    timm's where the classifier is kept, and for models that take no other, such as plain vision transformers.

    Args:
        body: The timm model. Its classifier is taken off.
        num_classes: Number of classes of a fresh classifier. None keeps the classifier of ``body``, or leaves
            the model without one where that is not a single linear layer.
    """

    def __init__(self, body: Any, num_classes: int | None = None) -> None:
        head = body.get_classifier()
        body.reset_classifier(0)
        has_maps = hasattr(body, "forward_intermediates")
        config = body.pretrained_cfg
        size = config["input_size"][-1]
        self.required_size = size if config.get("fixed_input_size") else None
        super().__init__(
            body.head_hidden_size,
            [level["num_chs"] for level in body.feature_info] if has_maps else (),
            num_classes or 0,
            config["mean"],
            config["std"],
            size if num_classes is None else self.required_size,
            channels=_channels(body),
        )
        self.body = body
        mend_strided(self)
        if num_classes is None and isinstance(head, nn.Linear):
            self.classifier, self.num_classes = head, head.out_features

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images to timm's pre-logits ``(N, d)`` and its intermediates."""
        if not self.feature_channels:
            return self.body.forward_head(self.body.forward_features(images), pre_logits=True), ()
        last, maps = self.body.forward_intermediates(images)
        return self.body.forward_head(last, pre_logits=True), tuple(maps)


def first_convolution(body: Any) -> str | None:
    """Return the name of the convolution of a timm model that sees the images, where timm knows of one."""
    name = body.pretrained_cfg.get("first_conv")
    return name if isinstance(name, str) else None


def _channels(body: Any) -> int:
    name = first_convolution(body)
    return 3 if name is None else int(body.get_submodule(name).weight.shape[1])


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
