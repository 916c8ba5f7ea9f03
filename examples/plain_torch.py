"""Both losses in a plain training loop: a teacher of the digits 0-4, a student of 5-9.

Stage 1 aligns the student's embedding with the teacher's comparisons. Stage 2 trains the classifier by cross-entropy
and local distillation.
"""

import torch
import torch.nn.functional as F
from digits import Network, accuracy_of, images_of, train_teacher

from refilled.losses import LocalKDLoss, TripletAlignmentLoss


def main(epochs: int = 10, teacher_epochs: int = 10) -> float:
    """Train both stages for ``epochs`` each and return the test accuracy in percent."""
    teacher = train_teacher(teacher_epochs)
    images, labels = images_of(range(5, 10))
    torch.manual_seed(0)
    student = Network(8, 5)
    alignment = TripletAlignmentLoss(temperature=2.0, reduction="mean")
    local_kd = LocalKDLoss(temperature=2.0)

    for stage in (1, 2):
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(64):
                with torch.no_grad():
                    teacher_embedding, _ = teacher(images[batch])
                embedding, logits = student(images[batch])
                if stage == 1:
                    loss = alignment(embedding, teacher_embedding, labels[batch])
                else:
                    loss = F.cross_entropy(logits, labels[batch]) + local_kd(logits, teacher_embedding, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    accuracy = accuracy_of(student, *images_of(range(5, 10), "test"))
    print(f"student of 5-9: {accuracy:.1f} % of the test images")
    return accuracy


if __name__ == "__main__":
    main()
