"""The command line as people use it, mistakes included."""

import csv
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from drawn import folder
from refilled.cli.app import app, main
from refilled.config import Run
from refilled.errors import RefilledError
from refilled.presets import PRESETS

TRAIN = ["--epochs", "2", "--threads", "1", "--quiet"]


def refilled(*arguments: object, code: int = 0) -> str:
    """Run a command in this process and return what it prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of class folders with names that are hard to carry, and pictures that are easy to tell apart."""
    root = tmp_path_factory.mktemp("my photos ü")
    names = ["=cmd()", "<script>alert(1)<⁄script>", "[red]naïve[⁄red] $\\frac"]
    return folder(root, dict.fromkeys(names, 12), size=(24, 20), tinted=True)


@pytest.fixture(scope="module")
def student(tmp_path_factory, photos, teacher) -> Path:
    run = tmp_path_factory.mktemp("runs") / "student"
    refilled(
        "distill", photos, "--teacher", teacher, "--student", "wrn_10_1", "--batch-size", 9,
        "--set", "centers=leave-one-out", "--epochs", 8, "--threads", 1, "--quiet", "--out", run,
    )  # fmt: skip
    return run


@pytest.mark.slow
def test_a_folder_of_images_is_distilled_evaluated_and_used(student, photos):
    accuracy = json.loads(refilled("evaluate", student, "--json"))["accuracy"]
    result = json.loads((student / "result.json").read_text())
    assert accuracy == result["accuracy"]
    shown = refilled("evaluate", student)
    assert f"all {result['data']['images']['test']} images" in shown
    lines = refilled("predict", student, photos, "--json").splitlines()
    predictions = [json.loads(line) for line in lines]
    assert len(predictions) == 36
    for prediction in predictions:
        assert sum(prediction["probabilities"].values()) == pytest.approx(1)
        assert prediction["class"] == max(prediction["probabilities"], key=prediction["probabilities"].get)
        assert set(prediction["probabilities"]) == {path.name for path in photos.iterdir()}


@pytest.mark.slow
def test_predictions_as_csv_carry_hard_names_and_run_nothing(student, photos):
    rows = list(csv.reader(io.StringIO(refilled("predict", student, photos, "--csv"))))
    assert len(rows) == 37
    header = rows[0]
    assert header[:2] == ["image", "class"]
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row)
    assert all(float(p) <= 1 for row in rows[1:] for p in row[2:])


