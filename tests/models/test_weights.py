"""Weight files as training scripts leave them: unwrapped, chosen from, refused with the reason, never run."""

import argparse
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from refilled.errors import ModelError
from refilled.models import create_model, load_teacher, open_weights, read_weights

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def state():
    return {name: value.clone() for name, value in create_model("wrn_10_1", 4).state_dict().items()}


def under(prefix, state):
    return {f"{prefix}.{name}": value for name, value in state.items()}


def other(state):
    """The weights of another moment of training."""
    return {name: value + 1 for name, value in state.items()}


def same(found, state):
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}

WRAPPED = {
    "plain": lambda s: s,
    "compiled, then on several devices": lambda s: under("module._orig_mod", s),
    "on several devices, then compiled": lambda s: under("_orig_mod.module", s),
    "several times": lambda s: {"state_dict": {"model": under("model.net.backbone.module", s)}},
    "model, state_dict": lambda s: {"model": {"state_dict": s}},
    "state_dict, model": lambda s: {"state_dict": {"model": s}},
    "averaged alone": lambda s: {"model_ema": s, "epoch": 1},
    "averaged, as timm names it": lambda s: {"state_dict_ema": s},
    "Lightning": lambda s: {"state_dict": under("model", s), "hyper_parameters": {}, "epoch": 3},
    "Lightning, with a loss": lambda s: {"state_dict": {**under("model", s), "criterion.weight": torch.ones(4)}},
    "Fabric": lambda s: {"model": under("_forward_module", s), "optimizer": OPTIMIZER},
    "sharded": lambda s: under("_fsdp_wrapped_module", s),
    "a part is compiled": lambda s: {name.replace("block1.", "block1._orig_mod."): v for name, v in s.items()},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(3), **under("module", s)},
    "an unknown key": lambda s: {"my_network": s, "epoch": 3, "optimizer": OPTIMIZER},
    "options and NumPy numbers beside": lambda s: {
        "net": s,
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.5),
        "epoch": np.int64(3),
    },
}


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_are_taken_off_until_none_is_left(tmp_path, state, wrap, new_format):
    torch.save(wrap(state), tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
    said = []
    assert same(read_weights(tmp_path / "w.pth", say=said.append), state)
    assert not [text for text in said if "criterion" not in text]


@pytest.mark.parametrize("name", ["W.SAFETENSORS", "w.safetensors", "w.pth", "w"])
def test_the_bytes_decide_the_format(tmp_path, state, name):
    save_file(state, tmp_path / name)
    assert same(read_weights(tmp_path / name), state)
    torch.save(state, tmp_path / name)
    assert same(read_weights(tmp_path / name), state)


BRANCHES = {
    "timm": (lambda new, averaged: {"state_dict": new, "state_dict_ema": averaged}, "state_dict"),
    "model_ema": (lambda new, averaged: {"model": {"state_dict": new}, "model_ema": averaged}, "model"),
    "params": (lambda new, averaged: {"params": new, "params_ema": averaged}, "params"),
    "DINO": (
        lambda new, averaged: {
            "student": under("module.backbone", new),
            "teacher": {**under("backbone", averaged), "head.mlp.0.weight": torch.ones(2)},
            "dino_loss": {"center": torch.ones(1)},
        },
        "student",
    ),
    "Lightning": (
        lambda new, averaged: {"state_dict": {**under("model", new), **under("model_ema.module", averaged)}},
        "model",
    ),
}


@pytest.mark.parametrize(("wrap", "latest"), BRANCHES.values(), ids=BRANCHES)
def test_averaged_weights_are_preferred_with_a_note_and_others_can_be_named(tmp_path, state, wrap, latest):
    path = tmp_path / "w.pth"
    torch.save(wrap(other(state), state), path)
    said = []
    assert same(read_weights(path, say=said.append), state)
    assert any(latest in text and f"{path}#" in text for text in said)
    said.clear()
    assert same(read_weights(path, latest, say=said.append), other(state))
    teacher = load_teacher(f"wrn_10_1:{path}#{latest}", mean=HALF, std=HALF)
    assert torch.equal(teacher.conv1.weight, state["conv1.weight"] + 1)
    assert load_teacher(f"wrn_10_1:{path}", mean=HALF, std=HALF).notes
    with pytest.raises(ModelError, match="has no weights under 'nothing'"):
        read_weights(path, "nothing")


def test_a_file_whose_name_has_the_sign_of_a_branch_is_that_file(tmp_path, state):
    torch.save(state, tmp_path / "a#b.pth")
    assert open_weights("wrn_10_1", f"{tmp_path}/a#b.pth").num_classes == 4


def test_several_sets_without_a_known_name_are_not_guessed_between(tmp_path, state):
    torch.save({"first": state, "second": other(state)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"several sets of weights: first, second.*w\.pth#first"):
        read_weights(tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth", "second"), other(state))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, state, value, dtype):
    spoilt = {name: v.to(dtype) if v.is_floating_point() else v for name, v in state.items()}
    spoilt["conv1.weight"] = spoilt["conv1.weight"].clone()
    spoilt["conv1.weight"][0, 0, 0, :2] = value
    torch.save(spoilt, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"NaN or infinite, in 1 of \d+ tensors: conv1\.weight \(2 of 432 numbers\)"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_with_a_note(tmp_path, state, dtype):
    converted = {name: v.to(dtype) if v.is_floating_point() else v for name, v in state.items()}
    torch.save(converted, tmp_path / "w.pth")
    said = []
    found = read_weights(tmp_path / "w.pth", say=said.append)
    assert {v.dtype for v in found.values() if v.is_floating_point()} == {torch.float32}
    assert found["bn1.num_batches_tracked"].dtype == torch.int64
    assert len(said) == 1
    assert str(dtype).removeprefix("torch.") in said[0]


def test_what_a_file_holds_instead_is_named(tmp_path):
    torch.save({"epoch": 3, "history": [1, 2]}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"holds no state dict .* but a dict of epoch, history"):
        read_weights(tmp_path / "w.pth")


def torch_script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch discourage it
        torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(path)


def numpy_archive(path):
    with path.open("wb") as file:
        np.savez(file, a=np.ones(2))


def exported(path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)


OTHERS = {
    "a pickled module": (
        lambda path: torch.save(nn.Linear(2, 2), path),
        r"torch\.nn\.modules\.linear\.Linear.*refused",
    ),
    "TorchScript": (torch_script, "TorchScript program.*refused.*state_dict"),
    "torch.export": (exported, "program of torch.export.*state_dict"),
    "NumPy": (numpy_archive, "archive of NumPy arrays"),
    "Git LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "is a web page"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "is an HDF5 file"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "compressed with gzip"),
    "tar": (lambda path: path.write_bytes(bytes(257) + b"ustar" + bytes(250)), "is a tar archive"),
    "nothing": (Path.touch, "is empty"),
}


@pytest.mark.parametrize(("write", "reason"), OTHERS.values(), ids=OTHERS)
def test_another_format_is_called_by_its_name(tmp_path, write, reason):
    path = tmp_path / "w.pt2"  # torch.export insists on the suffix
    write(path)
    with pytest.raises(ModelError, match=rf"{re.escape(str(path))}.*{reason}"):
        read_weights(path)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: under("module", s), lambda s: {"teacher": under("model", s)}])
def test_a_network_with_parts_that_are_called_like_wrappers_is_left_whole(tmp_path, wrap):
    network = {name: torch.ones(1) for name in ("encoder.conv.weight", "encoder.conv.bias", "head.weight")}
    torch.save(wrap(network), tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth", network=network.keys()).keys() == network.keys()
    assert read_weights(tmp_path / "w.pth").keys() == {"conv.weight", "conv.bias"}
