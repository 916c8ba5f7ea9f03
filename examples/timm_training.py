"""Distillation in the style of timm's training script: timm's models, optimizer and scheduler.

With ``pretrained=True`` the teacher has its published weights of ImageNet, which timm downloads.
"""

import timm
import torch
import torch.nn.functional as F
from digits import images_of
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from refilled.losses import LocalKDLoss, TripletAlignmentLoss


def photographs(part: str) -> tuple[Tensor, Tensor]:
    """Return colour images ``(N, 3, 32, 32)`` and labels; load your own here, with timm's transforms."""
    images, labels = images_of(range(5, 10), part)
    return F.interpolate(images, 32).expand(-1, 3, -1, -1), labels


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Return the pooled embedding of any timm model."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


def train_one_epoch(epoch, student, teacher, data, optimizer, scheduler, losses) -> float:
    """Train for one epoch and return the mean loss."""
    meter = AverageMeter()
    batches = torch.randperm(len(data[0])).split(64)
    student.train()
    for step, batch in enumerate(batches):
        images, labels = data[0][batch], data[1][batch]
        with torch.no_grad():
            teacher_embedding = embed(teacher, images)
        embedding = embed(student, images)
        logits = student.get_classifier()(embedding)
        loss = F.cross_entropy(logits, labels)
        loss = loss + 0.1 * losses["alignment"](embedding, teacher_embedding, labels)
        loss = loss + losses["local_kd"](logits, teacher_embedding, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        meter.update(loss.item(), len(labels))
        scheduler.step_update(num_updates=epoch * len(batches) + step)
    scheduler.step(epoch + 1)
    return meter.avg


def main(teacher: str = "resnet18", student: str = "resnet10t", epochs: int = 3, pretrained: bool = False) -> float:
    """Train the student and return its test accuracy in percent."""
    torch.manual_seed(0)
    teacher_model = timm.create_model(teacher, pretrained=pretrained, num_classes=0).eval().requires_grad_(False)
    student_model = timm.create_model(student, num_classes=5)
    optimizer = create_optimizer_v2(student_model, opt="adamw", lr=2e-3, weight_decay=0.02)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=0)
    losses = {"alignment": TripletAlignmentLoss(reduction="mean"), "local_kd": LocalKDLoss(normalize=True)}
    data = photographs("train")
    for epoch in range(epochs):
        mean = train_one_epoch(epoch, student_model, teacher_model, data, optimizer, scheduler, losses)
        print(f"epoch {epoch}: loss {mean:.3f}")
    images, labels = photographs("test")
    with torch.no_grad():
        (top1,) = accuracy(student_model.eval()(images), labels)
    print(f"student: {top1.item():.1f} % of the test images")
    return top1.item()


if __name__ == "__main__":
    main()