@pytest.mark.slow
def test_an_unreadable_image_is_named_and_the_others_are_predicted(student, photos, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    good = next(photos.rglob("*.png"))
    output = refilled("predict", student, good, tmp_path / "torn.png", "--json", code=1)
    assert output.count('"class"') == 1
    assert "torn.png: not a picture" in output


def test_lists_name_what_there_is():
    assert "triplets" in refilled("list", "methods")
    assert "kd_decay=0.05" in refilled("list", "methods")
    assert "wrn_<depth>_<width>" in refilled("list", "models")
    assert "digits" in refilled("list", "datasets")


FILES = {
    "leaves.py": "import sys\nsys.exit(3)\n",
    "breaks.py": "def breaks(student, teacher):\n    raise KeyError('x')\n",
    "gives.py": "def gives(student, teacher):\n    return 3\n",
    "rows.toml": 'title = "rows"\nseeds = [0, 1, 2]\n[run]\ntask = "digits:5-9"\nstudent = "wrn_10_1"\n'
    'epochs = 2\nthreads = 1\n[rows]\nalone = { method = "vanilla" }\n',
}
"""Methods of a user that do not work, and a comparison that does."""

MISTAKES = [
    (["distill"], "name a task or a folder"),
    (["distill", "digits:5-9", "--method", "rdk"], "did you mean 'rkd'"),
    (["distill", "digits:5-9"], "'refilled' learns from a teacher; name one with --teacher"),
    (
        ["distill", "digits:5-9", "--teacher", "no/such/folder"],
        "a teacher is a student folder, refilled/letters, timm/<name>",
    ),
    (["distill", "digits:5-9", "--teacher", "timm/resnet5O"], "did you mean timm/resnet50"),
    (["distill", "digits:5-9", "--set", "temperature"], "'temperature' is not KEY=VALUE"),
    (["distill", "digits:5-9", "--set", "temprature=2"], "did you mean 'temperature'"),
    (
        ["distill", "digits:5-9", "--set", "temperature=-1", "--teacher", "{teacher}"],
        "refilled.temperature = -1.0 is out of range; give more than 0",
    ),
    (["distill", "digits:5-9", "--resume", "x"], "x holds no run to resume"),
    (
        ["distill", "--resume", "x", "--epochs", "9", "--device", "cpu"],
        "cannot change --epochs when resuming; leave it out. --data-root",
    ),
    (["distill", "--resume", "no_run"], "no_run holds no run to resume"),
    (["distill", "digits:5-9", "--preset", "papre"], "did you mean 'paper'"),
    (["distill", "digits:5-9", "--student", "wrn_15_1", "--method", "vanilla"], "depth must be 6n + 4"),
    (["distill", "digits:5-9", "--student", "wrn16_1", "--method", "vanilla"], "did you mean 'wrn_16_1'"),
    (
        ["distill", "digits:5-9", "--teacher", "{teacher}", "--method", "kd"],
        "share 0 of 5 classes; use refilled or rkd",
    ),
    (["distill", "digits:5-9", "--method", "mine.py"], "no method file mine.py"),
    (["train", "digits:5-12"], "within the classes 0-9"),
    (["train", "no_such_data"], "unknown data set 'no_such_data'; known: cifar100"),
    (["train", "digits", "--epochs", "0"], "epochs = 0 is out of range"),
    (["train", "digits", "--time-limit", "30"], "write hours, minutes and seconds"),
    (["train", "digits", "--time-limit", "30m", "--epochs", "3"], "leave out --epochs"),
    (["train", "digits", "--lr", "nan"], "lr = nan is out of range"),
    (["train", "digits", "--device", "tpu9"], "device 'tpu9' cannot be used here"),
    (["train", "digits", "--model", "mobilenet_0"], "width must be above 0 and at most 4"),
    (["train", "digits", "--shots", "100000"], "class '0' has 128 readable images"),
    (["evaluate", "no_run"], "no_run/model.json cannot be read: No such file or directory; give the folder of a fin"),
    (["predict", "no_run", "a.png"], "no_run/model.json cannot be read: No such file or directory; give the folder"),
    (["evaluate", "{teacher}/model.json"], "model.json cannot be read: Not a directory; give the folder of a finished"),
    (["evaluate", "{teacher}", "digits:5-9"], "does not know: 5, 6, 7, 8, 9. Select the others, as in TASK:NAME"),
    (["predict", "{teacher}", "a.png", "--csv", "--json"], "--json and --csv cannot be combined; give one of them"),
    (["predict", "no.onnx", "a.png"], "there is no file no.onnx; 'refilled export RUN' writes one"),
    (["export", "{teacher}", "--out", "."], ". is a folder; give a file, as in --out model.onnx"),
    (["export", "{teacher}", "--format", "ONNX"], "did you mean 'onnx'"),
    (["push", "{teacher}", "student"], "'student' does not name a repository; give USER/NAME"),
    (["push", "{teacher}", "https://huggingface.co/me/student"], "does not name a repository; give USER/NAME"),
    (["push", ".", "me/student"], ". holds no finished run"),
    (["train", "digits", "--momentum", "0"], "nesterov needs a momentum above 0; raise --momentum, or add --no-nes"),
    (["train", "digits", "--threads", "1000000"], "threads = 1000000 is out of range; give a number from 1 to 4096"),
    (["train", "digits", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    (["train", "digits", "--optimizer", "adamw"], "is a learning rate for SGD; AdamW needs about 0.001"),
    (["train", "digits", "--out", "{teacher}"], "holds a finished run; choose another --out, or replace it with"),
    (["distill", "digits:5-9", "--method", "leaves.py"], "leaves.py cannot be imported: SystemExit: 3"),
    (["distill", "digits:5-9", "--method", "breaks.py"], "breaks.py:2: KeyError: 'x'"),
    (["distill", "digits:5-9", "--method", "gives.py"], "method 'gives' must return a list of one or more stages"),
    (["distill", "digits:5-9", "--method", "vanilla", "--set", "lr=0.1"], "unknown parameter 'lr'"),
    (["distill", "digits:5-9", "--teacher", "{teacher}", "--set", "kd_weight=-1"], "kd_weight = -1.0 is out of range"),
    (["distill", "digits:5-9", "--teacher", "{teacher}", "--teacher", "{teacher}"], "is named twice; name different"),
    (["distill", "digits:5-9", "--teacher", "{teacher}", "--teacher-size", "9999"], "teacher_size = 9999 is out of r"),
    (["compare", "digits:5-9", "--methods", "rkd"], "'rkd' learns from a teacher; name one with --teacher"),
    (["compare", "no_such_data", "--methods", "vanilla"], "unknown data set 'no_such_data'"),
    (["tune", "digits:5-9", "--search", "lr=0.1,0.2"], "'refilled' learns from a teacher; name one with --teacher"),
    (["reproduce", "Table2"], "did you mean 'table2'"),
    (["reproduce", "table2", "--only", "/nowhere", "--dry-run"], "unknown column 'nowhere'"),
    (["teachers", "digits", "--candidates", "{teacher}", "--sizes", "9999"], "'9999' is not a size in pixels; give"),
    (["embed", "{teacher}", "a.png", "--out", "a"], "a must end in one of .parquet, .csv, .npz"),
    (["labels", "{teacher}", "--out", "a.html"], "a.html must end in .csv"),
    (["report", "."], ". holds no finished run"),
    (["list", "metods"], "did you mean 'methods'"),
    (["compare", "missing.toml"], "missing.toml cannot be read"),
    (["compare", "rows.toml", "--epochs", "3", "--set", "gamma=1"], "change it instead of giving --set, --epochs"),
    (["compare", "digits:5-9", "--methods", "vanilla,rdk", "--teacher", "{teacher}"], "did you mean 'rkd'"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "hint"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_gets_an_explanation_and_trains_nothing(teacher, tmp_path, monkeypatch, arguments, hint):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    arguments = [argument.format(teacher=teacher) for argument in arguments]
    with pytest.raises(RefilledError) as caught:
        refilled(*arguments)
    assert hint in str(caught.value)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    assert left == set(FILES)


@pytest.mark.parametrize(
    "arguments", [["distil"], ["train"], ["train", "digits", "--epochs", "many"], ["--no-such-flag"]]
)
def test_a_mistyped_command_line_exits_with_2(arguments):
    refilled(*arguments, code=2)


def test_a_known_error_is_one_red_line_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["refilled", "distill", "digits:5-9", "--method", "[/b]\x1b[31mrdk"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown method '[/b]\\x1b[31mrdk'")
    assert "Traceback" not in error
    monkeypatch.setattr(sys, "argv", ["refilled", "--debug", "distill", "digits:5-9", "--method", "rdk"])
    with pytest.raises(RefilledError):
        main()


@pytest.mark.slow
def test_the_rows_of_a_comparison_share_how_a_preset_trains(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    flags = [
        "digits:5-9",
        "--teacher",
        teacher,
        "--student",
        "wrn_10_1",
        "--shots",
        4,
        "--epochs",
        1,
        "--threads",
        1,
    ]
    preset = ["--preset", "patient", "--views", 2, "--methods", "vanilla,refilled:patient", "--seeds", 1]
    refilled("compare", *flags, *preset, "--out", tmp_path / "c")
    alone, taught = (
        Run.from_toml((tmp_path / "c" / name / "run.toml").read_text())
        for name in ("vanilla-s0", "refilled_patient-s0")
    )
    for run in (alone, taught):
        assert (run.epochs, run.views, run.cutmix, run.augmentation) == (1, 2, 1.0, "resized-crop-flip")
    assert taught.settings["regression_weight"] == PRESETS["patient"]["settings"]["regression_weight"]


@pytest.mark.slow
def test_seeds_and_place_of_a_described_comparison_may_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.toml").write_text(FILES["rows.toml"])
    refilled("compare", "rows.toml", "--seeds", 1, "--threads", 2, "--no-report")
    assert [path.name for path in (tmp_path / "runs" / "rows").glob("*/run.toml")] == ["run.toml"]
    assert Run.from_toml((tmp_path / "runs" / "rows" / "alone-s0" / "run.toml").read_text()).threads == 2


@pytest.mark.slow
def test_a_preset_sets_what_is_not_given_explicitly(teacher, tmp_path):
    common = ["digits:5-9", "--student", "wrn_10_1", "--shots", 5, *TRAIN, "--preset", "good"]
    refilled("distill", *common, "--teacher", teacher, "--set", "kd_weight=2", "--out", tmp_path / "a")
    settings = Run.from_toml((tmp_path / "a" / "run.toml").read_text()).settings
    assert settings["regression_weight"] == 10
    assert settings["centers"] == "global"
    assert settings["kd_weight"] == 2
    refilled("distill", *common, "--method", "vanilla", "--out", tmp_path / "b")
    assert Run.from_toml((tmp_path / "b" / "run.toml").read_text()).settings == {}


@pytest.mark.slow
def test_few_images_get_more_epochs_unless_epochs_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr("refilled.cli.options._LEAST_STEPS", 61)
    common = ["train", "digits:5-9", "--shots", 1, "--val", 0, "--model", "wrn_10_1", "--threads", 1]
    for name, flags in {"many": [], "few": ["--epochs", 2]}.items():
        refilled(*common, *flags, "--out", tmp_path / name)
    entries = {name: (tmp_path / name / "log.jsonl").read_text().count("\n") for name in ("many", "few")}
    assert entries == {"many": 61, "few": 2}


def test_every_field_of_a_run_is_a_flag_with_help():
    shown = re.sub(r"\s+", " ", CliRunner().invoke(app, ["distill", "--help"], env={"COLUMNS": "200"}).output)
    for flag in ("--epochs", "--teacher-mean", "--views", "--data-root", "--no-nesterov", "--set"):
        assert flag in shown
    assert "Peak learning rate" in shown


COMMANDS = [[name] for name in sorted(typer.main.get_command(app).commands) if name != "cache"]


@pytest.mark.parametrize(
    "command", [[], *COMMANDS, ["cache"], *(["cache", name] for name in ("build", "info", "verify"))]
)
def test_help_fits_80_columns_and_gives_defaults_as_values_of_the_command_line(command):
    lines = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80"}).output.splitlines()
    assert max(map(len, lines)) <= 80
    shown = "\n".join(lines)
    assert "…" not in shown  # nothing is cut
    assert not re.search(r"\b(?:None|True|False)\b", shown)
    for text in ("Show this message", "Peak learning rate", "Folder of the data", "Leave out unreadable"):
        assert all(line.index(text) < 50 for line in lines if text in line)  # 30 columns or more for the help texts


@pytest.mark.slow
def test_an_interrupted_run_prints_how_to_resume_and_resumes(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", "from refilled.cli.app import main; main()"]
    begin = [
        "train",
        "digits",
        "--model",
        "wrn_10_1",
        "--epochs",
        "60",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "a b"),
    ]
    with subprocess.Popen([*command, *begin], stderr=subprocess.PIPE, text=True) as process:
        while (tmp_path / "a b" / "log.jsonl").exists() is False and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"Resume with: refilled distill --resume '{tmp_path / 'a b'}'" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]
    done = subprocess.run(
        [*command, "distill", "--resume", str(tmp_path / "a b"), "--image-memory", "3", "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accuracy"] > 50
    assert "image_memory = 3.0" in (tmp_path / "a b" / "run.toml").read_text()


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert refilled("--version").strip() == f"refilled {version('refilled')}"
