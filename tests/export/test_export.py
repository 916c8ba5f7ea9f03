"""An exported student gives what the student gives, in every format."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import refilled
from refilled.cli.app import app
from refilled.errors import RefilledError
from refilled.models import create_model, save_model

NAMES = ('=cmd("x")', "naïve\n日本 \\ \x1b[31m", "<b>&'")
FAMILIES = ["wrn_10_1", "resnet8", "convnet4", "mobilenet_0.25", "resnet12_0.25", "timm/test_resnet.r160_in1k"]


def command(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def save(folder, architecture="wrn_10_1", size=32, input_size=None):
    torch.manual_seed(0)
    sizes = {"image_size": size, "input_size": input_size}
    model = create_model(architecture, 3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), **sizes)
    with torch.no_grad():
        for module in model.modules():  # statistics that would betray training mode
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    model.class_names = NAMES
    save_model(model, folder)
    return model.eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures of several shapes and kinds."""
    folder = tmp_path_factory.mktemp("pictures")
    chance = np.random.default_rng(0)
    for number, (height, width, channels) in enumerate([(40, 60, 3), (32, 32, 3), (90, 50, 4), (300, 400, 3)]):
        pixels = chance.integers(0, 255, (height, width, channels), dtype=np.uint8)
        suffix = "jpg" if height == 300 else "png"
        Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    return folder


def logits_of(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), session.get_modelmeta()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_each_family_agrees_with_torch_as_onnx(tmp_path, architecture):
    model = save(tmp_path / "run", architecture)
    command("export", tmp_path / "run", "--preprocess", "--out", tmp_path / "m.onnx")
    for number in (1, 3, 8):
        images = torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8)
        with torch.no_grad():
            expected = model(images).logits
        found, about = logits_of(tmp_path / "m.onnx", images)
        assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    said = {name: json.loads(text) for name, text in about.custom_metadata_map.items()}
    assert said["classes"] == list(NAMES)
    assert (said["size"], said["interpolation"], said["preprocess"]) == (32, "bilinear", True)
    assert said["mean"] == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "input_size"), [(84, None), (200, None), (32, 32)])
def test_a_vision_transformer_of_one_size_agrees_with_torch_in_each_format(tmp_path, size, input_size):
    """Images of another size than the transformer takes are resized inside the file."""
    model = save(tmp_path / "run", "timm/test_vit", size, input_size=input_size)
    assert model.input_size == (input_size or 160)
    onnx, program = tmp_path / "m.onnx", tmp_path / "m.pt2"
    command("export", tmp_path / "run", "--format", "onnx", "--preprocess", "--out", onnx)
    command("export", tmp_path / "run", "--format", "torch", "--preprocess", "--out", program)
    runs = {"onnx": lambda images: logits_of(onnx, images)[0], "torch": torch.export.load(program).module()}
    for number in (1, 3, 8):
        images = torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8)
        with torch.no_grad():
            expected = model(images / 255).logits  # which resizes without rounding to 8 bits
            for run in runs.values():
                found = run(images)
                assert torch.allclose(found, expected, rtol=0, atol=1e-4)
                assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.slow
def test_an_onnx_file_does_not_contain_the_paths_of_this_machine(tmp_path):
    save(tmp_path / "run")
    command("export", tmp_path / "run")
    content = (tmp_path / "run" / "export" / "model.onnx").read_bytes()
    assert b"wrn_10_1" in content
    for path in (refilled.__file__, torch.__file__, str(tmp_path)):
        assert str(Path(path).parent).encode() not in content
    assert b"stack_trace" not in content


