"""kronfluence: empirical Fisher, damping 0.1 x mean(Lambda)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench.measure import once, peak_memory
from bench.settings import Setting, losses


class Summed(Task):
    def __init__(self, layers: list[str]) -> None:
        super().__init__()
        self.layers = layers

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return losses(model(batch[0]), batch[1]).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.layers


def run(setting: Setting, folder: Path, repeats: int) -> dict[str, Any]:
    task = Summed(setting.layers)
    net = prepare_model(setting.net, task)
    data, queries = TensorDataset(*setting.train), TensorDataset(*setting.queries)
    batch = {"per_device_batch_size": setting.batch}
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    damping = ScoreArguments(damping_factor=None)  # None: 0.1 x mean(Lambda), as damping="auto"
    before, memory = peak_memory(), 0
    seconds: dict[str, list[float]] = {"covariance": [], "eigendecomposition": [], "lambda": [], "scores": []}
    for repeat in range(repeats):
        own = Analyzer(
            f"a{repeat}", net, task, cpu=True, output_dir=str(folder), disable_tqdm=True, disable_model_save=True
        )
        steps = {
            "covariance": lambda own=own: own.fit_covariance_matrices("f", data, factor_args=arguments, **batch),
            "eigendecomposition": lambda own=own: own.perform_eigendecomposition("f", factor_args=arguments),
            "lambda": lambda own=own: own.fit_lambda_matrices("f", data, factor_args=arguments, **batch),
            "scores": lambda own=own: own.compute_pairwise_scores(
                "s", "f", queries, data, len(queries), per_device_train_batch_size=setting.batch, score_args=damping
            ),
        }
        for step, f in steps.items():
            seconds[step].append(once(f)[1])
        if repeat == 0:
            memory = peak_memory() - before
    torch.save(own.load_pairwise_scores("s")["all_modules"], folder / "scores.pt")
    torch.save(own.load_lambda_matrices("f")["lambda_matrix"], folder / "lambda.pt")
    torch.save(own.load_eigendecomposition("f"), folder / "eigen.pt")
    return {"seconds": seconds, "memory": memory}
