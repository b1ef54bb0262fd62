"""Tasks and arguments, for users without kronfluence; its own serve as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STRATEGIES = ("identity", "diagonal", "kfac", "ekfac")


class Task:
    """What a user says of a model: two sums over a batch, and the modules to track. See kronfluence.task.Task."""

    enable_post_process_per_sample_gradient = False

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The loss summed over the batch; with `sample`, on targets drawn from the model's own predictions."""
        raise NotImplementedError(f"{type(self).__name__} must implement compute_train_loss")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """What the influence on is asked for, summed over the batch."""
        raise NotImplementedError(f"{type(self).__name__} must implement compute_measurement")

    def get_influence_tracked_modules(self) -> list[str] | None:
        """Names of modules; None: every nn.Linear and nn.Conv2d."""
        return None

    def get_attention_mask(self, batch: Any) -> Tensor | None:
        """(N,T), 1 at real positions; None: there is no padding."""
        return None


@dataclass
class FactorArguments:
    """`strategy`: "identity", "diagonal", "kfac" or "ekfac". The first `*_max_examples` examples are read."""

    strategy: str = "ekfac"
    use_empirical_fisher: bool = False
    amp_dtype: torch.dtype | None = None
    covariance_max_examples: int | None = 100_000
    lambda_max_examples: int | None = 100_000


@dataclass
class ScoreArguments:
    """`damping_factor` None: 0.1 times the mean eigenvalue of each layer."""

    damping_factor: float | None = 1e-8
    amp_dtype: torch.dtype | None = None
    compute_per_module_scores: bool = False
    compute_per_token_scores: bool = False
    query_gradient_low_rank: int | None = None
    aggregate_query_gradients: bool = False
    aggregate_train_gradients: bool = False
    use_measurement_for_self_influence: bool = False


def factor_arguments(factor_args: Any) -> Any:
    arguments = FactorArguments() if factor_args is None else factor_args
    if arguments.strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {arguments.strategy!r}")
    return arguments


def fisher_of(arguments: Any) -> str:
    return "empirical" if arguments.use_empirical_fisher else "sampled"


def check_whole(data: Sequence[int] | None, modules: Sequence[int] | None) -> None:
    if data is not None or modules is not None:
        raise NotImplementedError("target_data_partitions and target_module_partitions: scores are computed whole")
