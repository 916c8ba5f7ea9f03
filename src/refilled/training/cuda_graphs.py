"""Networks as CUDA graphs: recorded once for each shape of batch, then replayed.

With a small network, the processor takes longer to launch its hundreds of kernels than the GPU to run them, so the GPU
is idle. A graph launches all kernels at once. They are the same kernels on the same numbers.
"""

from collections.abc import Callable
from warnings import warn

import torch
from torch import Tensor, nn

from refilled.models import Backbone
from refilled.outputs import Outputs, not_computed
from refilled.recipe import Precision
from refilled.stages import Part

_MOST = 4  # recordings; each keeps the memory of a pass, and an epoch has batches of one or two sizes
_SINGLE = ("logits", "embedding")

Pass = Callable[[Tensor], tuple[Tensor, ...]]


def can_be_graphed(network: Backbone, device: torch.device, precision: Precision) -> bool:
    """Return whether the passes of a network may be recorded.

    A graph contains only the kernels of a pass, not what the Python code does in addition. A network from a user's file
    is therefore recorded only as a frozen teacher, whose recording can be compared with an ordinary pass. A student
    changes with every pass, so there is nothing to compare with.
    """
    known = network.architecture is not None or not _is_trained(network)
    return known and device.type == "cuda" and precision in ("bf16-mixed", "32-true")


def _is_trained(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


class GraphedNetwork:
    """A network on a GPU whose passes are recorded, once for each shape of batch.

    It shares all tensors with the network. The next pass overwrites the outputs of a pass. Shapes beyond the first 4,
    and networks that cannot be recorded, run without a graph.

    Args:
        network: The network, in channels-last memory, in training or evaluation mode as needed. Passes have gradients
            if one of its parameters requires them.
        precision: The precision of the pass. The outputs of a student are converted to float32, as Fabric does; those
            of a teacher are not.
    """

    def __init__(self, network: Backbone, precision: Precision) -> None:
        self.network, self.mixed = network, precision == "bf16-mixed"
        self._recorded: dict[tuple[object, ...], Pass] = {}

    def __call__(self, images: Tensor, parts: frozenset[Part]) -> Outputs:
        """Return the outputs for images ``(N, 3, H, W)``; those not in ``parts`` are not computed, ``(N, 0)``."""
        key = (images.shape, images.dtype, parts)
        if key not in self._recorded:
            chosen = _ChosenParts(self.network, parts, self.mixed)
            if len(self._recorded) == _MOST:
                return self._outputs(chosen(images), parts)
            self._recorded[key] = self._record(chosen, images.clone())
        return self._outputs(self._recorded[key](images), parts)

    def _record(self, chosen: "_ChosenParts", images: Tensor) -> Pass:
        """Record a pass. The warm-up changes batch norm's statistics and the random state, which are restored."""
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
            generator.graphsafe_set_state(spare)  # the original one still counts as being recorded
            name = self.network.architecture or "a network from a Python file"
            warn(f"{name} cannot be recorded as a CUDA graph and runs without one: {error}", stacklevel=2)
            recorded = _ChosenParts(self.network, chosen.parts, self.mixed)
        for name, buffer in self.network.named_buffers():
            buffer.copy_(buffers[name])
        torch.cuda.set_rng_state(random, images.device)
        return recorded

    def _outputs(self, tensors: tuple[Tensor, ...], parts: frozenset[Part]) -> Outputs:
        single = [name for name in _SINGLE if name in parts]
        nothing = not_computed(len(tensors[0]), tensors[0])
        named = dict(zip(single, tensors, strict=False))
        return Outputs(named.get("logits", nothing), named.get("embedding", nothing), tensors[len(single) :])


class _ChosenParts(nn.Module):
    """A network that returns only the outputs that are read. The others then have no gradient instead of zeros."""

    def __init__(self, network: Backbone, parts: frozenset[Part], mixed: bool) -> None:
        super().__init__()
        self.network, self.parts, self.mixed = network, parts, mixed
        self.training = network.training

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        # No cached casts of weights: the graph would keep those of the moment of recording.
        with torch.autocast("cuda", torch.bfloat16, enabled=self.mixed, cache_enabled=False):
            outputs: Outputs = self.network(images, features="features" in self.parts)
        tensors = (*(getattr(outputs, name) for name in _SINGLE if name in self.parts), *outputs.features)
        return tuple(tensor.float() for tensor in tensors) if self.training else tensors


def _accept_streams() -> None:
    """Disable PyTorch's warning that gradients come from another stream, which is normal for a recording."""
    warn_of_it = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if warn_of_it is not None:  # it is not in every PyTorch
        warn_of_it(False)


def _record_frozen(network: nn.Module, images: Tensor) -> Pass:
    stream = torch.cuda.Stream(images.device)
    stream.wait_stream(torch.cuda.current_stream(images.device))
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):  # so that the graph does not contain work that is done only on the first call
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
    """Compare a replay with a pass on other images.

    They differ if the code branches on values or counts its calls.

    Raises:
        RuntimeError: They differ.
    """
    with torch.no_grad():
        wanted: tuple[Tensor, ...] = network(images)
    if not all(map(torch.equal, recorded(images), wanted)):
        raise RuntimeError("a replay on other images differs from an ordinary pass")