@pytest.mark.slow
def test_an_onnx_file_and_its_script_predict_what_the_run_predicts(tmp_path, pictures):
    save(tmp_path / "run")
    command("export", tmp_path / "run")
    path = tmp_path / "run" / "export" / "model.onnx"
    expected = [json.loads(line) for line in command("predict", tmp_path / "run", pictures, "--json").splitlines()]
    found = [json.loads(line) for line in command("predict", path, pictures, "--json").splitlines()]
    paths = [each["image"] for each in expected]
    run = [sys.executable, str(path.with_name("predict.py")), str(path), *paths]
    lines = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    assert len(expected) == len(found) == len(lines) == 4
    for one, other, alone in zip(expected, found, map(json.loads, lines), strict=True):
        assert one["class"] == other["class"] == alone["class"]
        assert other["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)
        assert alone["probability"] == pytest.approx(one["probabilities"][one["class"]], abs=1e-5)


@pytest.mark.slow
def test_an_exported_torch_program_runs_without_this_package(tmp_path):
    model = save(tmp_path / "run")
    command("export", tmp_path / "run", "--format", "torch", "--preprocess", "--out", tmp_path / "m.pt2")
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import torch, json, sys; extra = {'classes': ''}\n"
        "program = torch.export.load('m.pt2', extra_files=extra).module()\n"
        "torch.save(program(torch.load('images.pt')).detach(), 'logits.pt')\n"
        "assert 'refilled' not in sys.modules; print(json.dumps(json.loads(extra['classes'])))"
    )
    run = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == list(NAMES)
    with torch.no_grad():
        assert torch.allclose(torch.load(tmp_path / "logits.pt"), model(images).logits, rtol=0, atol=1e-4)


def test_timm_loads_a_timm_student_and_its_preprocessing(tmp_path):
    import timm

    model = save(tmp_path / "run", "timm/test_resnet.r160_in1k")
    command("export", tmp_path / "run", "--format", "safetensors", "--out", tmp_path / "w")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'w'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(loaded)
    assert config["mean"] == pytest.approx((0.4, 0.5, 0.6))
    assert (tuple(config["input_size"]), config["crop_pct"]) == ((3, 32, 32), 1.0)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(loaded(model.normalize(images)), model(images).logits, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "w" / "config.json").read_text())["label_names"] == list(NAMES)


def test_weights_have_a_configuration(tmp_path):
    from safetensors.torch import load_file

    model = save(tmp_path / "run")
    command("export", tmp_path / "run", "--format", "safetensors")
    folder = tmp_path / "run" / "export" / "weights"
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["classes"]) == ("wrn_10_1", list(NAMES))


@pytest.mark.slow
def test_int8_computes_in_8_bits_and_keeps_the_classes(tmp_path):
    import onnx

    from refilled.export.int8 import count_quantized

    out = tmp_path / "run"
    flags = ["--model", "wrn_10_1", "--shots", 20, "--epochs", 15, "--threads", 1, "--quiet"]
    command("train", "digits:0-4", *flags, "--out", out)
    output = command("export", out, "--int8")
    (line,) = (line for line in output.splitlines() if line.startswith("float32 to int8: "))
    before, after = (onnx.load(str(out / "export" / name)) for name in ("model.onnx", "model.int8.onnx"))
    assert count_quantized(before)[0] == 0
    quantized, layers = count_quantized(after)
    assert quantized == layers == count_quantized(before)[1]
    _check_costs(line, out)


def _check_costs(line, out):
    """The figures of the line are those of the two files on the validation images, computed without the package."""
    from refilled.runs.inference import network_of, task_of

    val, student = task_of(out).val, network_of(out)
    images = student.normalize(val.pixels)
    before, after = (
        logits_of(out / "export" / name, images)[0].argmax(1) for name in ("model.onnx", "model.int8.onnx")
    )
    one, other = (100 * (found == val.labels).double().mean().item() for found in (before, after))
    agreement = 100 * (before == after).double().mean().item()
    assert f"accuracy {one:.2f} to {other:.2f} %" in line
    assert f"on {len(val)} validation images, {agreement:.1f} % in the same class" in line
    assert re.search(r"one image \d+\.\d\d to \d+\.\d\d ms \(\d+\.\d times (slower|faster)\)", line)
    sizes = [(out / "export" / name).stat().st_size / 1024 for name in ("model.onnx", "model.int8.onnx")]
    assert line.endswith(f"file {sizes[0]:.0f} to {sizes[1]:.0f} KiB")
    assert abs(one - other) < 15  # of 10 images


