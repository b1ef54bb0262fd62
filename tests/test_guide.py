"""The guide's complete example."""

from __future__ import annotations

from itertools import pairwise

import ihvp
import torch
from guide_case import guide_data, guide_loaders, guide_net
from ihvp import EKFACIHVP, Batch, FirstOrderInfluenceCalculator, InfluenceModel
from nets import F64, assert_near, cross_entropy, gradients, rows
from torch import Tensor, nn


def test_the_guides_complete_example() -> None:
    """Its section 7, on torch: an MLP of which only `hidden` to `classifier` are watched."""
    torch.manual_seed(42)
    net = guide_net()
    (X_train, y_train), (X_test, y_test) = guide_data()
    train_dataset, test_dataset, hessian_dataset = guide_loaders((X_train, y_train), (X_test, y_test))

    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(5):
        for x, y in train_dataset:
            optimizer.zero_grad()
            cross_entropy(net(x), y).mean().backward()
            optimizer.step()

    def process_batch_for_loss(batch: tuple[Tensor, Tensor]) -> Batch:
        inputs, labels = batch
        return Batch(args=(inputs,), targets=labels, weights=torch.ones_like(labels, dtype=torch.float32))

    influence_model = InfluenceModel(
        net,
        nn.CrossEntropyLoss(reduction="none"),
        start_layer="hidden",
        last_layer="classifier",
        process_batch=process_batch_for_loss,
        progress=False,
    )
    assert influence_model.nb_params == 65 * 32 + 33 * 10
    assert list(influence_model.weights) == [
        f"{name}.{key}" for name in ("hidden", "classifier") for key in ("weight", "bias")
    ]
    curvature = EKFACIHVP(influence_model, hessian_dataset, damping=1e-3, update_eigen=True)
    for name, (O, I) in {"hidden": (32, 65), "classifier": (10, 33)}.items():
        A, G = curvature.kfac_blocks[name]
        assert A.shape == (I, I) and G.shape == (O, O) and curvature.evals[name].shape == (O, I)
    calculator = FirstOrderInfluenceCalculator(influence_model, train_dataset, curvature)
    found = list(calculator.top_k(test_dataset, train_dataset, k=5, order=ihvp.Order.DESCENDING))
    assert len(found) == 1
    (test_inputs, test_labels), influence_values, train_samples = found[0]
    assert torch.equal(test_inputs, X_test) and torch.equal(test_labels, y_test)
    assert influence_values.shape == train_samples.shape == (10, 5)
    assert all((earlier >= later).all() for earlier, later in pairwise(influence_values.T))

    # The same answer from the definitions, in float64.
    net.double()
    train, test = (Batch(args=(x.double(),), targets=y) for x, y in ((X_train, y_train), (X_test, y_test)))
    g_hessian, g_train, g_test = (gradients(influence_model, batch) for batch in (rows(train, slice(50)), train, test))
    scores = torch.zeros(10, 100, dtype=F64)
    for name in influence_model.layers:
        U_A, U_G = (U.double() for U in curvature.evecs[name])
        rotated = [U_G.T @ g[name] @ U_A for g in (g_hessian, g_train, g_test)]
        weight = 1 / (rotated[0].square().mean(0) + 1e-3)
        scores += (rotated[2] * weight).flatten(1) @ rotated[1].flatten(1).T
    assert_near(influence_values.double(), scores.gather(1, train_samples), 1e-4)
    assert_near(scores.gather(1, train_samples), scores.topk(5).values, 1e-4)
