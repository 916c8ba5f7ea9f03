"""The optimiser of a recipe, and its state as tensors, for a saved state of training."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from refilled.recipe import Recipe


def create_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Create the recipe's optimiser, with a fused step if the device has one."""
    fused = device.type in ("cpu", "cuda")
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=recipe.lr, betas=(recipe.momentum, 0.999), weight_decay=recipe.weight_decay, fused=fused
        )
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of an optimiser's state as ``<number of the parameter>/<entry>``, for example its momentum."""
    state = optimizer.state_dict()["state"]
    return {
        f"{i}/{name}": value for i, entries in state.items() for name, value in entries.items() if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the state that :func:`optimizer_tensors` returned, in an optimiser of the same parameters.

    Args:
        optimizer: The optimiser.
        tensors: The saved state.
        device: Device of the parameters, on which AdamW counts its steps.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        index, entry = name.split("/")
        parameter = parameters[int(index)]
        if entry == "step":  # AdamW counts its steps in a tensor
            optimizer.state[parameter][entry] = value.to(device)
            continue
        # In the memory layout of its parameter: the fused step walks both in the order of memory.
        optimizer.state[parameter][entry] = torch.empty_like(parameter).copy_(value)
