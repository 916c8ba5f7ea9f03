"""On an NVIDIA GPU: the same views, the same training as without graphs, and what a processor finds too.

Most other tests run there too where there is one, since ``auto`` chooses it.
"""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from refilled.config import FewShotRun, Run
from refilled.data import Views, load_task
from refilled.fewshot.evaluation import evaluate_few_shot
from refilled.methods import list_methods, load_method
from refilled.models import create_model, freeze, load_teacher, save_model
from refilled.runs.experiment import distill
from refilled.runs.inference import evaluate
from refilled.training.cuda_graphs import GraphedNetwork, can_be_graphed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")

RUN = Run(task="digits:5-9", student="wrn_10_1", epochs=2, batch_size=20, shots=8, threads=1, device="cuda")


def log_of(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "stage"} for entry in entries]


@pytest.mark.parametrize(
    "views", [Views("crop-flip"), Views("crop-flip", cutmix=1.0), Views("crop", mixup=0.4)], ids=str
)
def test_views_are_those_of_a_processor(views):
    pixels = torch.randint(256, (50, 3, 24, 24), dtype=torch.uint8)
    indices = torch.randperm(50)[:20]
    here = views.load(pixels, indices, seed=1, view=2)
    there = views.load(pixels.cuda(), indices, seed=1, view=2)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here)


def test_resized_views_are_those_of_a_processor_up_to_rounding():
    pixels = torch.randint(256, (50, 3, 24, 24), dtype=torch.uint8)
    views = Views("resized-crop-flip")
    here, there = (views.load(p, torch.arange(50), seed=1, view=2).cpu().int() for p in (pixels, pixels.cuda()))
    assert (here - there).abs().max() <= 1
    assert (here != there).float().mean() < 0.01


@pytest.mark.parametrize(
    "student", ["wrn_16_1", "resnet20", "mobilenet_0.25", "convnet4", "resnet12", "timm/mobilenetv3_small_050"]
)
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_graphs_change_no_bit(tmp_path, student, precision):
    run = replace(RUN, student=student, precision=precision, image_size=32)
    for graphs in (True, False):
        distill(replace(run, cuda_graphs=graphs), tmp_path / str(graphs))
    for name in ("model.safetensors", "log.jsonl"):
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()


@pytest.mark.parametrize("name", [n for n in list_methods() if load_method(n).takes_student])
def test_every_method_trains_with_graphs_as_without(teacher, tmp_path, name):
    run = replace(RUN, method=name, teacher=teacher if load_method(name).takes_teacher else None)
    if name in ("kd", "kd_vid", "dkd"):  # which compare logits
        run = replace(run, task="digits:0-4")
    for graphs in (True, False):
        distill(replace(run, cuda_graphs=graphs), tmp_path / str(graphs))
    assert log_of(tmp_path / "True") == log_of(tmp_path / "False")


def test_a_loss_leaves_alone_what_it_does_not_read():
    """Of a classifier that no loss reads the gradient is nothing: weight decay would shrink it otherwise."""
    student = create_model("wrn_10_1", 5, image_size=16).cuda().train()
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, device="cuda")
    GraphedNetwork(student, "32-true")(images, frozenset({"embedding"})).embedding.sum().backward()
    assert student.classifier.weight.grad is None
    assert all(p.grad is not None for n, p in student.named_parameters() if not n.startswith("classifier"))


def test_recording_leaves_no_trace():
    student = create_model("wrn_10_1", 5, image_size=16).cuda().train()
    teacher = freeze(create_model("wrn_10_1", 5, image_size=16).cuda())
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, device="cuda")
    other = images.flip(0)
    for network in (student, teacher):
        graphed = GraphedNetwork(network, "32-true")
        before = {name: value.clone() for name, value in network.named_buffers()}
        graphed(images, frozenset({"logits"}))
        found = graphed(other, frozenset({"logits"})).logits.clone()
        after = {name: value.clone() for name, value in network.named_buffers()}
        for name, value in network.named_buffers():
            value.copy_(before[name])
        network(images)
        torch.testing.assert_close(network(other).logits, found, rtol=0, atol=0)
        for name, value in network.named_buffers():
            torch.testing.assert_close(value, after[name], rtol=0, atol=0)


PLAIN = """
import torch
from torch import nn

class Net(nn.Module):
    num_features = 8
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.seen = nn.Conv2d(3, 8, 3), 0
    def forward_features(self, x):
        BODY
        return self.layer(x).relu().mean((2, 3))

def load():
    return Net(), {"mean": [0.5] * 3, "std": [0.5] * 3}
"""


@pytest.mark.parametrize(
    ("body", "recorded"),
    [
        ("pass", True),
        ("x = x if x[0, 0, 0, 0].item() < 0 else -x", False),  # looks at a number, which no graph can
        ("self.seen += 1; x = x * self.seen", False),  # would stand still in a graph
        ("x = x * torch.rand(3, 1, 1, device=x.device)", False),
    ],
)
def test_a_teacher_from_a_file_is_recorded_where_that_changes_nothing(tmp_path, body, recorded):
    file = tmp_path / "net.py"
    file.write_text(PLAIN.replace("BODY", body))
    teacher = freeze(load_teacher(f"{file}:load")).cuda()
    assert can_be_graphed(teacher, torch.device("cuda"), "32-true")
    graphed = GraphedNetwork(teacher, "32-true")
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, device="cuda")
    with nullcontext() if recorded else pytest.warns(UserWarning, match="runs without one"):
        graphed(images, frozenset({"embedding"}))
    if body == "pass":
        torch.testing.assert_close(graphed(images, frozenset({"embedding"})).embedding, teacher(images).embedding)
    assert torch.zeros(1, device="cuda").item() == 0  # a recording that failed leaves the GPU usable


def test_a_processor_trains_alike(teacher, tmp_path):
    run = replace(RUN, method="regression", teacher=teacher, precision="32-true", epochs=1, lr=0.01)
    for device in ("cuda", "cpu"):
        distill(replace(run, device=device), tmp_path / device)
    (there,), (here,) = log_of(tmp_path / "cuda"), log_of(tmp_path / "cpu")
    assert there == pytest.approx(here, rel=0.01)  # a GPU multiplies float32 in TensorFloat-32
    assert evaluate(tmp_path / "cuda")["images"] > 0  # what a GPU trained can be used without one


@pytest.mark.parametrize("method", ["nearest_neighbour", "linear", "svm", "fine_tune", "refilled"])
def test_few_shot_methods_find_what_a_processor_finds(photos, tmp_path, method):
    torch.manual_seed(0)
    save_model(create_model("convnet4_average", 5, image_size=16), tmp_path / "teacher")
    settings = {"steps": 4} if method == "refilled" else {}
    run = FewShotRun(
        data=str(photos), method=method, settings=settings, teacher=str(tmp_path / "teacher"), n_way=3, n_shot=2,
        n_episodes=6, device="cuda",
    )  # fmt: skip
    there, here = (evaluate_few_shot(replace(run, device=d), tmp_path / d).accuracy for d in ("cuda", "cpu"))
    assert there == pytest.approx(here, abs=1 if method != "refilled" else 15)


def test_images_go_to_the_gpu_where_there_is_room():
    task = load_task("digits:0-4", shots=3).near(torch.device("cuda"))
    assert task.train.pixels.is_cuda
    assert task.test.pixels.is_cuda
