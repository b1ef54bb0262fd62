"""F v for many v at once, F the Hessian, Gauss-Newton or empirical Fisher matrix of the mean loss, by passes over data.

A batch is linearised once: its derivatives become a linear map, which is then applied to any number of vectors. While
the maps of all batches fit into memory they are kept, and later products touch neither the loader nor the net.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ihvp.batch import Batch, all_finite
from ihvp.capture import differentiable
from ihvp.methods.base import batches
from ihvp.methods.blocks import Block, apart, block_size, columns
from ihvp.methods.tokens import Tokens, gradient_dots, gradient_sums, token_batches, within
from ihvp.model import InfluenceModel

CURVATURES = ("hessian", "gauss_newton", "fisher")
KEPT_BYTES = 2**30  # of linearised batches
CHUNK, CHUNK_BYTES = 64, 2**27  # directions differentiated at once, and what their intermediate results may take
PROBES = 32

Product = Callable[[Tensor], Tensor]
"""(Q,p_b) -> (Q,p_b) in float64: each row times a curvature."""
BatchProduct = Callable[[Tensor, Tensor], None]
"""Adds to its second argument (Q,p_b), in float64, each row of its first times the sum of a batch's curvatures."""


class CurvatureProducts:
    """Products with the blocks of a curvature of the mean loss.

    The parameters are those of the time of the fit. The products run in the net's dtype and are summed in float64.

    Args:
        curvature: "hessian"; "gauss_newton", J^T H_outputs J, for a net that returns one tensor; or "fisher",
            (1/N) sum_n g_n g_n^T.
        blocks: block name -> layer name -> columns.

    Raises:
        ValueError: the loader is empty. FloatingPointError: a derivative is not finite; names the batch.

    Source: Pearlmutter 1994 for Hessian products; Schraudolph 2002 for Gauss-Newton's.
    """

    def __init__(
        self, model: InfluenceModel, loader: Iterable[Any], curvature: str, blocks: Mapping[str, Block]
    ) -> None:
        check_curvature(curvature)
        self.model, self.loader, self.curvature, self.blocks = model, loader, curvature, blocks
        self.parameters = {block: Parameters(model, own) for block, own in blocks.items()}
        self._kept: list[dict[str, BatchProduct]] | None = []
        self._means: dict[str, float] = {}
        self.examples = 0
        nbytes = 0
        for products, size, used in self._pass(list(blocks)):
            self.examples += size
            nbytes += used
            if self._kept is not None:
                self._kept = [*self._kept, products] if nbytes <= KEPT_BYTES else None
        if self.examples == 0:
            raise ValueError("the loader yielded no example; the curvature needs at least one")

    def __call__(self, block: str, v: Tensor) -> Tensor:
        """(Q,p_b) in float64: each row times the mean curvature of the block, by one pass over the data."""
        passed = self._kept if self._kept is not None else (products for products, _, _ in self._pass([block]))
        with torch.inference_mode(False), torch.no_grad():
            total = torch.zeros_like(v, dtype=torch.float64)
            v = v.to(self.model.dtype, copy=v.is_inference())
            for index, products in enumerate(passed):
                products[block](v, total)
                if not math.isfinite(float(total.sum())):
                    raise FloatingPointError(
                        f"block {block!r}, batch {index}: the {self.curvature} product is not finite"
                    )
        return total.div_(self.examples)

    def mean_eigenvalue(self, block: str) -> float:
        """trace / p_b, by Hutchinson's estimate with 32 random signs; exact up to 32 parameters."""
        if block not in self._means:
            p = block_size(self.model, self.blocks[block])
            if p <= PROBES:
                probes = torch.eye(p, dtype=torch.float64)
            else:
                generator = torch.Generator().manual_seed(0)
                probes = torch.randint(2, (PROBES, p), generator=generator).double() * 2 - 1
            probes = probes.to(self.model.device)
            self._means[block] = float((probes * self(block, probes)).sum()) / float(probes.square().sum())
        return self._means[block]

    def _pass(self, blocks: list[str]) -> Iterable[tuple[dict[str, BatchProduct], int, int]]:
        """For each batch of the loader: its products by block, its examples, the bytes that they hold."""
        model, loader = self.model, self.loader
        if self.curvature == "fisher":
            for tokens in token_batches(model, loader, "fisher products"):
                products = {block: fisher_product(model, self.blocks[block], tokens) for block in blocks}
                used = sum(x.nbytes + d.nbytes for x, d in tokens.values())
                yield products, len(next(iter(tokens.values()))[0]), used
            return
        linearise = LINEARISATIONS[self.curvature]
        for index, batch in batches(model, loader, f"{self.curvature} products"):
            with torch.inference_mode(False):
                own = batch.outside_inference()
            made = {block: linearise(model, self.parameters[block], own, index) for block in blocks}
            yield {block: product for block, (product, _) in made.items()}, batch.size, sum(n for _, n in made.values())


def check_curvature(curvature: str) -> None:
    if curvature not in CURVATURES:
        raise ValueError(f"curvature must be one of {', '.join(CURVATURES)}, got {curvature!r}")


Leaves = dict[str, Tensor]
"""Parameters by their names in the net, or vectors in their space with leading dimensions."""


