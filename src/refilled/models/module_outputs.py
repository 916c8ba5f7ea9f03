"""The outputs of networks from other sources, and the part that is the embedding of an image."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.models.backbone import Pooling, global_average_pool

_POOLED = (
    *("pooler_output", "pooled_output", "pooled", "embedding", "embeddings", "image_embeds", "image_features"),
    *("pre_logits", "features", "feats"),
)
"""Names under which networks return one row per image, the most reliable first."""

_TOKENS = "last_hidden_state"
_CLASS_TOKEN, _PATCHES = "x_norm_clstoken", "x_norm_patchtokens"  # the names in DINOv2's code
_PREFIXES = (0, 1, 5)
"""Numbers of tokens before the patches' tokens: none, a class token, or a class token and four registers."""


class LinearCall(NamedTuple):
    """The input and output of a linear layer in the last call of a network."""

    layer: nn.Linear
    input: Tensor
    output: Tensor


def read_embedding(output: Any, pooling: Pooling = "pooled", prefix: int | None = None) -> Tensor:
    """Return the embedding ``(N, d)`` from the output of a network for N images.

    The output may be a row per image, tokens ``(N, T, d)`` or maps ``(N, d, H, W)`` or ``(N, H, W, d)``, alone or in a
    tuple or dict, which includes :class:`transformers.ModelOutput`. In a dict, ``pooler_output`` and similar names come
    first, then the tokens of ``last_hidden_state``, then the only entry. In a tuple of rows and tokens or maps, the
    rows are the embedding. Maps are averaged over their pixels. From tokens, ``pooled`` and ``mean`` average those of
    the patches, ``token`` takes the first, and ``both`` concatenates the two.

    Args:
        output: The output of the network.
        pooling: The kind of embedding.
        prefix: Number of tokens before the patches' tokens. None: inferred, because patches fill a square.

    Raises:
        ModelError: The embedding is ambiguous or missing.
    """
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        output = output._asdict()
    if isinstance(output, Mapping):
        return _from_mapping(output, pooling, prefix)
    if isinstance(output, (tuple, list)):
        return _from_sequence(output, pooling, prefix)
    return _from_tensor(output, pooling, prefix)


def describe_output(output: Any) -> str:
    """Return a description of a network's output, for messages."""
    if isinstance(output, Tensor):
        return f"shape {tuple(output.shape)}"
    kind = type(output).__name__
    if isinstance(output, Mapping) and output:
        return f"{kind} of {', '.join(f'{key}: {describe_output(value)}' for key, value in output.items())}"
    if isinstance(output, (tuple, list)) and output:
        return f"{kind} of {', '.join(describe_output(value) for value in output)}"
    return kind


@contextmanager
def linear_calls(module: nn.Module) -> Iterator[list[LinearCall]]:
    """Record the inputs and outputs of the linear layers of a network while it runs."""
    calls: list[LinearCall] = []

    def note(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(layer, nn.Linear) and arguments and isinstance(output, Tensor):
            calls.append(LinearCall(layer, arguments[0], output))

    handles = [layer.register_forward_hook(note) for layer in module.modules() if isinstance(layer, nn.Linear)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def find_last_linear(output: Any, calls: list[LinearCall]) -> LinearCall | None:
    """Return the linear layer whose output, or probabilities computed from it, the network returned.

    Return None for a dict that names an embedding or tokens.
    """
    if isinstance(output, Mapping) and any(name in output for name in (*_POOLED, _TOKENS, _CLASS_TOKEN)):
        return None
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    )
    rows = [value for value in values if isinstance(value, Tensor) and value.ndim == 2]
    for call in reversed(calls):
        if call.input.ndim == 2 and any(_is_made_of(value, call.output) for value in rows):
            return call
    return None


def _is_made_of(rows: Tensor, logits: Tensor) -> bool:
    if rows.shape != logits.shape:
        return False
    made = (logits, F.softmax(logits, 1), F.log_softmax(logits, 1), torch.sigmoid(logits))
    return any(torch.allclose(rows, values, atol=1e-5, rtol=1e-4, equal_nan=True) for values in made)


def _from_mapping(output: Mapping[str, Any], pooling: Pooling, prefix: int | None) -> Tensor:
    tensors = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    if pooling == "pooled":
        named = next((tensors[name] for name in _POOLED if name in tensors), None)
        if named is not None:
            return _from_tensor(named, pooling, prefix)
    if _CLASS_TOKEN in tensors and pooling in ("pooled", "token"):
        return tensors[_CLASS_TOKEN]
    if _CLASS_TOKEN in tensors and _PATCHES in tensors:
        mean = _mean(tensors[_PATCHES])
        return mean if pooling == "mean" else torch.cat([tensors[_CLASS_TOKEN], mean], 1)
    if _TOKENS in tensors:
        return _from_tensor(tensors[_TOKENS], pooling, prefix)
    if len(tensors) == 1:
        return _from_tensor(next(iter(tensors.values())), pooling, prefix)
    raise ModelError(f"it is not clear which part of the output is the embedding; got {describe_output(output)}")


def _from_sequence(output: tuple[Any, ...] | list[Any], pooling: Pooling, prefix: int | None) -> Tensor:
    tensors = [value for value in output if isinstance(value, Tensor)]
    rows = [value for value in tensors if value.ndim == 2]
    others = [value for value in tensors if value.ndim > 2]
    if len(tensors) == 1:
        return _from_tensor(tensors[0], pooling, prefix)
    if pooling == "pooled" and len(rows) == 1:
        return rows[0]
    if pooling != "pooled" and len(others) == 1:
        return _from_tensor(others[0], pooling, prefix)
    raise ModelError(f"it is not clear which part of the output is the embedding; got {describe_output(output)}")


def _from_tensor(output: Any, pooling: Pooling, prefix: int | None) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        raise ModelError(
            f"the embedding must be (N, d), tokens (N, T, d) or maps (N, d, H, W); got {describe_output(output)}"
        )
    if output.ndim == 3:
        return _from_tokens(output, pooling, prefix)
    if pooling != "pooled":
        raise ModelError(f"the embedding '{pooling}' needs tokens (N, T, d), but there are none; use 'pooled'")
    if output.ndim == 2:
        return output
    _, second, third, last = output.shape
    channels_last = second == third != last
    return global_average_pool(output.movedim(3, 1) if channels_last else output)


def _from_tokens(tokens: Tensor, pooling: Pooling, prefix: int | None) -> Tensor:
    before = _prefix(tokens.shape[1]) if prefix is None else prefix
    if pooling in ("token", "both") and before == 0:
        raise ModelError(f"the {tokens.shape[1]} tokens fill a square, so there is no class token; use 'mean'")
    mean = _mean(tokens[:, before:])
    if pooling == "token":
        return tokens[:, 0]
    return torch.cat([tokens[:, 0], mean], 1) if pooling == "both" else mean


def _prefix(count: int) -> int:
    """Infer the number of tokens before the patches' tokens, of which there is a square number."""
    return next(
        (prefix for prefix in _PREFIXES if count > prefix and math.isqrt(count - prefix) ** 2 == count - prefix), 0
    )


def _mean(tokens: Tensor) -> Tensor:
    return tokens.mean(1, dtype=torch.promote_types(tokens.dtype, torch.float32))
