"""Captured tokens as the rows of G, row n being the gradient g_n, which is never formed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ihvp import ops
from ihvp.capture import capture
from ihvp.methods.base import Vectors, batches, check_reached
from ihvp.methods.blocks import Block
from ihvp.methods.queries import masked, written_out
from ihvp.model import InfluenceModel, Layer

Tokens = dict[str, tuple[Tensor, Tensor]]
"""Layer name -> x (N,T,I') with the bias feature written out, d (N,T,O), both zero where masked."""

WORKSPACE = 2**19  # numbers, which a cache holds


def token_batches(
    model: InfluenceModel, loader: Iterable[Any], description: str, generator: torch.Generator | None = None
) -> Iterator[Tokens]:
    """One pass over a loader: each batch's tokens, zeros for a layer that it did not reach.

    Raises ValueError at the end when there is a layer that no batch reached.
    """
    reached: set[str] = set()
    for index, batch in batches(model, loader, description):
        own: Tokens = {}

        def sink(layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, own: Tokens = own) -> None:
            own[layer.name] = (masked(written_out(layer, a), mask), masked(delta, mask))

        capture(model, batch, sink, index=index, generator=generator)
        reached |= set(own)
        for name, layer in model.layers.items():
            if name not in own:
                O, I = layer.shape
                zeros = torch.zeros(batch.size, 1, O + I, dtype=model.dtype, device=model.device)
                own[name] = (zeros[..., :I], zeros[..., I:])
        yield {name: own[name] for name in model.layers}
    check_reached(model, reached)


def join(kept: Sequence[Tokens]) -> Tokens:
    """All batches as one, shorter ones padded with zero positions."""
    result = {}
    for name in kept[0]:
        longest = max(part[name][0].shape[1] for part in kept)
        pad = [tuple(torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in part[name]) for part in kept]
        result[name] = (torch.cat([x for x, _ in pad]), torch.cat([d for _, d in pad]))
    return result


def on_device(tokens: Tokens, model: InfluenceModel) -> Tokens:
    return {name: (x.to(model.device), d.to(model.device)) for name, (x, d) in tokens.items()}


def within(tokens: Tokens, block: Block) -> Tokens:
    """The tokens of a block's columns."""
    return {name: (tokens[name][0][..., own], tokens[name][1]) for name, own in block.items()}


def wide(tokens: Tokens) -> Tokens:
    """In float64."""
    return {name: (x.double(), d.double()) for name, (x, d) in tokens.items()}


def rows(tokens: Tokens) -> Tensor:
    """G itself, (N,p_b)."""
    return torch.cat([ops.per_sample_gradient(x, d).flatten(1) for x, d in tokens.values()], dim=1)


def kernel(tokens: Tokens) -> Tensor:
    """G G^T, (N,N)."""
    return torch.stack([ops.ghost_dot(x, d, x, d) for x, d in tokens.values()]).sum(0)


def squared_norms(tokens: Tokens) -> Tensor:
    """The diagonal of G G^T, (N,)."""
    return torch.stack([ops.ghost_norm(x, d) for x, d in tokens.values()]).sum(0)


def gradient_dots(tokens: Tokens, V: Vectors) -> Tensor:
    """V G^T, (Q,N)."""
    return torch.stack([ops.gradient_dot(V[name], x, d) for name, (x, d) in tokens.items()]).sum(0)


def gradient_sums(tokens: Tokens, c: Tensor) -> Tensor:
    """c G for c (Q,N), flat (Q,p_b): delta^T diag(c_q) a, as one product for as many q as fit."""
    result = []
    for x, d in tokens.values():
        (N, T, I), O = x.shape, d.shape[2]
        rows_x, columns_d = x.reshape(N * T, I), d.reshape(N * T, O).T.contiguous()
        step = max(1, WORKSPACE // max(1, N * T * O))
        parts = [
            (weights.repeat_interleave(T, 1).unsqueeze(1) * columns_d).flatten(0, 1) @ rows_x
            for weights in c.split(step)
        ]
        result.append(torch.cat(parts).view(len(c), O * I))
    return torch.cat(result, dim=1)


def tokens_state(tokens: Tokens) -> dict[str, Tensor]:
    return {f"{name}/{key}": x for name, pair in tokens.items() for key, x in zip("xd", pair, strict=True)}


def read_tokens(model: InfluenceModel, state: Mapping[str, Tensor], who: str) -> Tokens:
    """Copies of the tokens in a state. Raises ValueError when they are not those of this model's layers."""
    shapes = {key: tuple(x.shape) for key, x in state.items()}
    fits = set(state) == {f"{name}/{key}" for name in model.layers for key in "xd"}
    examples = set()
    for name, layer in model.layers.items() if fits else ():
        x, d = shapes[f"{name}/x"], shapes[f"{name}/d"]
        fits = fits and len(x) == len(d) == 3 and x[:2] == d[:2] and (d[2], x[2]) == layer.shape
        examples.add(x[0] if x else 0)
    if not fits or len(examples) != 1:
        expected = {name: layer.shape for name, layer in model.layers.items()}
        raise ValueError(f"{who}: the state is of another model; expected layers (O,I') {expected}, got {shapes}")
    own = {key: x.to(model.device, copy=True) for key, x in state.items()}
    return {name: (own[f"{name}/x"], own[f"{name}/d"]) for name in model.layers}
