"""The answers for pictures: classes, the nearest training images, and the teacher's nearest class means."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from refilled.data import GreyRange, Split
from refilled.data.decode import describe, header_size, read_pixels
from refilled.errors import RefilledError, RunError
from refilled.losses.distances import class_centers, pairwise_distances
from refilled.models import Backbone
from refilled.runs.environment import find_device
from refilled.runs.folder import RunFolder
from refilled.runs.images import ImageRecord
from refilled.runs.inference import network_of, teachers_of
from refilled.runs.prepared import load_task_of
from refilled.runs.scoring import finite_embedding
from refilled.training.evaluation import embed, predict

NEAREST = 5
_RANKED = 3  # classes of the teacher
_THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class Refusal:
    """The reason why a picture is refused."""

    status: int
    """HTTP status. 400: damaged; 413: too large; 415: not a picture in a known format."""
    reason: str


@dataclass(frozen=True)
class Neighbours:
    """The training images and their embedding."""

    images: Split
    classes: tuple[str, ...]
    embedding: Tensor
    """``(N, d)``, L2-normalised."""

    def nearest(self, embedding: Tensor) -> list[list[dict[str, Any]]]:
        """Return the training images with the highest cosine similarity to each embedding ``(B, d)``."""
        best = (normalize(embedding) @ self.embedding.T).topk(min(NEAREST, len(self.embedding)))
        return [
            [
                {
                    "id": row,
                    "name": self.images.sources[row],
                    "class": self.classes[int(self.images.labels[row])],
                    "similarity": round(similarity, 6),
                    "thumbnail": f"thumbnails/{row}",
                }
                for row, similarity in zip(rows, similarities, strict=True)
            ]
            for rows, similarities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def thumbnail(self, row: int) -> bytes:
        """Return a training image as PNG."""
        image = Image.fromarray(self.images.pixels[row : row + 1][0].permute(1, 2, 0).contiguous().numpy())
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True)
class TeacherMeans:
    """The class means in a teacher's embedding, as in :func:`~refilled.runs.inference.teacher_accuracies`."""

    teacher: Backbone
    mean: Tensor
    centers: Tensor
    classes: tuple[str, ...]

    @classmethod
    def of(cls, teacher: Backbone, images: Split, names: tuple[str, ...]) -> "TeacherMeans":
        """Embed the training images with the teacher, and compute the mean of each class."""
        embedding = finite_embedding(teacher, images)
        mean = embedding.mean(0)
        centers, classes = class_centers(normalize(embedding - mean), images.labels)
        return cls(teacher, mean, centers, tuple(names[place] for place in classes.tolist()))

    def ranked(self, pixels: Tensor) -> list[list[dict[str, Any]]]:
        """Return the nearest classes of images ``(B, 3, S, S)`` with their distances."""
        distances = pairwise_distances(normalize(embed(self.teacher, pixels) - self.mean), self.centers)
        best = distances.topk(min(_RANKED, len(self.classes)), largest=False)
        return [
            [
                {"class": self.classes[place], "distance": round(distance, 6)}
                for place, distance in zip(places, values, strict=True)
            ]
            for places, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


class Engine:
    """A run's student, which answers requests.

    Args:
        folder: The run's folder.
        nearest: Whether to find the nearest training images, which are embedded here.
        teacher: Whether to find the teacher's nearest class means also.
        max_pixels: Maximum number of pixels per picture, checked in the header before anything is decoded.

    Raises:
        RefilledError: There is no student, or the teacher or its images cannot be opened.
    """

    def __init__(self, folder: Path, nearest: bool = True, teacher: bool = False, max_pixels: int = 50_000_000) -> None:
        if RunFolder(folder).trained_nothing:
            raise RunError(f"{folder} holds no student: its method trains nothing; serve the run of another method")
        self.model, self.max_pixels = network_of(folder).to(find_device("auto")), max_pixels
        if self.model.class_names is None or self.model.image_size is None:
            raise RunError(f"{folder} does not name the classes of its model; serve the folder of a run")
        self.classes: tuple[str, ...] = self.model.class_names
        self.image_size: int = self.model.image_size
        self.grey = None if self.model.grey_range is None else GreyRange(*self.model.grey_range)
        self.name = folder.resolve().name
        self.notes: list[str] = []
        self.neighbours: Neighbours | None = None
        self.teacher: TeacherMeans | None = None
        if nearest or teacher:
            self._look_at_training_images(folder, nearest, teacher)

    def _look_at_training_images(self, folder: Path, nearest: bool, teacher: bool) -> None:
        try:
            task = load_task_of(RunFolder(folder).run(), self.grey)
        except (RefilledError, OSError) as error:
            if teacher:
                raise
            self.notes.append(f"the nearest training images are not shown: {error}")
            return
        record = ImageRecord.load(folder)
        changes = record.changes(task) if record is not None else None
        if changes:
            self.notes.append(f"the images are not those of the run: {changes}")
        if nearest:
            self.neighbours = Neighbours(task.train, task.classes, normalize(embed(self.model, task.train.pixels)))
        if teacher:
            network = next(iter(teachers_of(folder, task.image_size).values()), None)  # the first of several
            if network is None:
                raise RunError(f"the run in {folder} has no teacher; leave out --teacher")
            self.teacher = TeacherMeans.of(network, task.train, task.classes)

    def answer(self, pictures: Sequence[bytes]) -> list[dict[str, Any] | Refusal]:
        """Return an answer for each encoded picture, in their order."""
        answers: dict[int, dict[str, Any] | Refusal] = {}
        for place, picture in enumerate(pictures):
            if (refusal := self._refusal(picture)) is not None:
                answers[place] = refusal
        places = [place for place in range(len(pictures)) if place not in answers]
        pixels, reasons = read_pixels((pictures[place] for place in places), len(places), self.image_size, self.grey)
        for position, reason in reasons.items():
            answers[places[position]] = Refusal(400, reason)
        read = [place for position, place in enumerate(places) if position not in reasons]
        if read:
            answers |= zip(read, self._predicted(pixels), strict=True)
        return [answers[place] for place in range(len(pictures))]

    def _refusal(self, picture: bytes) -> Refusal | None:
        if not picture:
            return Refusal(400, "empty")
        try:
            width, height = header_size(picture)
        except Exception as error:  # decoders raise errors of any type for damaged pictures
            return Refusal(415, describe(error))
        if width * height > self.max_pixels:
            return Refusal(413, f"too large: {width}x{height}; the limit is {self.max_pixels:,} pixels")
        return None

    def _predicted(self, pixels: Tensor) -> list[dict[str, Any]]:
        outputs = predict(self.model, pixels)
        answers: list[dict[str, Any]] = []
        for row in outputs.logits.softmax(1).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            probabilities = dict(zip(self.classes, row, strict=True))
            answers.append({"class": self.classes[best], "probability": row[best], "probabilities": probabilities})
        if self.neighbours is not None:
            for answer, nearest in zip(answers, self.neighbours.nearest(outputs.embedding), strict=True):
                answer["nearest"] = nearest
        if self.teacher is not None:
            for answer, ranked in zip(answers, self.teacher.ranked(pixels), strict=True):
                answer["teacher"] = ranked
        return answers