@pytest.mark.slow
def test_without_validation_images_the_costs_are_those_on_training_images(tmp_path):
    from refilled.data import Split
    from refilled.export.int8 import cost_of
    from refilled.export.onnx_file import write_onnx

    model = save(tmp_path / "run")
    write_onnx(model, tmp_path / "m.onnx", preprocess=False)
    pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        labels = model(pixels).logits.argmax(1)
    labels[:10] = -1  # without a label, so neither right nor wrong
    labels[10:16] = (labels[10:16] + 1) % 3
    train = Split(pixels, labels, [""] * 40)
    none = Split(pixels[:0], labels[:0], [])
    task = SimpleNamespace(train=train, val=none, test=train)
    cost = cost_of(tmp_path / "m.onnx", tmp_path / "m.onnx", task, repeats=1)
    assert (cost.part, cost.images, cost.agreement) == ("training", 30, 100)
    assert cost.before.accuracy == cost.after.accuracy == pytest.approx(80)
    task = SimpleNamespace(train=none, val=none, test=train)
    cost = cost_of(tmp_path / "m.onnx", tmp_path / "m.onnx", task, repeats=1)
    assert (cost.images, cost.before.accuracy, cost.agreement) == (0, None, None)


def test_a_student_is_loaded_in_python(tmp_path, pictures):
    save(tmp_path / "run")
    student = refilled.load(str(tmp_path / "run"))
    assert isinstance(student, torch.nn.Module)
    assert student.classes == NAMES
    lines = command("predict", tmp_path / "run", pictures, "--json").splitlines()
    expected = [(p["class"], pytest.approx(p["probabilities"][p["class"]])) for p in map(json.loads, lines)]
    assert student.predict(pictures) == expected
    (tmp_path / "torn.png").write_bytes(b"x")
    with pytest.raises(RefilledError, match=r"torn.png cannot be read"):
        student.predict([tmp_path / "torn.png"])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["{tmp}"], "holds no student: there is no model.json"),
        (["{tmp}/run", "--format", "onxn"], "unknown format 'onxn'; did you mean 'onnx'"),
        (["{tmp}/run", "--format", "torch", "--int8"], "--int8 quantises ONNX files"),
        (["{tmp}/run", "--format", "safetensors", "--preprocess"], "--preprocess needs --format onnx or torch"),
    ],
)
def test_a_mistake_gets_an_explanation(tmp_path, arguments, hint):
    save(tmp_path / "run")
    with pytest.raises(RefilledError) as caught:
        command("export", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert hint in str(caught.value)
    assert not list(tmp_path.rglob("export"))


def test_a_file_that_is_not_a_student_is_refused(tmp_path, pictures):
    (tmp_path / "m.onnx").write_bytes(b"not onnx")
    for name, hint in {
        "m.onnx": "is not a readable ONNX file",
        "missing.onnx": "there is no file .*missing.onnx",
    }.items():
        with pytest.raises(RefilledError, match=hint):
            command("predict", tmp_path / name, pictures)


def test_missing_packages_get_their_install_line(tmp_path, monkeypatch):
    save(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RefilledError, match=r"pip install 'refilled\[export\]'"):
        command("export", tmp_path / "run")


def test_a_file_that_differs_from_torch_is_refused(tmp_path):
    from refilled.export.student import Deployed, check_parity

    deployed = Deployed(save(tmp_path / "run")).eval()
    with torch.no_grad():
        assert check_parity(deployed, deployed, tmp_path) == 0
        with pytest.raises(RefilledError, match=r"differs from torch by 0\.00"):
            check_parity(deployed, lambda images: deployed(images) + 2e-4, tmp_path)
