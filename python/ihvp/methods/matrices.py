"""The matrices of curvature, summed over batches into one (p_b,p_b) for each block, in float64.

The symmetric part of such a sum is the curvature.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ihvp import ops
from ihvp.batch import Batch, all_finite
from ihvp.methods.base import Vectors, gradients
from ihvp.methods.blocks import take
from ihvp.methods.layer_hessian import LayerHessians, layer_derivatives
from ihvp.methods.products import CHUNK, Parameters, differentiating, hessian_product, linearise_outputs
from ihvp.model import InfluenceModel

Totals = dict[str, Tensor]
Add = Callable[[Batch, int], None]
Sum = Callable[[Totals, InfluenceModel, dict[str, Parameters]], AbstractContextManager[Add]]
"""Within the context each batch is added; the sums are complete when it ends."""


@contextlib.contextmanager
def hessian_sum(totals: Totals, model: InfluenceModel, parameters: dict[str, Parameters]) -> Iterator[Add]:
    """total += sum_n of the Hessian of the loss: from derivatives at the layers where that is possible, else by rows.

    A row is the product with a unit vector.
    """
    layered = LayerHessians(totals, {block: own.block for block, own in parameters.items()})

    def add(batch: Batch, index: int) -> None:
        derivatives = layer_derivatives(model, batch, index)
        if derivatives is not None:
            layered.add(derivatives)
            return
        for block, total in totals.items():
            product, _ = hessian_product(model, parameters[block], batch, index)
            with torch.no_grad():
                for start in range(0, len(total), 4 * CHUNK):
                    rows = torch.arange(start, min(start + 4 * CHUNK, len(total)), device=total.device)
                    product(torch.nn.functional.one_hot(rows, len(total)), total[rows[0] : rows[-1] + 1])

    yield add
    layered.flush()


@contextlib.contextmanager
def gauss_newton_sum(totals: Totals, model: InfluenceModel, parameters: dict[str, Parameters]) -> Iterator[Add]:
    """total += sum_n J_n^T H_n J_n, J_n the Jacobian of the outputs, H_n the Hessian of the loss in the outputs.

    With H_n = U diag(s) U^T that is the sum of the squares of the rows of sqrt(s) U^T J_n, where s is not negative.
    """

    def add(batch: Batch, index: int) -> None:
        for block, total in totals.items():
            with differentiating(model):
                outputs, pull_back = linearise_outputs(parameters[block], batch)
                H = _output_hessians(model, batch, outputs)
            if not all_finite(H):
                raise FloatingPointError(f"the gauss_newton of batch {index} is not finite")
            values, U = torch.linalg.eigh(H)
            N, K = values.shape
            negligible = torch.finfo(model.dtype).eps * values.abs().amax(1, keepdim=True)
            roots = values.abs().sqrt() * (values.abs() > negligible)
            step = max(1, 4 * CHUNK // K)
            with torch.no_grad():
                for n in range(0, N, step):
                    at = slice(n, n + step)
                    seeds = torch.zeros(len(roots[at]), K, N, K, dtype=outputs.dtype, device=total.device)
                    weighted = (U[at] * roots[at].unsqueeze(1)).mT.to(outputs.dtype)
                    seeds[torch.arange(len(weighted)), :, torch.arange(n, n + len(weighted))] = weighted
                    pulled = torch.vmap(pull_back, randomness="same")(seeds.view(-1, *outputs.shape))
                    J = total.new_zeros(len(weighted) * K, len(total), dtype=model.dtype)
                    parameters[block].add(J, pulled)
                    negative = (values[at] < 0).flatten() & (roots[at] > 0).flatten()
                    ops.covariance_update_(total, J[~negative])
                    if bool(negative.any()):
                        total -= J[negative].double().T @ J[negative].double()

    yield add


def _output_hessians(model: InfluenceModel, batch: Batch, outputs: Tensor) -> Tensor:
    """(N,K,K): the Hessian of each example's loss in its outputs."""
    leaf = outputs.detach().requires_grad_()
    first = torch.autograd.grad(model.losses(leaf, batch, batch.targets).sum(), leaf, create_graph=True)[0]
    first = first.flatten(1) if first.dim() > 1 else first.unsqueeze(1)
    N, K = first.shape
    H = torch.zeros(N, K, K, dtype=torch.float64, device=outputs.device)
    for k in range(K):
        if first.requires_grad:
            row = torch.autograd.grad(first[:, k].sum(), leaf, retain_graph=True, allow_unused=True)[0]
            if row is not None:
                H[:, k] = row.reshape(N, K)
    return H


@contextlib.contextmanager
def fisher_sum(totals: Totals, model: InfluenceModel, parameters: dict[str, Parameters]) -> Iterator[Add]:
    """total += sum_n g_n g_n^T."""

    def add(batch: Batch, index: int) -> None:
        g: Vectors = gradients(model, batch, index=index)
        for block, total in totals.items():
            ops.covariance_update_(total, take(g, parameters[block].block))

    yield add


SUMS: dict[str, Sum] = {"hessian": hessian_sum, "gauss_newton": gauss_newton_sum, "fisher": fisher_sum}
