"""Tokens of batches that were captured already, so that later passes over the same data need not run the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ihvp.batch import Batch, same, tensors

Tokens = tuple[Any, Tensor, Tensor, "Tensor | None"]
"""What a sink receives: (layer, a, delta, mask)."""


@dataclass(frozen=True)
class Captured:
    """One batch: the batch itself, what its layers handed over, in that order, and its losses (N,)."""

    batch: Batch
    tokens: tuple[Tokens, ...]
    losses: Tensor


@dataclass(frozen=True)
class _State:
    """What a net's tokens depend on beside the batch. A parameter changed in place counts up its version."""

    parameters: tuple[tuple[int, int], ...]
    training: tuple[bool, ...]
    buffers: tuple[Tensor, ...]

    @staticmethod
    def of(net: nn.Module) -> _State:
        versions = ((id(p), 0 if p.is_inference() else p._version) for p in net.parameters())
        training = (module.training for module in net.modules())
        return _State(tuple(versions), tuple(training), tuple(net.buffers()))

    def kept(self) -> _State:
        return _State(self.parameters, self.training, tuple(buffer.clone() for buffer in self.buffers))


@dataclass
class TokenCache:
    """At most `limit` bytes of captured batches, first come, first kept.

    A batch is found again by its place in the loader and its contents, all of them compared, so a loader that shuffles
    finds nothing and gets nothing wrong. A change of the net's parameters, buffers or mode empties the cache; only a
    write past autograd's notice, through `parameter.data`, does not, and needs `clear`.
    """

    limit: int
    used: int = 0
    _state: _State | None = None
    _captured: dict[int, list[Captured]] = field(default_factory=dict)

    def clear(self) -> None:
        self.used, self._state = 0, None
        self._captured.clear()

    def find(self, net: nn.Module, batch: Batch, index: int) -> Captured | None:
        state = _State.of(net)
        if self._state is None or not same(
            (self._state.parameters, self._state.training, self._state.buffers),
            (state.parameters, state.training, state.buffers),
        ):
            self.clear()
            self._state = state.kept()
        return next((one for one in self._captured.get(index, ()) if same(one.batch.contents, batch.contents)), None)

    def fits(self, tokens: list[Tokens], batch: Batch) -> bool:
        return self.used + _bytes(tokens) + sum(x.nbytes for x in tensors(batch.contents)) <= self.limit

    def keep(self, batch: Batch, index: int, tokens: list[Tokens], losses: Tensor) -> None:
        """Raises nothing and keeps nothing when there is no room."""
        if self.fits(tokens, batch):
            own = batch.map(lambda x: x.clone())  # the loader may use its memory again
            self.used += _bytes(tokens) + sum(x.nbytes for x in tensors(own.contents))
            self._captured.setdefault(index, []).append(Captured(own, tuple(tokens), losses))


def _bytes(tokens: list[Tokens]) -> int:
    """Memory held by the tokens; layers that share an input hold it once."""
    held = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for _, *parts in tokens for x in tensors(parts)
    }
    return sum(held.values())
