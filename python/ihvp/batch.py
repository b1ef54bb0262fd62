"""One batch of data as the model and the loss take it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What `net(*args, **kwargs)` and `loss_fn(outputs, targets)` are called with.

    Attributes:
        args, kwargs: the model's arguments; the first dimension of their tensors is the example.
        targets: whatever loss_fn takes beside the outputs.
        mask: (N,T), 1 or True for real positions, 0 or False for padding. A masked position's loss counts as zero,
            and the position contributes nothing to any factor, gradient or score.
        weights: (N,), factors of the examples' losses.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    targets: Any = None
    mask: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.args, tuple):
            raise TypeError(f"args must be a tuple, got {type(self.args).__name__}")
        if not isinstance(self.kwargs, Mapping):
            raise TypeError(f"kwargs must be a mapping, got {type(self.kwargs).__name__}")
        for name, x in (("mask", self.mask), ("weights", self.weights)):
            if x is not None and not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        N = self.size
        if self.mask is not None:
            if self.mask.dim() != 2 or self.mask.shape[0] != N:
                raise ValueError(f"mask must be (N,T) with N={N}, got {tuple(self.mask.shape)}")
            if self.mask.dtype != torch.bool:
                if not bool(((self.mask == 0) | (self.mask == 1)).all()):
                    raise ValueError("mask must hold only 0 and 1, or be bool")
                object.__setattr__(self, "mask", self.mask.bool())
        if self.weights is not None and tuple(self.weights.shape) != (N,):
            raise ValueError(f"weights must be (N,) = ({N},), got {tuple(self.weights.shape)}")

    @property
    def size(self) -> int:
        """N, the first dimension of the targets, or else of the first tensor among the arguments."""
        for x in tensors((self.targets, self.args, self.kwargs)):
            if x.dim() > 0:
                return int(x.shape[0])
        raise ValueError("a batch must hold a tensor whose first dimension is the example")

    @property
    def contents(self) -> tuple[Any, ...]:
        """All that the batch holds, in the order of its attributes."""
        return tuple(getattr(self, own.name) for own in fields(self))

    def map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor replaced."""
        return replace(self, **{own.name: _map(getattr(self, own.name), f) for own in fields(self)})

    def outside_inference(self) -> Batch:
        """Tensors that were made in inference mode, copied so that autograd may see them."""
        return self.map(lambda x: x.clone() if x.is_inference() else x)

    def to(self, device: torch.device) -> Batch:
        return self.map(lambda x: x.to(device))


def as_batch(raw: Any) -> Batch:
    """A Batch as it is; a pair (inputs, targets), inputs being a tensor, a tuple of arguments or a dict of them."""
    if isinstance(raw, Batch):
        return raw
    if not isinstance(raw, (tuple, list)) or len(raw) != 2:
        what = f"{type(raw).__name__} of length {len(raw)}" if isinstance(raw, (tuple, list)) else type(raw).__name__
        raise TypeError(
            f"a batch must be a pair (inputs, targets) or an ihvp.Batch, got {what}; process_batch can make it one"
        )
    inputs, targets = raw
    if isinstance(inputs, Mapping):
        return Batch(kwargs=inputs, targets=targets)
    return Batch(args=tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), targets=targets)


def all_finite(x: Tensor) -> bool:
    """The sum is a cheap first look; it may also overflow."""
    return math.isfinite(float(x.detach().sum())) or bool(x.isfinite().all())


class FiniteChecks:
    """Checks that tensors are finite. On a GPU they are asked about together: each answer would wait for the device."""

    def __init__(self) -> None:
        self._extremes: list[Tensor] = []
        self._messages: list[str] = []

    def add(self, x: Tensor, message: str, mask: Tensor | None = None) -> None:
        """Raises FloatingPointError when x is not finite where the mask is True: at once on a CPU, else in `finish`."""
        if self._answers_at_once(x):
            if not all_finite(x) and (mask is None or not all_finite(x[mask])):
                raise FloatingPointError(message)
        elif x.numel() > 0:
            seen = x.detach() if mask is None else torch.where(mask.unsqueeze(-1), x.detach(), 0)
            self._extremes += torch.aminmax(seen)
            self._messages.append(message)

    @staticmethod
    def _answers_at_once(x: Tensor) -> bool:
        return x.device.type == "cpu"

    def finish(self) -> None:
        """Raises FloatingPointError for the first tensor that was not finite."""
        if self._extremes:
            finite = torch.stack([x.double() for x in self._extremes]).isfinite().tolist()
            for k, message in enumerate(self._messages):
                if not (finite[2 * k] and finite[2 * k + 1]):
                    raise FloatingPointError(message)
            self._extremes, self._messages = [], []


def tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from tensors(value)
    elif isinstance(x, (tuple, list)):
        for value in x:
            yield from tensors(value)


def same(x: Any, y: Any) -> bool:
    """Whether nested tuples, lists and mappings hold equal tensors of one dtype and device, and equal other things."""
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        both = isinstance(x, Tensor) and isinstance(y, Tensor)
        return both and (x.dtype, x.device) == (y.dtype, y.device) and torch.equal(x, y)
    if isinstance(x, Mapping) and isinstance(y, Mapping):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, (tuple, list)) and type(x) is type(y):
        return len(x) == len(y) and all(map(same, x, y))
    return bool(x == y)


def _map(x: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, Mapping):
        return {key: _map(value, f) for key, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_map(value, f) for value in x))
    if isinstance(x, (tuple, list)):
        return type(x)(_map(value, f) for value in x)
    return x
