"""Few-shot tasks per second: many at once, one by one, scikit-learn and easyfsl, in one thread.

For instance::

    python benchmarks/fewshot.py                 # all, a few minutes
    python benchmarks/fewshot.py --part heads    # classifiers of embeddings alone
    python benchmarks/fewshot.py --part students
    python benchmarks/fewshot.py --part processes

The embeddings are random, of five classes that overlap; all contestants get the same embeddings and tasks.
``ours`` takes all tasks together, ``one by one`` is our own code in a loop, and the peers are fitted in a loop. For a
loop only some tasks are timed.

``heads``: embedding to scores. ``protonet``: from a bank of embeddings, drawing of the tasks included, as 600 tasks of
a test. ``students``: ConvNet-4s of 32 pixels trained by ReFilled's losses, one by one or several ``together`` as one
network with grouped convolutions, in the precision that is best for the processor; as ``float32``, one by one in that
precision; and as ``plain loop`` also in PyTorch's default memory layout. All these times are
processor time, since others may use the machine: the least of three.

``processes``: the same students on a folder of images, by the clock: the plain loop with PyTorch's default number of
threads, and ``refilled fewshot --jobs``, one thread per process, whose accuracies must be those of one process. Other
work on the machine disturbs it, most of all the loop, whose threads wait for each other.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

import numpy as np
import torch
from easyfsl.methods import Finetune, PrototypicalNetworks
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from refilled import methods
from refilled.config import FewShotRun
from refilled.data import sample_episodes
from refilled.fewshot import students
from refilled.fewshot.bank import Bank
from refilled.fewshot.evaluation import batch_accuracies
from refilled.fewshot.methods import load_few_shot_method
from refilled.fewshot.methods.fine_tune import tuned_classifier
from refilled.fewshot.methods.linear import logistic_regression
from refilled.fewshot.methods.protonet import prototype_scores
from refilled.fewshot.methods.svm import support_vector_machine
from refilled.grid.executors import processes
from refilled.models import create_model, freeze, save_model

WAY, QUERIES = 5, 15
Batch = tuple[Tensor, Tensor, Tensor]


def seconds(call: Callable[[], object], runs: int = 3, clock: Callable[[], float] = process_time) -> float:
    """Return the least time of a call, by default processor time."""
    times = []
    for _ in range(runs):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def embeddings(tasks: int, shots: int, dim: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(tasks, WAY, dim, generator=generator)

    def draw(count: int) -> Tensor:
        labels = torch.arange(WAY).repeat_interleave(count)
        noisy = means[:, labels] + 2 * torch.randn(tasks, len(labels), dim, generator=generator)
        return nn.functional.normalize(noisy.relu(), dim=2)

    return draw(shots), torch.arange(WAY).repeat_interleave(shots), draw(QUERIES)


def by_scikit_learn(model: LogisticRegression | LinearSVC, batch: Batch, tasks: int) -> None:
    support, labels, query = batch
    for task in range(tasks):
        model.fit(support[task].numpy(), labels.numpy()).decision_function(query[task].numpy())


def by_easyfsl(model: Finetune | PrototypicalNetworks, batch: Batch, tasks: int) -> None:
    support, labels, query = batch
    for task in range(tasks):
        model.process_support_set(support[task], labels)
        model(query[task])


def one_by_one(classify: Callable[[Tensor, Tensor, Tensor], Tensor], batch: Batch, tasks: int) -> None:
    support, labels, query = batch
    for task in range(tasks):
        classify(support[task : task + 1], labels, query[task : task + 1])


def heads(tasks: int) -> None:
    print(f"\nheads: tasks per second, {tasks} tasks, {WAY}-way, {QUERIES} queries per class")
    print(f"{'':10} {'dim':>4} {'shots':>5} {'ours':>10} {'one by one':>10} {'peer':>10} {'ours/peer':>9}  peer")
    rows = {
        "linear": (logistic_regression, "sklearn LogisticRegression", LogisticRegression(max_iter=1000), 20),
        "svm": (support_vector_machine, "sklearn LinearSVC", LinearSVC(), 20),
        "fine_tune": (partial(tuned_classifier, steps=200, lr=0.01), "easyfsl Finetune, 200 steps", Finetune, 3),
        "protonet": (prototype_scores, "easyfsl PrototypicalNetworks", PrototypicalNetworks, 20),
    }
    for dim in (64, 640):
        for shots in (1, 5, 10, 30):
            batch = embeddings(tasks, shots, dim)
            for name, (classify, title, peer, timed) in rows.items():
                sklearn = not isinstance(peer, type)
                loop = partial(by_scikit_learn, peer) if sklearn else partial(by_easyfsl, peer(nn.Identity()))
                ours = tasks / seconds(partial(classify, *batch))
                alone = timed / seconds(partial(one_by_one, classify, batch, timed))
                theirs = timed / seconds(partial(loop, batch, timed))
                line = f"{name:10} {dim:4} {shots:5} {ours:10.0f} {alone:10.0f} {theirs:10.0f} {ours / theirs:8.1f}x"
                print(f"{line}  {title}", flush=True)


def protonet(tasks: int) -> None:
    """Time a whole test from a bank that knows its embeddings."""
    labels = torch.arange(20).repeat_interleave(600)
    torch.manual_seed(0)
    bank = Bank(
        torch.zeros(len(labels), 3, 16, 16, dtype=torch.uint8), freeze(create_model("resnet12", 2, image_size=16))
    )
    known = torch.ones(len(labels), dtype=torch.bool)
    bank._known[None] = torch.randn(len(labels), 640), known  # as if all had gone through the model
    learner = load_few_shot_method("protonet").learner(bank, {})
    for shots in (1, 5):
        taken = seconds(lambda shots=shots: learner(sample_episodes(labels, range(tasks), n_shot=shots)))
        print(f"\nprotonet: {tasks} tasks of {shots} shots from a bank of 640-d embeddings in {taken:.2f} s")


def write_photos(folder: Path) -> Path:
    """Write five classes of 32 pixels that differ in colour, all of them unseen but one."""
    chance = np.random.default_rng(0)
    names = [f"class {number}" for number in range(WAY + 1)]
    for name in names:
        (folder / name).mkdir(parents=True)
        color = chance.integers(0, 255, 3)
        for number in range(QUERIES + 15):
            pixels = (color + chance.normal(0, 80, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    (folder / "split.json").write_text(json.dumps({"seen": names[:1], "unseen": names[1:]}))
    return folder


@contextmanager
def plain_layout() -> Iterator[None]:
    """Train in PyTorch's default memory layout."""
    kept = students.students
    students.students = students.Students
    try:
        yield
    finally:
        students.students = kept


