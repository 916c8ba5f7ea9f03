"""The main job on data that come with the package: a teacher of the digits 0-4 helps students of 5-9."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from refilled.benchmark.report import Row, table, verdict, write_report
from refilled.benchmark.runner import run_grid
from refilled.data import load_task
from refilled.run import Run

TEACHER = Run(task="digits:0-4", student="wrn_16_2", epochs=20, threads=1)
STUDENT = Run(task="digits:5-9", student="wrn_10_1", epochs=60, shots=10, batch_size=32, threads=1)
METHODS = {"vanilla": "vanilla", "RKD": "rkd", "ReFilled": "refilled"}
SEEDS = range(5)


def demo(folder: Path, jobs: int = 2) -> None:
    """Train the teacher and the students, print the table, and write the page; a second call shows them again."""
    console = Console()
    console.print("Teacher: digits 0-4. Students: digits 5-9, 10 images a class, the same epochs for every method.")
    run_grid({"teacher": TEACHER}, folder)
    runs = {
        f"{method}-s{seed}": _student(method, seed, str(folder / "teacher"))
        for seed in SEEDS
        for method in METHODS.values()
    }
    results = run_grid(
        runs, folder, jobs, lambda name, result: console.print(f"  {name}: {result.accuracy:.2f} %", highlight=False)
    )
    rows = [
        Row(title, [results[f"{method}-s{seed}"] for seed in SEEDS], [folder / f"{method}-s{seed}" for seed in SEEDS])
        for title, method in METHODS.items()
    ]
    lines = table(rows, rows[0])
    shown = Table(*lines[0], title=f"Digits 5-9, {len(SEEDS)} seeds, last epoch, accuracy in percent")
    for line in lines:
        shown.add_row(*line.values())
    console.print(shown)
    console.print(verdict(rows[-1], rows[0]), highlight=False)
    page = folder / "report.html"
    write_report(
        page, "Digits: a teacher of 0-4 for students of 5-9", rows, rows[0], rows[-1], load_task(STUDENT.task).test
    )
    console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)


def _student(method: str, seed: int, teacher: str) -> Run:
    return replace(STUDENT, method=method, seed=seed, teacher=None if method == "vanilla" else teacher)
