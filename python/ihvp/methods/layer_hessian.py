"""The Hessian of a net of linear layers that see one position each, put together from derivatives at their outputs.

Let z_k be the output of layer k, and layer k run before layer l or be layer l. Its weights move z_k by dW_k a_k and
nothing else, and the gradient at layer l is delta_l a_l^T, so

    H[(k,o,i),(l,o',i')] = sum_n a_k[n,i] (  d delta_l[n,o'] / d z_k[n,o]  a_l[n,i']
                                         + delta_l[n,o']  d a_l[n,i'] / d z_k[n,o])

One backward pass for each output and input of a layer gives these derivatives for all examples at once, where a row of
H for each parameter takes a pass for each parameter; then each term is one product over the examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ihvp.batch import Batch, all_finite
from ihvp.capture import differentiable, replaced_outputs
from ihvp.layers import LINEAR
from ihvp.methods.blocks import Block
from ihvp.methods.queries import written_out
from ihvp.model import InfluenceModel, Layer

BYTES = 2**30  # of the derivatives of one batch; with more its Hessian is made row by row
POSITIONS, PENDING_BYTES = 512, 2**28  # of batches that are summed together: short products are bound by memory
DIRECTIONS = 64  # differentiated at once
WORKSPACE = 2**22  # numbers of a product on their way into the sum

Pair = tuple[str, str]
"""Layers k and l, of which k runs first, or twice the same."""


@dataclass(frozen=True)
class LayerDerivatives:
    """Of one batch, layers in the order in which they run.

    Attributes:
        a: layer -> (N,I'), inputs with the bias feature written out.
        delta: layer -> (N,O).
        curvature: (k,l) -> (N,O_k,O_l), d delta_l / d z_k.
        motion: (k,l) -> (N,O_k,I'_l), d a_l / d z_k, where k runs before l.
    """

    a: dict[str, Tensor]
    delta: dict[str, Tensor]
    curvature: dict[Pair, Tensor]
    motion: dict[Pair, Tensor]

    @property
    def size(self) -> int:
        return len(next(iter(self.a.values())))

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.curvature.values(), *self.motion.values()))

    @staticmethod
    def joined(parts: list[LayerDerivatives]) -> LayerDerivatives:
        """Of batches whose layers ran in one order."""

        def join(which: str) -> dict[Any, Tensor]:
            own = [getattr(part, which) for part in parts]
            return {key: torch.cat([one[key] for one in own]) for key in own[0]}

        return LayerDerivatives(*(join(which) for which in ("a", "delta", "curvature", "motion")))


def layer_derivatives(model: InfluenceModel, batch: Batch, index: int) -> LayerDerivatives | None:
    """None where the formula does not hold or its derivatives take too much memory.

    It holds when every tracked layer is an nn.Linear that runs once, on an input (N,I), and its parameters reach the
    loss in no other way.

    Raises FloatingPointError, naming the batch, when a derivative is not finite.
    """
    layers = model.layers
    outputs, inputs = (sum(layer.shape[i] for layer in layers.values()) for i in (0, 1))
    nbytes = batch.size * outputs * (outputs + inputs) * torch.finfo(model.dtype).bits // 8
    linear = all(layer.type is LINEAR and len(layer.modules) == 1 for layer in layers.values())
    if not linear or nbytes > BYTES or batch.size == 0:
        return None
    with differentiable(model):
        if _used_beside_layers(model, batch):
            return None
        for p in model.net.parameters():
            p.requires_grad_(False)
        seen: list[tuple[Layer, Tensor, Tensor]] = []

        def offset(layer: Layer, x: Tensor, output: Tensor) -> Tensor:
            moved = torch.zeros_like(output, requires_grad=True)
            seen.append((layer, x, moved))
            return output + moved

        with replaced_outputs(model, offset):
            loss = model.losses(model.net(*batch.args, **batch.kwargs), batch, batch.targets).sum()
            if not loss.requires_grad or any(x.dim() != 2 or len(x) != batch.size for _, x, _ in seen):
                return None
            z = [moved for _, _, moved in seen]
            delta = torch.autograd.grad(loss, z, create_graph=True, materialize_grads=True)
        if sorted(layer.name for layer, _, _ in seen) != sorted(layers):
            return None  # one ran not at all or twice, as in a checkpoint, which runs it again in the backward pass
        return _derivatives(seen, delta, index)


def _used_beside_layers(model: InfluenceModel, batch: Batch) -> bool:
    """Whether parameters reach the loss though all tracked layers' outputs are constants."""
    own = {id(p) for p in model.weights.values()}
    for p in model.net.parameters():
        p.requires_grad_(id(p) in own)
    with replaced_outputs(model, lambda layer, x, output: output.detach()):
        loss = model.losses(model.net(*batch.args, **batch.kwargs), batch, batch.targets)
    return loss.requires_grad


def _derivatives(seen: list[tuple[Layer, Tensor, Tensor]], delta: Iterable[Tensor], index: int) -> LayerDerivatives:
    found = LayerDerivatives({}, {}, {}, {})
    names, z = [layer.name for layer, _, _ in seen], [moved for _, _, moved in seen]
    for l, ((layer, x, _), own) in enumerate(zip(seen, delta, strict=True)):
        found.a[layer.name], found.delta[layer.name] = written_out(layer, x.detach()), own.detach()
        for k, curved in enumerate(_pulled(own, z[: l + 1])):
            found.curvature[names[k], layer.name] = curved
        for k, moved in enumerate(_pulled(x, z[:l])):
            found.motion[names[k], layer.name] = torch.nn.functional.pad(moved, (0, int(layer.bias)))
    for x in itertools.chain(found.a.values(), found.delta.values(), found.curvature.values(), found.motion.values()):
        if not all_finite(x):
            raise FloatingPointError(f"the hessian of batch {index} is not finite")
    return found


def _pulled(y: Tensor, z: list[Tensor]) -> list[Tensor]:
    """(N,O_k,F) for each z_k (N,O_k): the derivative of each example's y (N,F)."""
    N, F = y.shape
    if not y.requires_grad:
        return [y.new_zeros(N, own.shape[1], F) for own in z]

    def pull(u: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, z, u, retain_graph=True, materialize_grads=True)

    units = torch.eye(F, dtype=y.dtype, device=y.device).unsqueeze(1).expand(F, N, F)
    rows = torch.vmap(pull, randomness="same", chunk_size=DIRECTIONS)(units)
    return [own.permute(1, 2, 0) for own in rows]


class LayerHessians:
    """Adds the Hessians of batches to the sums (p_b,p_b) of blocks, several batches at a time.

    It is the symmetric part of a sum that is right: what couples two layers is added twice on one side of the diagonal.

    Products run in the net's dtype over at least 512 examples where there are as many, and are added in that of the
    sums.
    """

    def __init__(self, totals: Mapping[str, Tensor], blocks: Mapping[str, Block]) -> None:
        self.totals, self.blocks = totals, blocks
        self.pending: list[LayerDerivatives] = []

    def add(self, derivatives: LayerDerivatives) -> None:
        if self.pending and list(self.pending[0].curvature) != list(derivatives.curvature):
            self.flush()  # the layers ran in another order
        self.pending.append(derivatives)
        enough = sum(own.size for own in self.pending) >= POSITIONS
        if enough or sum(own.nbytes for own in self.pending) >= PENDING_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        own = LayerDerivatives.joined(self.pending)
        self.pending = []
        for block, total in self.totals.items():
            columns, at, start = self.blocks[block], {}, 0
            for name, width in columns.items():
                size = own.delta[name].shape[1] * own.a[name][:, width].shape[1]
                at[name] = slice(start, start + size)
                start += size
            for k, l in own.curvature:
                if k in columns and l in columns:
                    _add_pair(total[at[k], at[l]], own, k, columns[k], l, columns[l])


def _add_pair(total: Tensor, own: LayerDerivatives, k: str, width_k: slice, l: str, width_l: slice) -> None:
    """total (O_k I_k, O_l I_l) += the rows of layer k and the columns of layer l, by outputs of layer k."""
    a_k, a_l, delta_l = own.a[k][:, width_k], own.a[l][:, width_l], own.delta[l]
    curvature, motion = own.curvature[k, l], own.motion.get((k, l))
    O_k, I_k, O_l, I_l = curvature.shape[1], a_k.shape[1], delta_l.shape[1], a_l.shape[1]
    target = total.unflatten(0, (O_k, I_k)).unflatten(2, (O_l, I_l))
    both = a_k if k == l else 2 * a_k
    inputs, crossed = _outer(both, a_l), _outer(both, delta_l)
    step = max(1, WORKSPACE // (I_k * O_l * I_l))
    for o in range(0, O_k, step):
        at = slice(o, o + step)
        product = curvature[:, at].flatten(1).T @ inputs
        target[at] += product.view(-1, O_l, I_k, I_l).transpose(1, 2)
        if motion is not None:
            product = motion[:, at, width_l].flatten(1).T @ crossed
            target[at] += product.view(-1, I_l, I_k, O_l).permute(0, 2, 3, 1)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """(N,I) and (N,J) as (N,IJ)."""
    return (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1)
