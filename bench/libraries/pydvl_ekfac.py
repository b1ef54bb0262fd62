"""pyDVL: its Fisher is built on the model's own probabilities, its damping is one number for all layers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydvl.influence.torch import EkfacInfluence
from torch.utils.data import DataLoader, TensorDataset

from bench.measure import once, peak_memory
from bench.settings import Setting

DAMPING = 1e-3


def run(setting: Setting, folder: Path, repeats: int) -> dict[str, Any]:
    data = DataLoader(TensorDataset(*setting.train), batch_size=setting.batch)
    before, memory = peak_memory(), 0
    seconds: dict[str, list[float]] = {"fit": [], "scores": []}
    for repeat in range(repeats):
        influence = EkfacInfluence(setting.net, update_diagonal=True, hessian_regularization=DAMPING, progress=False)
        seconds["fit"].append(once(partial(influence.fit, data))[1])

        def scores(influence: EkfacInfluence = influence) -> torch.Tensor:
            factors = influence.influence_factors(*setting.queries)
            return torch.cat([influence.influences_from_factors(factors, x, y) for x, y in data], dim=1)

        result, spent = once(scores)
        seconds["scores"].append(spent)
        if repeat == 0:
            memory = peak_memory() - before
    torch.save(result.detach(), folder / "scores.pt")
    own = influence.ekfac_representation
    torch.save(
        {
            name: {"U_A": U_A.detach(), "U_G": U_G.detach(), "Lambda": diagonal.detach().view(len(U_G), len(U_A))}
            for name, (_, U_A, U_G, diagonal) in own
        },
        folder / "eigen.pt",
    )
    return {"seconds": seconds, "memory": memory}