def share_students(jobs: int, threads: int, tasks: int, steps: int) -> None:
    """Time the tasks of a test, in one loop and shared by processes."""
    print(f"\nprocesses: tasks per second by the clock, {tasks} tasks of ReFilled, {steps} steps, 32 pixels")
    names = ("plain loop", f"{threads} threads", "1 process", f"{jobs} processes", "gain")
    print(f"{'shots':>5} " + " ".join(f"{name:>11}" for name in names))
    with TemporaryDirectory() as folder, processes(jobs) as pool:
        photos, teacher = write_photos(Path(folder) / "photos"), Path(folder) / "teacher"
        save_model(create_model("convnet4", 2, image_size=32), teacher)
        for shots in (1, 5, 10):
            run = FewShotRun(
                data=str(photos),
                method="refilled",
                settings={"steps": steps, "views": 1},
                teacher=str(teacher),
                n_shot=shots,
                device="cpu",
                threads=1,
            )
            plain = replace(run, settings={**run.settings, "precision": "32-true"}, threads=threads)
            numbers = [range(task, task + 1) for task in range(tasks)]
            for future in [pool.submit(batch_accuracies, run, numbers[0]) for _ in range(2 * jobs)]:
                future.result()  # all have begun

            def loop(run: FewShotRun, numbers: list[range] = numbers) -> list[list[float]]:
                return [batch_accuracies(run, one) for one in numbers]

            def shared(run: FewShotRun = run, numbers: list[range] = numbers) -> list[list[float]]:
                return [future.result() for future in [pool.submit(batch_accuracies, run, one) for one in numbers]]

            with plain_layout():
                batch_accuracies(plain, numbers[0])
                by_threads = seconds(partial(loop, plain), clock=perf_counter)
            batch_accuracies(run, numbers[0])
            alone, together = (seconds(way, clock=perf_counter) for way in (partial(loop, run), shared))
            assert loop(run) == shared()
            cells = [tasks / by_threads, tasks / alone, tasks / together]
            shown = f"{cells[0]:11.2f} {threads:11} {cells[1]:11.2f} {cells[2]:11.2f}"
            print(f"{shots:5} {shown} {by_threads / together:10.2f}x", flush=True)


def train_students(tasks: int, steps: int) -> None:
    """Time students, as one network and one by one."""
    print(f"\nstudents: milliseconds a task and step, {tasks} tasks of ReFilled, {steps} steps, 32 pixels")
    labels = torch.arange(20).repeat_interleave(60)
    pixels = torch.randint(
        0, 256, (len(labels), 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    torch.manual_seed(0)
    bank = Bank(pixels, freeze(create_model("convnet4", 2, image_size=32)))
    refilled = methods.load_method("refilled")
    counts = (1, 2, 4, 8)
    titles = ("plain loop", "float32", "one by one", *(f"together {n}" for n in counts[1:]))
    print(f"{'shots':>5} " + " ".join(f"{title:>11}" for title in titles))
    for shots in (1, 5, 10):
        drawn = sample_episodes(labels, range(tasks), n_shot=shots, n_query=1)

        def train(together: int, precision: students.StudentPrecision = "auto", drawn: object = drawn) -> None:
            recipe = students.StudentRecipe(steps=steps, views=1, together=together, precision=precision)
            students.student_learner(
                bank,
                lambda classes: students.with_classifier(create_model("convnet4", 2, image_size=32), classes),
                lambda student, teacher: refilled.build(student, teacher, {}),
                recipe,
            )(drawn)

        train(1)  # the bank embeds
        times = [seconds(partial(train, 1, "32-true")), *(seconds(partial(train, together)) for together in counts)]
        with plain_layout():
            plain = seconds(partial(train, 1, "32-true"))
        cells = [1000 * time / tasks / steps for time in (plain, *times)]
        print(f"{shots:5} " + " ".join(f"{cell:11.2f}" for cell in cells), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--part", choices=("all", "heads", "protonet", "students", "processes"), default="all")
    options.add_argument("--tasks", type=int, default=600)
    options.add_argument("--jobs", type=int, default=2)
    given = options.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, processor time, least of three")
    if given.part in ("all", "heads"):
        heads(given.tasks)
    if given.part in ("all", "protonet"):
        protonet(given.tasks)
    if given.part in ("all", "students"):
        train_students(tasks=8, steps=10)
    if given.part in ("all", "processes"):
        share_students(given.jobs, threads, tasks=8, steps=30)


if __name__ == "__main__":
    main()
