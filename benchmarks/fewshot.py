"""Few-shot tasks a second: many at once, against one by one, scikit-learn and easyfsl, in one thread.

For instance::

    python benchmarks/fewshot.py                 # all, a few minutes
    python benchmarks/fewshot.py --part heads    # classifiers of embeddings alone
    python benchmarks/fewshot.py --part students

The embeddings are random, of five classes that overlap; they are the same for everybody, and so are the tasks.
``ours`` takes all tasks together, ``one by one`` is our own code in a loop, and the peers are fitted in a loop. Of
those in a loop some tasks are timed, and tasks a second follow.

``heads``: embedding to scores. ``protonet``: from a bank of embeddings, drawing of the tasks included, as 600 tasks of
a test. ``students``: ConvNet-4s of 32 pixels trained by ReFilled's losses, one by one or so many ``together`` as one
network with grouped convolutions, in the precision that is best for the processor; as ``float32``, one by one in that
precision; and as ``plain loop`` besides in the memory layout that PyTorch takes by itself. All times are processor
time, since others may use the machine: the least of three.
"""

import argparse
from collections.abc import Callable
from functools import partial
from time import process_time

import torch
from easyfsl.methods import Finetune, PrototypicalNetworks
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from refilled import methods
from refilled.data import sample_episodes
from refilled.fewshot import students
from refilled.fewshot.bank import Bank
from refilled.fewshot.methods import load_few_shot_method
from refilled.fewshot.methods.fine_tune import tuned_classifier
from refilled.fewshot.methods.linear import logistic_regression
from refilled.fewshot.methods.protonet import prototype_scores
from refilled.fewshot.methods.svm import support_vector_machine
from refilled.models import create_model, freeze

WAY, QUERIES = 5, 15
Batch = tuple[Tensor, Tensor, Tensor]


def seconds(call: Callable[[], object], runs: int = 3) -> float:
    """Least processor time of a call."""
    times = []
    for _ in range(runs):
        start = process_time()
        call()
        times.append(process_time() - start)
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
    print(f"\nheads: tasks a second, {tasks} tasks, {WAY}-way, {QUERIES} queries a class")
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
        kept = students.students
        students.students = students.Students  # in the layout that PyTorch takes by itself
        plain = seconds(partial(train, 1, "32-true"))
        students.students = kept
        cells = [1000 * time / tasks / steps for time in (plain, *times)]
        print(f"{shots:5} " + " ".join(f"{cell:11.2f}" for cell in cells), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--part", choices=("all", "heads", "protonet", "students"), default="all")
    options.add_argument("--tasks", type=int, default=600)
    given = options.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, processor time, least of three")
    if given.part in ("all", "heads"):
        heads(given.tasks)
    if given.part in ("all", "protonet"):
        protonet(given.tasks)
    if given.part in ("all", "students"):
        train_students(tasks=8, steps=10)


if __name__ == "__main__":
    main()
