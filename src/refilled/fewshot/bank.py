"""The images of a pool and their embeddings by a frozen model. Each image goes through the model once."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refilled.data import Augmentation, Episodes, Pixels, augment
from refilled.errors import MethodError
from refilled.models import Backbone, refuse_non_finite
from refilled.training.evaluation import embed
from refilled.training.teacher_cache import VIEW_SEED

Learner = Callable[[Episodes], Tensor]
"""Scores ``(T, N Q, N)`` of the query images of T tasks. The classifiers are learned from the support images."""


Known = dict[int | None, tuple[Tensor, Tensor]]
"""By view: embeddings ``(M, d)``, and a mask ``(M,)`` of those that have been computed."""


class Bank:
    """Images by row number, with their embeddings by a frozen model. Each embedding is computed on first use.

    Args:
        pixels: uint8 ``(M, 3, S, S)``.
        sources: Names of the images, used in messages. None: row numbers.
        notes: Remarks on the model for the user.
        model: The frozen model. None for methods that need none.
        augmentation: The augmentation that makes the views of an image.
        device: The device that the model runs on. Embeddings stay on the CPU.
        head: Weights that meta-training learned in addition to the model's, by name.
        known: Embeddings by view, shared with other banks of the same images and model. New ones are added to it.
    """

    def __init__(
        self,
        pixels: Pixels,
        model: Backbone | None = None,
        *,
        augmentation: Augmentation = "none",
        device: torch.device | str = "cpu",
        head: Mapping[str, Tensor] | None = None,
        known: Known | None = None,
        sources: Sequence[str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.notes = tuple(notes)
        self._sources = sources
        self.pixels, self.augmentation, self.device = pixels, augmentation, torch.device(device)
        self.head = head or {}
        self._model = None if model is None else model.to(self.device)
        self._known: Known = {} if known is None else known

    @property
    def has_model(self) -> bool:
        """Whether the bank has a frozen model."""
        return self._model is not None

    @property
    def model(self) -> Backbone:
        """The frozen model.

        Raises:
            MethodError: The bank has none.
        """
        if self._model is None:
            raise MethodError("this method needs a model of the seen classes; pass one with --teacher")
        return self._model

    def images(self, rows: Tensor, view: int | None = None) -> Tensor:
        """Return the images of rows ``(...)`` as uint8 ``(..., 3, S, S)``. View None is not augmented."""
        flat = rows.flatten()
        pixels = self.pixels[flat]
        if view is not None:
            pixels = augment(pixels, flat, seed=VIEW_SEED, view=view, kind=self.augmentation)
        images: Tensor = pixels.unflatten(0, rows.shape)
        return images

    def embedding(self, rows: Tensor, view: int | None = None) -> Tensor:
        """Return the model's embeddings ``(..., d)`` of rows ``(...)``."""
        if view not in self._known:
            embeddings = torch.empty(len(self.pixels), self.model.embedding_dim)
            self._known[view] = embeddings, torch.zeros(len(self.pixels), dtype=torch.bool)
        embeddings, known = self._known[view]
        if not known[rows].all():
            wanted = rows.unique()
            for missing in wanted[~known[wanted]].split(256):
                computed = embed(self.model, self.images(missing, view), self.device)
                refuse_non_finite(computed, [self._name(row) for row in missing.tolist()])
                embeddings[missing] = computed
                known[missing] = True
        return embeddings[rows]

    def _name(self, row: int) -> str:
        return f"image {row}" if self._sources is None else self._sources[row]


def on_embeddings(bank: Bank, classify: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Learner:
    """Turn a classifier of embeddings into a learner.

    Args:
        bank: The images.
        classify: Maps support ``(T, S, d)``, its labels ``(S,)`` and query ``(T, Q, d)`` to scores ``(T, Q, N)``.
    """

    def learner(episodes: Episodes) -> Tensor:
        return classify(bank.embedding(episodes.support), episodes.labels, bank.embedding(episodes.query))

    return learner


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Turn labels ``(S,)``, 0 .. N - 1, into a one-hot matrix ``(S, N)`` with the dtype of ``like``."""
    member: Tensor = F.one_hot(labels).to(like)
    return member


def normalized(embedding: Tensor, normalize: bool = True) -> Tensor:
    """Scale embeddings ``(..., d)`` to unit length if ``normalize`` is set. Zero vectors stay zero."""
    return F.normalize(embedding, dim=-1) if normalize else embedding
