"""dattri: empirical Fisher, one damping for all layers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from dattri.algorithm.influence_function import IFAttributorEKFAC
from dattri.task import AttributionTask
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from bench.measure import once, peak_memory
from bench.settings import Setting

DAMPING = 1e-3


def run(setting: Setting, folder: Path, repeats: int) -> dict[str, Any]:
    def mean_loss(parameters: Any, data: Any) -> Tensor:
        return cross_entropy(torch.func.functional_call(setting.net, parameters, (data[0],)), data[1])

    train = DataLoader(TensorDataset(*setting.train), batch_size=setting.batch)
    queries = DataLoader(TensorDataset(*setting.queries), batch_size=len(setting.queries[0]))
    before, memory = peak_memory(), 0
    seconds: dict[str, list[float]] = {"fit": [], "scores": []}
    for repeat in range(repeats):
        task = AttributionTask(mean_loss, setting.net, setting.net.state_dict())
        attributor = IFAttributorEKFAC(task, setting.layers, damping=DAMPING)
        seconds["fit"].append(once(partial(attributor.cache, train))[1])
        result, spent = once(partial(attributor.attribute, train, queries))
        seconds["scores"].append(spent)
        if repeat == 0:
            memory = peak_memory() - before
    torch.save(result.detach().T.contiguous(), folder / "scores.pt")
    return {"seconds": seconds, "memory": memory}
