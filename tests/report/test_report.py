"""The report of a run: hostile names stay text, and the numbers are those of independent computations."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from sklearn.metrics import confusion_matrix as confusion_of_sklearn
from sklearn.metrics import recall_score, top_k_accuracy_score
from typer.testing import CliRunner

import drawn
from refilled.cli.app import app
from refilled.errors import RunError
from refilled.report.card import markdown
from refilled.report.measures import confusion_matrix, most_confused, reliability, top_accuracy
from refilled.report.push import FILES, push
from refilled.report.speed import speed_of
from refilled.runs.inference import network_of, task_of
from refilled.training.evaluation import predict_classes

NAMES = ["<script>alert(1)<⁄script>", "{{7*7}} $\\frac", "\u202egnp.txt 😀", "x" * 250]
TRAIN = ["--epochs", "2", "--threads", "1", "--quiet", "--model", "wrn_10_1"]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    drawn.folder(root, dict.fromkeys(NAMES, 8) | {NAMES[0]: 60, NAMES[2]: 5})  # the smallest is named in a note
    folder = tmp_path_factory.mktemp("runs") / "a"
    result = run("train", root, *TRAIN, "--out", folder)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    return folder


@pytest.mark.slow
def test_hostile_names_are_text_and_nothing_is_loaded(trained):
    page = _Page()
    page.feed((trained / "report.html").read_text())
    assert NAMES[0] in page.text
    assert "{{7*7}} $\\frac" in page.text
    assert "\u202e" not in page.text
    assert page.text.count("\\u202e") > 1
    assert not {"script", "iframe", "object", "link"} & set(page.tags)
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)


def test_the_page_and_the_record_have_sklearns_balanced_accuracy(trained):
    task = task_of(trained)
    found = predict_classes(network_of(trained), task.test.pixels)
    expected = 100 * recall_score(task.test.labels, found, average="macro", labels=task.test.labels.unique())
    result = json.loads((trained / "result.json").read_text())
    assert result["balanced_accuracy"] == pytest.approx(expected)
    assert f"{expected:.2f} %" in (trained / "report.html").read_text()
    assert json.loads(run("evaluate", trained, "--json").output)["balanced_accuracy"] == pytest.approx(expected)


def test_a_note_states_the_imbalance(trained):
    notes = json.loads((trained / "result.json").read_text())["data"]["notes"]
    assert any(note.startswith("the classes are imbalanced") for note in notes)


def test_measures_equal_slow_references():
    generator = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(300, 12, generator=generator)).softmax(1)
    labels = torch.randint(12, (300,), generator=generator)
    found = probabilities.argmax(1)
    confusion = confusion_matrix(found, labels, 12)
    assert confusion.tolist() == confusion_of_sklearn(labels, found, labels=range(12)).tolist()
    expected = top_k_accuracy_score(labels, probabilities, k=5, labels=range(12))
    assert top_accuracy(probabilities, labels) == pytest.approx(100 * expected)
    gap = 0.0
    for low in range(15):
        inside = [n for n, p in enumerate(probabilities.max(1).values.tolist()) if low / 15 < p <= (low + 1) / 15]
        right = sum(int(found[n] == labels[n]) for n in inside)
        gap += abs(right - sum(float(probabilities[n].max()) for n in inside))
    assert reliability(probabilities, labels).ece == pytest.approx(gap / 300, abs=1e-6)
    true, said, count = most_confused(confusion, 1)[0]
    assert count == int((confusion - confusion.diag().diag()).max()) == int(confusion[true, said])


@pytest.mark.slow
def test_no_report_and_a_failing_report(trained, tmp_path, monkeypatch):
    assert run("train", "digits:0-1", *TRAIN, "--no-report", "--out", tmp_path / "a").exit_code == 0
    assert not (tmp_path / "a" / "report.html").exists()

    def broken(*_: object):
        raise ValueError("broken")

    monkeypatch.setattr("refilled.report.page._write", broken)
    result = run("train", "digits:0-1", *TRAIN, "--out", tmp_path / "b")
    assert result.exit_code == 0
    assert "no report was written (ValueError: broken)" in " ".join(result.output.split())
    assert (tmp_path / "b" / "DONE").exists()


@pytest.mark.slow
def test_a_report_against_another_run(tmp_path):
    for seed in (0, 1):
        run("train", "digits:0-1", *TRAIN, "--seed", seed, "--no-report", "--out", tmp_path / str(seed))
    assert run("report", tmp_path / "0", "--against", tmp_path / "1").exit_code == 0
    text = (tmp_path / "0" / "report.html").read_text()
    assert "A single seed establishes nothing" in text
    assert "Classes that gained and lost" in text
    run("train", "digits:2-3", *TRAIN, "--no-report", "--out", tmp_path / "other")
    with pytest.raises(RunError, match="scored on other images"):
        raise run("report", tmp_path / "0", "--against", tmp_path / "other").exception


def test_the_card_escapes_names():
    card = markdown("<b>[x](http://a) |\n\x00")
    assert not re.search(r"[<>\[\]|\n\x00]", card)


def test_a_push_uploads_the_student_and_no_page(trained, monkeypatch):
    sent = {}

    class Api:
        def create_repo(self, name, **options):
            return f"https://huggingface.co/{name}"

        def upload_folder(self, **options):
            sent.update(options)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push(trained, "me/student").endswith("me/student")
    assert sent["allow_patterns"] == list(FILES)
    assert "report.html" not in FILES

    def offline(*_: object, **__: object):
        raise ConnectionError("offline")

    monkeypatch.setattr(Api, "create_repo", offline)
    with pytest.raises(RunError, match="was not uploaded to me/student: offline"):
        push(trained, "me/student")


def test_multiplications_are_those_of_the_formula_of_each_layer(trained):
    network = network_of(trained)
    expected = 0

    def count(layer, inputs, output):
        nonlocal expected
        weight = layer.weight
        places = output[0, 0].numel() if isinstance(layer, torch.nn.Conv2d) else 1
        expected += places * weight.numel()  # of a convolution, out × in × kernel at each place

    hooks = [
        m.register_forward_hook(count) for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    ]
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    speed = speed_of(network, 16)
    assert speed.multiplications == expected
    assert speed.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert set(speed.milliseconds) == {1, 32}
    assert all(value > 0 for value in speed.milliseconds.values())
    page = (trained / "report.html").read_text()
    assert f"{expected / 1e6:,.1f} million" in page
    assert "time per image, batch of 32" in page
    assert ", 1 thread, float32" in page
