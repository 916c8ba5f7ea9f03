"""Teachers that have nothing to teach, for guard-constant.toml and guard-random.toml."""

import torch
from torch import Tensor, nn


class NearlyConstant(nn.Module):
    """The same embedding for all images up to the third decimal; an exactly constant one is refused before training."""

    def forward(self, images: Tensor) -> Tensor:
        """Embed images ``(N, 3, H, W)`` as ``(N, 64)``."""
        seeds = (1000 * images.double().abs().sum((1, 2, 3))).long().tolist()
        noise = [torch.randn(64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return 1 + 1e-3 * torch.stack(noise)


def nearly_constant() -> tuple[nn.Module, dict[str, object]]:
    """Return the nearly constant teacher."""
    return NearlyConstant(), {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def random_weights() -> nn.Module:
    """Return a WRN-16-2 that was never trained."""
    from refilled.models import create_model

    torch.manual_seed(99)
    return create_model("wrn_16_2", 5, image_size=8)
