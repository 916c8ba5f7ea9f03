"""The values of cells: the accuracy of a finished run, or another measure, which is computed once and kept."""

import json
from pathlib import Path
from statistics import mean

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from refilled.errors import RunError
from refilled.files import read_record, write_atomic
from refilled.grid.jobs import accuracy, load
from refilled.losses.local_kd import local_kd
from refilled.methods.kd import softened_kl
from refilled.models import Backbone, create_model
from refilled.paper.cells import Cell
from refilled.paper.protocols import PROTOCOLS
from refilled.paper.schema import Measure
from refilled.runs.inference import network_of, task_of
from refilled.training.evaluation import embed, nmi

_BATCH = 128  # supplement 2.1
_BATCHES = 8
_PER_MILLE = 1000  # the norms are small


def measure(cell: Cell, run: Path, kept: Path) -> float | None:
    """Return a cell's value from its finished run, or None if the data have fewer classes than the cell needs.

    Args:
        cell: The cell.
        run: Folder of the cell's run.
        kept: Folder that caches values.
    """
    kind = cell.row.measure
    if kind == "accuracy":
        assert cell.run is not None  # an accuracy needs a run
        return accuracy(load(cell.run, run))
    about = f"{cell.student}-{cell.column.classes}-s{cell.seed}" if cell.column.classes else ""
    path = kept / f"{run.name}-{kind}-{about}.json".replace(" ", "_").replace("/", "_")
    if not path.exists():
        value = _gradient(cell, run) if cell.column.classes else _nmi(cell, run)
        kept.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(value).encode())
    try:
        recorded: float | None = TypeAdapter(float | None).validate_json(read_record(path))
    except ValidationError as error:
        raise RunError(f"{path} is damaged: it is not a number; remove it, and it is computed again") from error
    return recorded


def embed_test_images(cell: Cell, run: Path) -> tuple[Tensor, Tensor]:
    """Return a cell's student's embeddings ``(N, d)`` of the test images, and their labels ``(N,)``."""
    stage = "embedding" if cell.row.measure == "nmi after stage 1" else None
    test = task_of(run).test
    return embed(network_of(run, stage), test.pixels), test.labels


def _nmi(cell: Cell, run: Path) -> float:
    return nmi(*embed_test_images(cell, run))


def _gradient(cell: Cell, run: Path) -> float | None:
    """Measure what a distillation term adds to the classifier's gradient. The run's student is the teacher."""
    assert cell.column.classes is not None  # every column with this measure sets it
    task = task_of(run)
    if cell.column.classes > len(task.classes):
        return None
    generator = torch.Generator().manual_seed(cell.seed)
    classes = torch.randperm(len(task.classes), generator=generator)[: cell.column.classes].sort().values
    rows = torch.isin(task.train.labels, classes).nonzero().squeeze(1)
    batches = rows[torch.randperm(len(rows), generator=generator)].split(_BATCH)[:_BATCHES]
    torch.manual_seed(cell.seed)
    student, teacher = create_model(cell.student, len(classes), image_size=task.image_size), network_of(run).cpu()
    temperature = PROTOCOLS[cell.column.protocol].temperature
    pixels, labels = task.train.pixels, task.train.labels
    norms = [
        added_gradients(student, teacher, pixels[batch], labels[batch], classes, temperature)[cell.row.measure]
        for batch in batches
    ]
    return _PER_MILLE * mean(norms)


def added_gradients(
    student: Backbone, teacher: Backbone, pixels: Tensor, labels: Tensor, classes: Tensor, temperature: float
) -> dict[Measure, float]:
    r"""Measure what distillation and local distillation add to the gradient of the student's classifier.

    Added to cross-entropy, a term R contributes :math:`\partial R / \partial w_c` to the gradient of the weights
    :math:`w_c` of class c. Figure S1 shows its norm, averaged over the C classes (supplement 1.2, Eq. 5 and 6, with
    weight 1).

    Args:
        student: With C classes.
        teacher: With all classes.
        pixels: A batch of uint8 images ``(N, 3, S, S)``.
        labels: Their classes ``(N,)`` among the teacher's.
        classes: The C classes that the student has ``(C,)``, as the teacher numbers them, ascending.
        temperature: Temperature of the teacher. Distillation also uses it for the student.
    """
    student.train()
    with torch.no_grad():
        taught = teacher.eval()(pixels)
    logits = student(pixels).logits
    own = torch.searchsorted(classes, labels)
    terms: dict[Measure, Tensor] = {
        "gradient of kd": softened_kl(logits, taught.logits[:, classes], temperature),
        "gradient of local kd": local_kd(logits, taught.embedding, own, temperature=temperature),
    }
    weight = next(student.classifier.parameters())  # (C, d)
    gradients = {kind: torch.autograd.grad(term, weight, retain_graph=True)[0] for kind, term in terms.items()}
    return {kind: gradient.norm(dim=1).mean().item() for kind, gradient in gradients.items()}
