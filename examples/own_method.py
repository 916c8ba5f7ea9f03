"""A method from a Python file: contrastive agreement of student and teacher, in addition to cross-entropy.

``refilled distill photos/ --teacher timm/resnet50 --method examples/own_method.py --set weight=2`` uses it. The
function has the name of the file. Its keyword-only parameters are set with ``--set``.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled import Run
from refilled.outputs import ModelShape
from refilled.runs.experiment import distill
from refilled.stages import Stage, Term, constant


class AgreementLoss(nn.Module):
    """Each image's student embedding finds its own teacher embedding among those of the batch.

    The projector is a parameter of the loss, and is trained with the student.
    """

    def __init__(self, student_dim: int, teacher_dim: int, temperature: float) -> None:
        super().__init__()
        self.projector = nn.Linear(student_dim, teacher_dim)
        self.temperature = temperature

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of embeddings ``(N, d)`` and ``(N, D)``; the labels are not used."""
        projected = F.normalize(self.projector(student_embedding))
        similarity = projected @ F.normalize(teacher_embedding).T / self.temperature
        return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device))


def own_method(student: ModelShape, teacher: ModelShape, *, weight: float = 1.0, temperature: float = 0.1):
    """Contrast the images of a batch through the teacher's embedding, in addition to cross-entropy."""
    agreement = AgreementLoss(student.embedding_dim, teacher.embedding_dim, temperature)
    terms = {
        "ce": Term(nn.CrossEntropyLoss()),
        "agreement": Term(agreement, constant(weight), student="embedding", teacher="embedding"),
    }
    return [Stage("classifier", terms)]


def main(folder: Path | None = None, epochs: int = 10) -> float:
    """Train a teacher of 0-4 and a student of 5-9, and return the student's test accuracy in percent."""
    common = {"student": "wrn_10_1", "epochs": epochs, "batch_size": 20, "shots": 20}
    with tempfile.TemporaryDirectory() as other:
        place = folder or Path(other)
        distill(Run(task="digits:0-4", method="vanilla", **common), place / "teacher")
        run = Run(
            task="digits:5-9",
            teacher=str(place / "teacher"),
            method=str(Path(__file__).resolve()),
            settings={"weight": 2.0},
            **common,
        )
        result = distill(run, place / "student")
    print(f"student of 5-9: {result.accuracy:.1f} % of the test images")
    return result.accuracy


if __name__ == "__main__":
    main()