class Parameters:
    """A block's parameters, copied, and the way between them and flat vectors (Q,p_b)."""

    def __init__(self, model: InfluenceModel, block: Block) -> None:
        self.model, self.block = model, block
        with torch.inference_mode(False), torch.no_grad():
            self.fixed: Leaves = {}
            for name in block:
                self.fixed |= {key: p.detach().clone() for key, p in model.layers[name].parameters().items()}
        inside = [columns(model.layers[name]).items() for name in block]
        own = [key for (name, at), keys in zip(block.items(), inside, strict=True) for key, c in keys if _within(c, at)]
        self.leaves: Leaves = {key: self.fixed.pop(key) for key in dict.fromkeys(own)}

    def apart(self, v: Tensor) -> Leaves:
        """(Q,p_b) as (Q,*) of each parameter, in its dtype."""
        found: Leaves = {}
        for name, part in apart(self.model, self.block, v).items():
            layer, at = self.model.layers[name], self.block[name]
            O, I = layer.shape
            whole = part
            if part.shape[-1] < I:
                whole = part.new_zeros(len(v), O, I)
                whole[..., at] = part
            for key, own in layer.split(whole).items():
                if layer.rows == slice(None) or key not in self.leaves:
                    found[key] = own
                    continue
                if key not in found:  # other groups of a convolution may be in other blocks
                    found[key] = own.new_zeros(len(v), *self.leaves[key].shape)
                found[key][:, layer.rows] = own
        return {key: found[key].to(p.dtype) for key, p in self.leaves.items()}

    def add(self, total: Tensor, x: Leaves) -> None:
        """total (Q,p_b) += (Q,*) of each parameter."""
        for name, part in apart(self.model, self.block, total).items():
            layer, at = self.model.layers[name], self.block[name]
            O, I = layer.shape
            whole = part if part.shape[-1] == I else part.new_zeros(len(total), O, I)
            for key, place in layer.split(whole).items():
                if key in x:
                    place.add_(x[key][:, layer.rows])
            if whole is not part:
                part.add_(whole[..., at])

    def outputs(self, leaves: Leaves, batch: Batch) -> Any:
        """The net's outputs at `leaves`; its buffers are copies, for a linearised batch may outlive this pass."""
        net = self.model.net
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        return torch.func.functional_call(net, self.fixed | leaves | buffers, batch.args, dict(batch.kwargs))


def _within(inner: slice, outer: slice) -> bool:
    return bool(outer.start <= inner.start and inner.stop <= outer.stop)


def hessian_product(
    model: InfluenceModel, parameters: Parameters, batch: Batch, index: int
) -> tuple[BatchProduct, int]:
    """sum_n of the Hessian of the loss, by reverse over reverse differentiation, and the bytes that it holds."""

    def loss(leaves: Leaves) -> Tensor:
        return model.losses(parameters.outputs(leaves, batch), batch, batch.targets).sum()

    with differentiating(model) as made:
        gradient, pull_back = vjp(torch.func.grad(loss), parameters.leaves)
    for own in gradient.values():
        _check_finite(own, "gradient", index)
    return _batched(pull_back, made.nbytes, parameters), made.nbytes


def gauss_newton_product(
    model: InfluenceModel, parameters: Parameters, batch: Batch, index: int
) -> tuple[BatchProduct, int]:
    """sum_n J_n^T H_n J_n; J is the transpose of the linear map u -> J^T u, so no forward mode is needed."""

    def loss(outputs: Tensor) -> Tensor:
        return model.losses(outputs, batch, batch.targets).sum()

    with differentiating(model) as made:
        outputs, pull_back = linearise_outputs(parameters, batch)
        gradient, curve = vjp(torch.func.grad(loss), outputs)
        _, push = vjp(pull_back, torch.zeros_like(outputs))
    _check_finite(gradient, "gradient at the outputs", index)
    return _batched(lambda v: pull_back(curve(push(v))), made.nbytes, parameters), made.nbytes


def fisher_product(model: InfluenceModel, block: Block, tokens: Tokens) -> BatchProduct:
    """sum_n g_n <g_n, v>, from tokens."""
    own = within(tokens, block)
    dtype = next(iter(own.values()))[0].dtype

    def product(v: Tensor, total: Tensor) -> None:
        total += gradient_sums(own, gradient_dots(own, apart(model, block, v.to(dtype))))

    return product


LINEARISATIONS = {"hessian": hessian_product, "gauss_newton": gauss_newton_product}


def vjp(f: Callable[[Any], Any], x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """f(x), and u -> J^T u."""
    pulled = torch.func.vjp(f, x)
    return pulled[0], lambda u: pulled[1](u)[0]


def linearise_outputs(parameters: Parameters, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Leaves]]:
    """The net's outputs, and u -> J^T u, J their Jacobian."""

    def outputs(leaves: Leaves) -> Tensor:
        result = parameters.outputs(leaves, batch)
        if not isinstance(result, Tensor):
            raise TypeError(
                f'curvature="gauss_newton" needs a net that returns one tensor, got {type(result).__name__}'
            )
        return result

    return vjp(outputs, parameters.leaves)


def _batched(f: Callable[[Leaves], Leaves], nbytes: int, parameters: Parameters) -> BatchProduct:
    """Over the rows of v, as many at once as the intermediate results allow."""
    chunk = max(1, min(CHUNK, CHUNK_BYTES // max(1, nbytes)))
    rows = torch.vmap(f, randomness="same")

    def product(v: Tensor, total: Tensor) -> None:
        for part, place in zip(v.to(parameters.model.dtype).split(chunk), total.split(chunk), strict=True):
            if len(part):
                parameters.add(place, rows(parameters.apart(part)))

    return product


def _check_finite(x: Tensor, what: str, index: int) -> None:
    if not all_finite(x):
        raise FloatingPointError(f"the {what} of batch {index} is not finite")


class _Bytes(TorchDispatchMode):
    """Counts the bytes of all results: a bound on what a linearised batch holds."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.nbytes += sum(x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


@contextlib.contextmanager
def differentiating(model: InfluenceModel) -> Iterator[_Bytes]:
    """`differentiable`, with a count of what is made there."""
    with differentiable(model), _Bytes() as counted:
        yield counted
