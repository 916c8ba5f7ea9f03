"""Distillation as a Lightning module: cross-entropy, local distillation and regression of the embedding.

The teacher is part of the module, so that Lightning moves it to the right device, but it is not trained.
"""

import lightning as L
import torch
import torch.nn.functional as F
from digits import Network, accuracy_of, images_of, train_teacher
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from refilled.losses import EmbeddingRegressionLoss, LocalKDLoss


class Distillation(L.LightningModule):
    """Train a student with a frozen teacher; both return an embedding and logits."""

    def __init__(self, student: nn.Module, teacher: nn.Module, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.local_kd = LocalKDLoss(temperature=2.0)
        self.regression = EmbeddingRegressionLoss(student_dim, teacher_dim)  # holds a projector, trained too

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the sum of the three losses of a batch."""
        images, labels = batch
        with torch.no_grad():
            teacher_embedding, _ = self.teacher(images)
        embedding, logits = self.student(images)
        return (
            F.cross_entropy(logits, labels)
            + self.local_kd(logits, teacher_embedding, labels)
            + self.regression(embedding, teacher_embedding, labels)
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train the student and the losses' own parameters."""
        return torch.optim.AdamW([*self.student.parameters(), *self.regression.parameters()], lr=3e-3)


def main(epochs: int = 10, teacher_epochs: int = 10) -> float:
    """Train for ``epochs`` and return the test accuracy in percent."""
    teacher = train_teacher(teacher_epochs)
    torch.manual_seed(0)
    student = Network(8, 5)
    module = Distillation(student, teacher, 4 * student.width, 4 * teacher.width)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, DataLoader(TensorDataset(*images_of(range(5, 10))), batch_size=64, shuffle=True))
    accuracy = accuracy_of(student, *images_of(range(5, 10), "test"))
    print(f"student of 5-9: {accuracy:.1f} % of the test images")
    return accuracy


if __name__ == "__main__":
    main()
