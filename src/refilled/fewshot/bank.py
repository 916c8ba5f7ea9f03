"""The images of a pool with what a frozen model says about them: each image goes through the model once."""

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
"""Scores ``(T, N Q, N)`` of the query images of T tasks, learned from their support images."""


Known = dict[int | None, tuple[Tensor, Tensor]]
"""Embeddings ``(M, d)`` and which of them there are ``(M,)``, by view."""


class Bank:
    """Images by row number, and their embeddings by a frozen model, computed when first asked for.

    Args:
        pixels: uint8 ``(M, 3, S, S)``.
        sources: The names of the images, for messages; None for their row numbers.
        notes: What a user should know about the model.
        model: The frozen model; None where a method needs none.
        augmentation: What the views of an image differ by.
        device: Where the model runs; embeddings stay on the CPU.
        head: Weights besides the model's that meta-training learned, by name.
        known: Embeddings, by view, that another bank of the same images and model has found, and what this one finds.
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
        """Whether there is a frozen model."""
        return self._model is not None

    @property
    def model(self) -> Backbone:
        """The frozen model.

        Raises:
            MethodError: There is none.
        """
        if self._model is None:
            raise MethodError("this method builds on a model of the seen classes; name one with --teacher")
        return self._model

    def images(self, rows: Tensor, view: int | None = None) -> Tensor:
        """Return the images of any number of rows ``(...)`` as uint8 ``(..., 3, S, S)``; None: not augmented."""
        flat = rows.flatten()
        pixels = self.pixels[flat]
        if view is not None:
            pixels = augment(pixels, flat, seed=VIEW_SEED, view=view, kind=self.augmentation)
        images: Tensor = pixels.unflatten(0, rows.shape)
        return images

    def embedding(self, rows: Tensor, view: int | None = None) -> Tensor:
        """Return the model's embeddings ``(..., d)`` of any number of rows ``(...)``."""
        if view not in self._known:
            embeddings = torch.empty(len(self.pixels), self.model.embedding_dim)
            self._known[view] = embeddings, torch.zeros(len(self.pixels), dtype=torch.bool)
        embeddings, known = self._known[view]
        if not known[rows].all():
            wanted = rows.unique()
            for missing in wanted[~known[wanted]].split(256):
                found = embed(self.model, self.images(missing, view), self.device)
                refuse_non_finite(found, [self._name(row) for row in missing.tolist()])
                embeddings[missing] = found
                known[missing] = True
        return embeddings[rows]

    def _name(self, row: int) -> str:
        return f"image {row}" if self._sources is None else self._sources[row]


def on_embeddings(bank: Bank, classify: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Learner:
    """Make a learner of a classifier of embeddings.

    Args:
        bank: The images.
        classify: Maps support ``(T, S, d)``, its labels ``(S,)`` and query ``(T, Q, d)`` to scores ``(T, Q, N)``.
    """

    def learner(episodes: Episodes) -> Tensor:
        return classify(bank.embedding(episodes.support), episodes.labels, bank.embedding(episodes.query))

    return learner


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Turn labels ``(S,)``, 0 .. N - 1, into ``(S, N)`` zeros and ones of the type of ``like``."""
    member: Tensor = F.one_hot(labels).to(like)
    return member


def normalized(embedding: Tensor, normalize: bool = True) -> Tensor:
    """Bring embeddings ``(..., d)`` to length 1, if wanted; zeros stay zeros."""
    return F.normalize(embedding, dim=-1) if normalize else embedding
