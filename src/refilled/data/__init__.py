"""Data: tasks from text, decoded images in memory, augmentation and batches as pure functions of the seed."""

from refilled.data.loading import TaskSize, list_datasets, load_task, task_size
from refilled.data.samplers import Sampler, epoch_batches
from refilled.data.task import Split, Task
from refilled.data.transforms import Augmentation, Mixing, augment, mixing

__all__ = [
    "Augmentation",
    "Mixing",
    "Sampler",
    "Split",
    "Task",
    "TaskSize",
    "augment",
    "epoch_batches",
    "list_datasets",
    "load_task",
    "mixing",
    "task_size",
]
