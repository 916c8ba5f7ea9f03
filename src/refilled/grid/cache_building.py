"""Parallel building of a teacher's cache."""

from pathlib import Path

from refilled.config import Run
from refilled.grid.executors import Executor
from refilled.runs.teacher_caches import build_cache
from refilled.training.teacher_cache import TeacherCache


def build_cache_together(run: Run, jobs: int, executor: Executor) -> TeacherCache:
    """Build the cache that a run would use with ``jobs`` workers, which divide its shards among them.

    A shard is complete or absent, so the replacement of a lost worker resumes from the shards on disk.

    Raises:
        RefilledError: As :func:`~refilled.runs.teacher_caches.build_cache`, or a worker was lost too often.
    """
    with executor(jobs) as pool:
        futures = [pool.submit(_build, run) for _ in range(jobs)]
        folders = [future.result() for future in futures]
    return TeacherCache.open(folders[0])


def _build(run: Run) -> Path:
    return build_cache(run, say=lambda text: None).folder
