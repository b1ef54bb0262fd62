"""Scores of single terms of a training example's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp.batch import Batch, all_finite
from ihvp.calculators.functional import call
from ihvp.capture import differentiable
from ihvp.methods.products import vjp
from ihvp.methods.queries import Queries
from ihvp.model import InfluenceModel

CHUNK = 16  # queries differentiated at once


def token_loss_scores(model: InfluenceModel, queries: Queries, batch: Batch, *, index: int = 0) -> Tensor:
    """(Q,N,T): <P_q, gradient of the loss of example n at position t alone>.

    That is J P_q, J the Jacobian of the (N,T) losses, which no backward pass for each position is needed for: J is the
    transpose of the linear map u -> J^T u, so pulling back through that pushes queries forward, CHUNK at a time. No
    more of them are dense at once.

    Args:
        index: number of the batch, for errors.

    Raises:
        ValueError: loss_fn returns one loss per example. FloatingPointError: a score is not finite; names the batch.
    """
    with differentiable(model):
        batch = batch.outside_inference()
        weights = {name: p.detach() for name, p in model.weights.items()}

        def losses(weights: dict[str, Tensor]) -> Tensor:
            return model.losses_apart(call(model, batch, weights), batch, batch.targets)

        terms: Tensor
        terms, pull_back = vjp(losses, weights)
        if terms.dim() != 2:
            raise ValueError(f"the loss at each token needs a loss_fn that returns (N,T), got {tuple(terms.shape)}")
        _, push = vjp(pull_back, torch.zeros_like(terms))
        pushed = torch.vmap(push, randomness="same")
        Q = next(iter(queries.values())).size
        scores = torch.zeros(Q, *terms.shape, dtype=model.dtype, device=model.device)
        for first in range(0, Q, CHUNK):
            at = slice(first, first + CHUNK)
            P = model.split({name: own.dense(at) for name, own in queries.items()})
            scores[at] = pushed({key: p.to(weights[key].dtype) for key, p in P.items()}).detach()
    if not all_finite(scores):
        raise FloatingPointError(f"the scores of single losses of batch {index} are not finite")
    return scores
