"""Distributed training: several processes train one student, with the result of a single process.

``torchrun`` starts the same command several times. Each process, a *rank*, runs teacher and student on its part of
every batch. The outputs of all ranks are gathered, and every rank computes the loss of the whole batch, because
triplets, class centres and softmaxes depend on all of its images. In the backward pass, a rank follows only its own
rows of the gathered outputs. Each rank thus holds a part of the gradient. The sum of the parts is the gradient of a
single process.

For this reason the student is not wrapped in DistributedDataParallel, which averages gradients where a sum is needed.
It also expects a gradient for every parameter, but a stage that trains the embedding gives the classifier none.

Batch norm takes its mean and variance over the images of all ranks. Otherwise the result would depend on the number of
ranks. torch's SyncBatchNorm works only on GPUs, and it replaces modules, although a module such as timm's may do more
than batch norm. Here the call of the batch-norm function is intercepted instead.
"""

import os
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.overrides import TorchFunctionMode

from refilled.errors import RankError, RefilledError, RunError
from refilled.losses.distances import at_least_float32
from refilled.outputs import Outputs, not_computed

T = TypeVar("T")

_RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TO_MEET = timedelta(minutes=2)
# Ranks may wait long, for example until rank 0 has embedded a million images. A rank that ended is noticed regardless:
# its connections close, and torchrun monitors it.
_TO_WAIT = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """The processes that train together. This one is ``rank`` of ``size``. Only rank 0 writes files and messages."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The number of this process on its machine, and of its GPU."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return which of ``count`` rows belong to this rank.

        The parts are consecutive in the order of the ranks. Their lengths differ by at most one row.
        """
        return slice(*(count * rank // self.size for rank in (self.rank, self.rank + 1)))

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Concatenate the parts ``(n, ...)`` of all ranks to ``(count, ...)``.

        The gradient flows only to this rank's part.
        """
        return rows if self.size == 1 or count == 0 else cast(Tensor, _Gather.apply(rows, count, self))

    def gather_outputs(self, outputs: Outputs, count: int, parts: Container[object] = Outputs._fields) -> Outputs:
        """Gather the outputs named in ``parts``.

        No one reads the others: :func:`~refilled.outputs.not_computed` replaces logits and embedding, and feature maps
        are left out.
        """
        if self.size == 1:
            return outputs

        def whole(name: str, rows: Tensor) -> Tensor:
            return self.gather(rows, count) if name in parts else not_computed(count, rows)

        maps = outputs.features if "features" in parts else ()
        return Outputs(
            whole("logits", outputs.logits),
            whole("embedding", outputs.embedding),
            tuple(self.gather(rows, count) for rows in maps),
        )

    def sum_gradients(self, divided: Iterable[nn.Parameter], repeated: Iterable[nn.Parameter]) -> None:
        """Complete the gradients of a loss that every rank computed from the gathered outputs.

        Args:
            divided: Parameters of the student, which come before the gathering. Each rank holds a part of their
                gradient; the parts are summed.
            repeated: Parameters of the losses, which come after the gathering. Each rank holds the whole gradient. The
                ranks take the mean, because different rounding would let their parameters diverge.
        """
        if self.size == 1:
            return
        parts, wholes = ([p.grad for p in some if p.grad is not None] for some in (divided, repeated))
        for gradient in wholes:
            gradient /= self.size
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for gradient in (*parts, *wholes):
            by_dtype.setdefault(gradient.dtype, []).append(gradient)
        for gradients in by_dtype.values():
            flat = _all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def global_batch_norm(self) -> AbstractContextManager[object]:
        """Return a context in which training batch norm takes its mean and variance over the images of all ranks."""
        return nullcontext() if self.size == 1 else _GlobalBatchNorm(self)

    def largest(self, *numbers: int) -> list[int]:
        """Return the maximum of each number over the ranks."""
        return list(numbers) if self.size == 1 else _all_reduce(torch.tensor(numbers), dist.ReduceOp.MAX).tolist()

    def lead(self, action: Callable[[], T]) -> T:
        """Call ``action`` on rank 0 only. All ranks return its result, or raise its :class:`RefilledError`."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None]
        if self.leads:
            try:
                outcome = [action()]
            except RefilledError as error:
                outcome = [error]
        with _with_all_ranks():
            dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], RefilledError):
            raise outcome[0]
        return cast(T, outcome[0])

    def check_same(self, **things: object) -> None:
        """Check that all ranks have equal values.

        Args:
            things: Values by name.

        Raises:
            RunError: A rank has another value than rank 0. The message names the first such rank and the values.
        """
        held: list[dict[str, object]] = [{}] * self.size
        with _with_all_ranks():
            dist.all_gather_object(held, things)
        for rank, theirs in enumerate(held):
            if different := [name for name in things if theirs[name] != held[0][name]]:
                raise RunError(
                    f"rank {rank} has other {' and '.join(different)} than rank 0; give all machines the same files "
                    "and versions"
                )


