"""The teachers to compare by default, and what a candidate would download."""

from collections.abc import Sequence
from dataclasses import dataclass

from refilled.errors import ModelError
from refilled.network import no_hub

DEFAULT = (
    "timm/mobilenetv3_large_100.ra_in1k",
    "timm/resnet50.a1_in1k",
    "timm/convnext_tiny.fb_in22k",
    "timm/vit_small_patch14_dinov2.lvd142m",
)
"""Teachers with licences for any use, trained in different ways; the cheapest first."""

_BYTES = 4  # of a float32 weight


@dataclass(frozen=True)
class Download:
    """Published weights that are not on this machine yet.

    Attributes:
        candidate: Name of the teacher, in a form of ``--teacher``.
        megabytes: Size of the file in MB; None if it is not known before the download.
    """

    candidate: str
    megabytes: float | None

    def __str__(self) -> str:
        size = "size not known" if self.megabytes is None else f"{self.megabytes:,.0f} MB"
        return f"{self.candidate} ({size})"


def downloads_of(candidates: Sequence[str]) -> list[Download]:
    """Return the downloads that the candidates need, without downloading anything.

    Raises:
        ModelError: timm has no model of that name.
    """
    found = []
    for candidate in candidates:
        if candidate.startswith("timm/") and ":" not in candidate and not _timm_is_cached(candidate):
            found.append(Download(candidate, _timm_megabytes(candidate)))
    return found


def refuse_offline(downloads: Sequence[Download]) -> None:
    """Raise an error if a download is needed, but the network is not allowed or the hub cannot be reached.

    Raises:
        ModelError: A download is needed, and there is no network.
    """
    if downloads and (reason := no_hub()):
        missing = ", ".join(map(str, downloads))
        raise ModelError(
            f"{reason}, and these weights are not on this machine: {missing}. Allow the download, or give files: "
            "--candidates timm/NAME:FILE.safetensors"
        )


def _timm_is_cached(candidate: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(candidate.removeprefix("timm/"), allow_unregistered=True)
    name = None if config is None else config.hf_hub_id
    return name is not None and isinstance(try_to_load_from_cache(name, "model.safetensors"), str)


def _timm_megabytes(candidate: str) -> float | None:
    import torch

    from refilled.models.timm_backbone import timm_model

    try:
        with torch.device("meta"):  # only the shapes
            model = timm_model(candidate.removeprefix("timm/"))
    except ModelError as error:
        if "unknown timm model" in str(error):
            raise
        return None
    numbers = sum(int(tensor.numel()) for tensor in model.state_dict().values())
    return _BYTES * numbers / 1e6
