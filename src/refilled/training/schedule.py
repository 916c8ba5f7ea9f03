"""The schedule of a run: the epochs of each stage, and the learning rate at each time."""

import math
from collections.abc import Sequence
from itertools import pairwise

from refilled.errors import RunError
from refilled.recipe import Recipe
from refilled.stages import Stage

_FALLS = {"step": (0.2, (0.25, 0.5, 0.75)), "late-step": (0.1, (0.625, 0.75, 0.875))}
"""Factor by which the learning rate falls, and the shares of a stage after which it does."""


def share_epochs(stages: Sequence[Stage], epochs: int) -> list[int]:
    """Divide the epochs among the stages in proportion to their shares."""
    total = sum(stage.share for stage in stages)
    if total <= 0:
        raise RunError(f"the shares of the stages must add up to more than 0, not {total}")
    ends = [0]
    reached = 0.0
    for stage in stages:
        reached += stage.share
        ends.append(math.floor(epochs * reached / total + 0.5))
    return [end - begin for begin, end in pairwise(ends)]


def learning_rate(recipe: Recipe, epochs: int, time: float) -> float:
    """Return the learning rate at ``time``, in epochs since its stage of ``epochs`` began."""
    warmup = min(recipe.warmup, epochs / 2)
    if time < warmup:
        return recipe.lr * (time + 1e-2) / (warmup + 1e-2)  # above 0, because a first step of 0 would be lost
    if recipe.schedule in _FALLS:
        factor, milestones = _FALLS[recipe.schedule]
        return recipe.lr * factor ** sum(time >= milestone * epochs for milestone in milestones)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (time - warmup) / (epochs - warmup)))
