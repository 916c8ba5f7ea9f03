"""Students as programs of torch.export, and as weights with a configuration that timm or a script reads."""

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.export.student import Deployed, as_texts, check_parity, metadata_of
from refilled.models import Backbone, describe, from_description
from refilled.models.timm_backbone import TimmBackbone


def write_program(model: Backbone, path: Path, preprocess: bool) -> float:
    """Write a student as a program of torch.export, which ``torch.export.load`` reads without this package.

    Returns:
        The largest absolute difference of the logits.

    Raises:
        RunError: The program differs from the student.
        ModelError: The network cannot be exported.
    """
    deployed = Deployed(model, preprocess).eval()
    shapes = {"images": {0: torch.export.Dim("batch")}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporter's own future
            program = torch.export.export(deployed, (deployed.examples(2),), dynamic_shapes=shapes)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.export.save(program, path, extra_files=as_texts(metadata_of(model, preprocess)))
            loaded = torch.export.load(path).module()
    except Exception as error:  # of many kinds
        raise ModelError(f"{model.architecture} cannot be exported: {str(error).splitlines()[0]}") from error
    with torch.no_grad():
        return check_parity(deployed, loaded, path)


def write_weights(model: Backbone, folder: Path) -> float:
    """Write the weights of a student, ``model.safetensors``, with a ``config.json``.

    A timm student with timm's own embedding is written so that ``timm.create_model("local-dir:FOLDER",
    pretrained=True)`` loads it.

    Returns:
        The largest absolute difference of the logits.

    Raises:
        RunError: The weights, read again, give other logits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deployed = Deployed(model).eval()
    if isinstance(model, TimmBackbone) and model.pooling == "pooled":
        network = _for_timm(model, folder)
    else:
        _save(model, folder)
        config = {**describe(model), "preprocessing": metadata_of(model, preprocess=False)}
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        again = from_description(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        again.load_state_dict(load_file(folder / "model.safetensors"))
        network = Deployed(again.eval())

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = network(images)
        return found

    return check_parity(deployed, run, folder)


def _for_timm(model: TimmBackbone, folder: Path) -> nn.Module:
    """Write a timm model with its classifier, and return it as timm loads it."""
    import timm

    body: Any = deepcopy(model.body)
    body.reset_classifier(model.num_classes)
    body.get_classifier().load_state_dict(model.classifier.state_dict())
    side = model.input_size or model.image_size
    said = metadata_of(model, preprocess=False)
    preprocessing = {"input_size": (3, side, side), "mean": tuple(said["mean"]), "std": tuple(said["std"])}
    source = body.pretrained_cfg
    config = {
        "architecture": source["architecture"],
        "num_classes": model.num_classes,
        "num_features": body.num_features,
        "label_names": said["classes"],
        "pretrained_cfg": {
            **preprocessing,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "num_classes": model.num_classes,
            "fixed_input_size": bool(source.get("fixed_input_size")),
            "first_conv": source.get("first_conv"),
            "classifier": source.get("classifier"),
        },
        **({"model_args": {"img_size": side}} if model.size_step is not None else {}),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _save(body, folder)
    loaded: nn.Module = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True).eval()
    deployed = Deployed(model)
    if deployed.side is None:
        return loaded
    return nn.Sequential(nn.Upsample((deployed.side, deployed.side), mode="bilinear"), loaded)


def _save(network: nn.Module, folder: Path) -> None:
    state = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
