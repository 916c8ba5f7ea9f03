"""Students as ONNX files, and what such a file says about images."""

import json
import warnings
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refilled.data import GreyRange
from refilled.errors import ModelError, RunError
from refilled.export.student import Deployed, as_texts, check_parity, metadata_of
from refilled.models import Backbone
from refilled.runs.classifying import Classifier

_INSTALL = "ONNX files need further packages: pip install 'refilled[export]'"


def need(*names: str) -> Any:
    """Import optional packages, and return the first.

    Raises:
        RunError: One is not installed.
    """
    try:
        first, *_ = [import_module(name) for name in names]
    except ImportError as error:
        raise RunError(_INSTALL) from error
    return first


def write_onnx(model: Backbone, path: Path, preprocess: bool) -> float:
    """Write a student as an ONNX file with ``predict.py`` in its folder, and compare it with torch.

    Returns:
        The largest absolute difference of the logits.

    Raises:
        RunError: The packages are missing, or the file differs from torch.
        ModelError: The network cannot be expressed in ONNX.
    """
    onnx = need("onnx", "onnxscript", "onnxruntime")
    deployed = Deployed(model, preprocess).eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporter's own future
            program = torch.onnx.export(
                deployed,
                (deployed.examples(2),),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except Exception as error:  # of many kinds
        raise ModelError(f"{model.architecture} cannot be written as ONNX: {str(error).splitlines()[0]}") from error
    assert program is not None  # always with dynamo
    proto = program.model_proto
    _leave_out_traces(proto)
    onnx.helper.set_model_props(proto, as_texts(metadata_of(model, preprocess)))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, str(path))
    script = files("refilled.export").joinpath("predict_script.py").read_bytes()
    (path.parent / "predict.py").write_bytes(script)
    return check_parity(deployed, OnnxStudent(path), path)


def _leave_out_traces(proto: Any) -> None:
    """Leave out what the exporter notes of each node: stack traces, with the paths of this machine, up to 100 KiB."""
    for function in (proto.graph, *proto.functions):
        for part in (*function.node, *function.value_info):
            del part.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]


class OnnxStudent:
    """A student in an ONNX file, run by onnxruntime on the CPU.

    Args:
        path: The file, written by :func:`write_onnx`.

    Raises:
        RunError: onnxruntime is missing.
        ModelError: The file cannot be read, or does not come from this package.
    """

    def __init__(self, path: Path) -> None:
        runtime = need("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of many kinds
            raise ModelError(f"{path} is not a readable ONNX file: {str(error).splitlines()[0]:.200}") from error
        said = self.session.get_modelmeta().custom_metadata_map
        try:
            self.metadata = {name: json.loads(text) for name, text in said.items() if name in _KEYS}
        except ValueError:
            self.metadata = {}
        if not self.metadata.keys() >= _KEYS:
            raise ModelError(f"{path} does not name its classes and image size; write it with 'refilled export'")

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Bring uint8 images ``(N, 3, S, S)`` into the form that the graph takes."""
        if self.metadata["preprocess"]:
            return pixels
        mean, std = (torch.tensor(self.metadata[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        return (pixels.float() / 255 - mean) / std

    def __call__(self, images: Tensor) -> Tensor:
        """Map images, as the graph takes them, to logits ``(N, C)``."""
        (logits,) = self.session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)


_KEYS = {"classes", "size", "mean", "std", "preprocess", "grey_range"}


def open_classifier_file(path: Path) -> Classifier:
    """Open an ONNX file as a classifier of image files, computed by onnxruntime.

    Raises:
        RefilledError: The file holds no student.
    """
    if not path.exists():
        raise RunError(f"there is no file {path}; 'refilled export RUN' writes one, or give the folder of a run")
    student = OnnxStudent(path)
    said = student.metadata
    grey = None if said["grey_range"] is None else GreyRange(*said["grey_range"])
    return Classifier(lambda pixels: student(student.preprocess(pixels)), tuple(said["classes"]), said["size"], grey)
