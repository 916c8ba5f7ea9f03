"""Presets: what was found to work, as values of fields. ``--preset NAME`` sets them."""

from collections.abc import Mapping
from typing import Any

from refilled.errors import RunError, unknown

# Stage 2 alone, with steadier centres than the paper's, and as much weight as the teacher deserves.
_STEADY: Mapping[str, Any] = {
    "embedding_share": 0.0,
    "centers": "global",
    "normalize": True,
    "centered": True,
    "kd_temperature": 0.2,
    "kd_weight": 4.0,
    "kd_decay": 0.0,
    "kd_average": "images",
    "trust": 1.0,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Supplement 2.1: 200 epochs for each of the two stages.
    "paper": {
        "epochs": 400,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": False,
        "schedule": "step",
        "warmup": 0.0,
    },
    # What won in docs/results.md: stage 2 alone, on the images that the teacher gets right, or no teacher at all.
    "good": {
        "method": "refilled",
        "guard": True,
        "settings": {**_STEADY, "regression_weight": 10.0, "right_only": True, "worth": 100.0},
    },
    # What won there with few images and much time: more to see, of which the teacher says what it sees itself.
    "patient": {
        "method": "refilled",
        "epochs": 400,
        "augmentation": "resized-crop-flip",
        "cutmix": 1.0,
        "settings": {**_STEADY, "kd_classes": "all", "regression_weight": 30.0},
    },
    # Supplement 2.1: the teacher's own network, slowly.
    "fine_tune": {"method": "fine_tune", "epochs": 50, "lr": 1e-4},
}
"""The fields that ``--preset`` sets; flags override them."""

WARM_START: Mapping[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.05,
    "batch_size": 16,
    "head_steps": 1000,
}
"""The recipe of the command line for students that start from weights, unless an optimiser or a rate is given."""

# For unlabelled images that are known to be of the task's own classes: the class means are refined by them. Among
# images of other classes this does harm (docs/unlabelled.md).
_OF_THE_SAME_CLASSES: Mapping[str, Any] = {"kd_refine": 3}

# For students that start from weights: the best of the settings that were tried (docs/log.md).
_FROM_WEIGHTS: Mapping[str, Any] = {"kd_classes": "all", "regression_weight": 30.0, "right_only": False}


def with_preset(name: str | None, values: Mapping[str, Any], *, from_weights: bool = False) -> dict[str, Any]:
    """Return the fields of a preset, overridden by the given values; their settings are merged.

    Args:
        name: The preset, or None.
        values: The given values.
        from_weights: Whether the student starts from weights, in a run that may use other settings for it.

    Raises:
        RunError: The preset is unknown.
    """
    if name is None:
        return dict(values)
    if name not in PRESETS:
        raise RunError(unknown("preset", name, PRESETS))
    preset = PRESETS[name]
    fields_ = {**preset, **values}
    if fields_.get("method") == preset.get("method"):
        settings = dict(preset.get("settings", {}))
        if settings and from_weights:
            settings |= _FROM_WEIGHTS
        if settings and values.get("unlabelled") == "rest":
            settings |= _OF_THE_SAME_CLASSES
        fields_["settings"] = settings | values.get("settings", {})
        return fields_
    of_the_method = {"settings", "guard"} - values.keys()  # another method has other parameters
    return {name: value for name, value in fields_.items() if name not in of_the_method}