ALONE = World()
"""The world of a single process."""


@contextmanager
def joined() -> Iterator[World]:
    """Connect to the other processes that torchrun started. Without torchrun, the world is this process.

    Raises:
        RunError: The environment announces other processes, but not their address; they do not connect; or a machine
            has GPUs, but fewer than processes.
    """
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size == 1:
        yield ALONE
        return
    if missing := [name for name in _RENDEZVOUS if name not in os.environ]:
        raise RunError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} are not set, so the processes cannot connect; start "
            f"them with 'torchrun --nproc-per-node {size} -m refilled ...', or unset WORLD_SIZE"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count()
    if 0 < gpus <= local_rank:
        raise RunError(
            f"more processes than GPUs ({gpus}) on this machine; start one for each, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= to train on its processors"
        )
    if gpus:
        torch.cuda.set_device(local_rank)
    try:
        store, rank, size = next(rendezvous("env://", timeout=_TO_MEET))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=size, timeout=_TO_WAIT
        )
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(f"the {size} processes did not meet at {where}: {str(error).splitlines()[0]}") from error
    try:
        yield World(rank, size, local_rank)
    finally:
        dist.destroy_process_group()


def first_to_tell(message: str) -> bool:
    """Return whether this rank is the first to print a message, so that an error of all ranks is printed once."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=5)))
        return int(store.add(f"refilled/{message}", 1)) == 1
    except (RuntimeError, ValueError):
        return True  # no other rank can be reached


class _Gather(torch.autograd.Function):
    """The rows of all ranks. All ranks compute the same loss, so the gradient of a rank's rows is complete locally."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int, world: World) -> Tensor:
        ctx.part = world.part(count)
        longest = -(-count // world.size)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(world.size * longest, *rows.shape[1:])
        if gathered.numel():
            with _with_all_ranks():  # as bytes, since not every backend knows every type
                dist.all_gather_into_tensor(gathered.view(torch.uint8), padded.view(torch.uint8))
        sizes = [len(range(count)[World(rank, world.size).part(count)]) for rank in range(world.size)]
        return torch.cat([part[:size] for part, size in zip(gathered.split(longest), sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, by_rows: Tensor) -> tuple[Tensor, None, None]:
        return by_rows[ctx.part], None, None


class _GlobalBatchNorm(TorchFunctionMode):
    """A context in which every training call of batch norm is computed over all ranks, whichever module calls it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = self._batch_norm if function is F.batch_norm else function
        return call(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        mean, variance, count = _moments(x, self.world)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
        return cast(Tensor, _Normalize.apply(x, weight, bias, mean, variance, count, eps))


def _moments(x: Tensor, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean ``(C,)``, variance ``(C,)`` and count of each channel of ``(n, C, ...)`` over all ranks."""
    x = at_least_float32(x.detach())
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    own = torch.cat([mean, variance, mean.new_tensor([x.numel() / len(mean)])])
    means, variances, counts = world.gather(own[None], world.size).split([len(mean), len(mean), 1], dim=1)  # (R, ...)
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    variance = ((variances + (means - mean).square()) * counts).sum(0) / count  # within ranks, and between them
    return mean, variance, count


class _Normalize(torch.autograd.Function):
    r"""Batch norm with the mean and variance over all ranks, and with the gradient through both.

    With :math:`\hat x = (x - \mu) / \sigma` and :math:`g` the gradient of the output,

    .. math:: \frac{\partial}{\partial x} = \frac{w}{\sigma} \Big(g - \frac{1}{M} \sum g
              - \hat x \frac{1}{M} \sum g \hat x\Big),

    where the sums are over the M values of a channel on all ranks (Ioffe and Szegedy, ICML 2015).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, count: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            by_output, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )  # as if mean and variance were constants
        from_weight, from_bias = (_all_reduce(torch.stack([by_weight, by_bias])) / count).unbind()
        rate = (variance + ctx.eps).rsqrt()
        shape = (-1, *[1] * (x.ndim - 2))
        by_mean, by_deviation = ((weight * rate * s).view(shape) for s in (from_bias, rate * from_weight))
        by_x = (by_x - by_mean - (x - mean.view(shape)) * by_deviation).to(by_x.dtype)
        return by_x, by_weight, by_bias, None, None, None, None


def _all_reduce(numbers: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce the numbers over all ranks in place; the default operation is the sum."""
    with _with_all_ranks():
        dist.all_reduce(numbers, operation)
    return numbers


@contextmanager
def _with_all_ranks() -> Iterator[None]:
    """Turn a failed exchange with the other ranks into a :class:`RankError`."""
    try:
        yield
    except RuntimeError as error:  # gloo has no more specific type
        raise RankError(
            "another process of this run has ended, so this one cannot continue; the cause is printed above, or in the "
            "summary of torchrun. Resume the run from its last saved state with --resume"
        ) from error
