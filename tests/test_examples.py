"""Every example runs, and its student learns."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
OF_LOSSES = ("plain_torch", "lightning_module", "metric_learning")
OF_RUNS = ("own_teacher", "own_method", "own_data")
NEEDS = {"lightning_module": "lightning", "metric_learning": "pytorch_metric_learning"}
CHANCE = 20  # percent of five classes


@pytest.fixture
def example(request, monkeypatch):
    """An example as a module, imported as when it is run as a script."""
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module(request.param)
    for name in (request.param, "digits"):
        sys.modules.pop(name, None)


# Lightning warns of its own deprecated imports, and of loaders without workers.
QUIET = {"lightning_module": pytest.mark.filterwarnings("ignore")}


@pytest.mark.slow
@pytest.mark.parametrize("example", [pytest.param(n, marks=QUIET.get(n, ())) for n in OF_LOSSES], indirect=True)
def test_the_losses_teach_in_other_peoples_loops(example):
    assert example.main(epochs=4, teacher_epochs=4) > 2 * CHANCE


@pytest.mark.slow
@pytest.mark.parametrize("example", ["timm_training"], indirect=True)
def test_timms_loop_trains(example, capsys):
    example.main(teacher="resnet10t", epochs=2)
    first, second = (float(loss) for loss in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out))
    assert second < first


@pytest.mark.slow
@pytest.mark.parametrize("example", OF_RUNS, indirect=True)
def test_runs_from_python_leave_a_whole_folder(example, tmp_path):
    assert example.main(tmp_path, epochs=3) > CHANCE
    assert list(tmp_path.glob("*/DONE"))


@pytest.mark.slow
def test_an_example_runs_as_a_script():
    command = [sys.executable, str(EXAMPLES / "plain_torch.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "% of the test images" in done.stdout


@pytest.mark.slow
def test_every_example_is_listed_and_tested():
    files = {path.stem for path in EXAMPLES.glob("*.py")} - {"digits"}
    assert files == {*OF_LOSSES, *OF_RUNS, "timm_training"}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in readme for name in files)


@pytest.mark.slow
def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
    """Lines with an exclamation mark are commands, as in Jupyter; the page is not shown, and nothing is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "pip install" in source:
            continue
        if source.startswith("!"):
            for command in source.replace("\\\n", " ").removeprefix("!").split("\n!"):
                subprocess.run(command, shell=True, check=True, timeout=300)
        else:
            exec(source.replace("from IPython.display import HTML\n", "HTML = str\n"), names)
    assert (tmp_path / "with-teacher" / "report.html").exists()
    assert names["model"].classes == tuple("0123456789")
