"""Data: tasks from text, decoded images in memory, augmentation and batches as pure functions of the seed."""

from refilled.data.loading import list_datasets, load_task
from refilled.data.samplers import Sampler, epoch_batches
from refilled.data.task import Split, Task
from refilled.data.transforms import Augmentation, Mixing, augment, mixing

__all__ = [
    "Augmentation",
    "Mixing",
    "Sampler",
    "Split",
    "Task",
    "augment",
    "epoch_batches",
    "list_datasets",
    "load_task",
    "mixing",
]
