"""Networks as CUDA graphs: recorded once for each shape of batch, then replayed.

A small network leaves a GPU idle: the processor takes longer to start its hundreds of kernels than the GPU to run them.
A graph starts all of them at once. It runs the same kernels on the same numbers.
"""

from collections.abc import Callable
from warnings import warn

import torch
from torch import Tensor, nn

from refilled.config import Precision
from refilled.models import Backbone
from refilled.outputs import Outputs
from refilled.stages import Part

_MOST = 4  # recordings, each of which holds the memory of a pass; an epoch has batches of one or two sizes
_SINGLE = ("logits", "embedding")

Pass = Callable[[Tensor], tuple[Tensor, ...]]


def can_be_graphed(network: Backbone, device: torch.device, precision: Precision) -> bool:
    """Whether the passes of a network may be recorded; a user's own code is trusted with a teacher's only.

    What code does beside its kernels, a graph leaves out. A teacher's is checked when it has been recorded
    (:class:`GraphedNetwork`); a student changes with every pass, so that there is nothing to compare with.
    """
    known = network.architecture is not None or not _is_trained(network)
    return known and device.type == "cuda" and precision in ("bf16-mixed", "32-true")


def _is_trained(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


class GraphedNetwork:
    """A network on a GPU whose passes are recorded when a shape of batch is first seen; it shares all its tensors.

    The outputs of a pass are overwritten by the next one. Shapes beyond the first few, and networks that do what no
    graph can hold, are run as usual.

    Args:
        network: The network, in channels-last memory, in the mode that it is to run in. Where it has parameters with
            gradients, so have its passes.
        precision: What it computes in. A student's outputs come in float32, as Fabric would give them; a teacher's as
            they are.
    """

    def __init__(self, network: Backbone, precision: Precision) -> None:
        self.network, self.mixed = network, precision == "bf16-mixed"
        self._recorded: dict[tuple[object, ...], Pass] = {}

    def __call__(self, images: Tensor, parts: frozenset[Part]) -> Outputs:
        """Return those parts of the outputs of images ``(N, 3, H, W)``; the other tensors are ``(N, 0)``."""
        key = (images.shape, images.dtype, parts)
        if key not in self._recorded:
            chosen = _ChosenParts(self.network, parts, self.mixed)
            if len(self._recorded) == _MOST:
                return self._outputs(chosen(images), parts)
            self._recorded[key] = self._record(chosen, images.clone())
        return self._outputs(self._recorded[key](images), parts)

    def _record(self, chosen: "_ChosenParts", images: Tensor) -> Pass:
        """Record a pass. Warming up leaves traces, in batch norm's statistics and the random numbers; they go again."""
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        random = torch.cuda.get_rng_state(images.device)
        generator = torch.cuda.default_generators[images.device.index]
        spare = generator.clone_state()
        recorded: Pass
        try:
            if _is_trained(chosen):
                _accept_streams()
                recorded = torch.cuda.make_graphed_callables(chosen, (images,), allow_unused_input=True)  # type: ignore[assignment]
            else:
                recorded = _record_frozen(chosen, images)
                if self.network.architecture is None:
                    _check_replay(recorded, chosen, images.flip(0))
        except RuntimeError as error:
            generator.graphsafe_set_state(spare)  # the other one stays marked as being recorded
            name = self.network.architecture or "a network from a Python file"
            warn(f"{name} cannot be recorded as a CUDA graph and is run as usual: {error}", stacklevel=2)
            recorded = _ChosenParts(self.network, chosen.parts, self.mixed)
        for name, buffer in self.network.named_buffers():
            buffer.copy_(buffers[name])
        torch.cuda.set_rng_state(random, images.device)
        return recorded

    def _outputs(self, tensors: tuple[Tensor, ...], parts: frozenset[Part]) -> Outputs:
        single = [name for name in _SINGLE if name in parts]
        nothing = tensors[0].new_empty(len(tensors[0]), 0)
        named = dict(zip(single, tensors, strict=False))
        return Outputs(named.get("logits", nothing), named.get("embedding", nothing), tensors[len(single) :])


class _ChosenParts(nn.Module):
    """A network whose outputs are only those that are read: of others the gradient is nothing and not zero."""

    def __init__(self, network: Backbone, parts: frozenset[Part], mixed: bool) -> None:
        super().__init__()
        self.network, self.parts, self.mixed = network, parts, mixed
        self.training = network.training

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        # Graphs hold no cached casts of weights: they would be those of the moment when they were recorded.
        with torch.autocast("cuda", torch.bfloat16, enabled=self.mixed, cache_enabled=False):
            outputs: Outputs = self.network(images, features="features" in self.parts)
        tensors = (*(getattr(outputs, name) for name in _SINGLE if name in self.parts), *outputs.features)
        return tuple(tensor.float() for tensor in tensors) if self.training else tensors


def _accept_streams() -> None:
    """Let PyTorch not warn that gradients of a recording come from another stream: that is what recordings do."""
    warn_of_it = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if warn_of_it is not None:  # it is not in every PyTorch
        warn_of_it(False)


def _record_frozen(network: nn.Module, images: Tensor) -> Pass:
    stream = torch.cuda.Stream(images.device)
    stream.wait_stream(torch.cuda.current_stream(images.device))
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):  # or a graph would hold what is done on a first call only
            network(images)
    torch.cuda.current_stream(images.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs: tuple[Tensor, ...] = network(images)

    def replay(batch: Tensor) -> tuple[Tensor, ...]:
        images.copy_(batch)
        graph.replay()
        return outputs

    return replay


def _check_replay(recorded: Pass, network: nn.Module, images: Tensor) -> None:
    """Compare a replay with a pass; code that chooses by what it sees, or by how often it ran, would differ.

    Raises:
        RuntimeError: they are not the same.
    """
    with torch.no_grad():
        wanted: tuple[Tensor, ...] = network(images)
    if not all(map(torch.equal, recorded(images), wanted)):
        raise RuntimeError("on other images it does not give what it gives when it is run")
