"""Tasks from text, images in memory or on disk, and augmentation and batches as pure functions of the seed."""

from refilled.data.class_split import Side, list_splits
from refilled.data.episodes import Episodes, queries_left, sample_episodes
from refilled.data.grey import GreyRange
from refilled.data.loading import load_task, task_stamp
from refilled.data.opening import data_folder, list_datasets
from refilled.data.policies import AutoAugment, alter
from refilled.data.pool import load_pool
from refilled.data.samplers import Sampler, epoch_batches, joined_batches, spread
from refilled.data.statistics import channel_statistics
from refilled.data.store import Pixels, free_memory
from refilled.data.task import Split, Task
from refilled.data.task_size import TaskSize, task_size
from refilled.data.task_text import absolute_task_text
from refilled.data.transforms import Augmentation, augment
from refilled.data.views import Mixing, Views

__all__ = [
    "Augmentation",
    "AutoAugment",
    "Episodes",
    "GreyRange",
    "Mixing",
    "Pixels",
    "Sampler",
    "Side",
    "Split",
    "Task",
    "TaskSize",
    "Views",
    "absolute_task_text",
    "alter",
    "augment",
    "channel_statistics",
    "data_folder",
    "epoch_batches",
    "free_memory",
    "joined_batches",
    "list_datasets",
    "list_splits",
    "load_pool",
    "load_task",
    "queries_left",
    "sample_episodes",
    "spread",
    "task_size",
    "task_stamp",
]
