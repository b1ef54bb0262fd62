"""Tasks and arguments, for users without kronfluence; its own serve as well. A task as an InfluenceModel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ihvp

STRATEGIES = ("identity", "diagonal", "kfac", "ekfac")
SAMPLED = "sampled"  # stands for targets that the task draws itself
PREFIX = "model."
CPU_BATCH = 64


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


# --- a task as an InfluenceModel -----------------------------------------------------------------------------------


class Objective(nn.Module):
    """A net that returns its batch; the model runs where the loss is asked for."""

    def __init__(self, model: nn.Module, task: Any, amp_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.task, self.amp_dtype = model, task, amp_dtype

    def forward(self, batch: Any) -> Any:
        return batch

    def loss(self, batch: Any, targets: Any) -> Tensor:
        with self.autocast():
            value: Tensor = self.task.compute_train_loss(batch, self.model, sample=targets == SAMPLED)
        return value

    def measurement(self, batch: Any) -> Tensor:
        with self.autocast():
            value: Tensor = self.task.compute_measurement(batch, self.model)
        return value

    @contextmanager
    def autocast(self) -> Iterator[None]:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.amp_dtype, enabled=self.amp_dtype is not None):
            yield


def influence_model(
    model: nn.Module, task: Any, progress: bool | None, amp_dtype: torch.dtype | None
) -> ihvp.InfluenceModel:
    if amp_dtype == torch.float16:
        raise NotImplementedError("amp_dtype=torch.float16 needs its losses scaled; torch.bfloat16 does not")
    net = Objective(model, task, amp_dtype)
    wanted = task.get_influence_tracked_modules()
    if wanted is None:
        wanted = [name for name, own in model.named_modules() if type(own) in (nn.Linear, nn.Conv2d)]

    def as_batch(raw: Any) -> ihvp.Batch:
        mask = task.get_attention_mask(raw)
        if mask is not None and not isinstance(mask, Tensor):
            raise NotImplementedError("get_attention_mask must return one mask (N,T) for all modules, or None")
        return ihvp.Batch(args=(raw,), mask=mask)

    return ihvp.InfluenceModel(
        net,
        lambda batch, targets: each_of(net.loss(batch, targets), batch),
        layers=[f"{PREFIX}{name}" for name in wanted],
        process_batch=as_batch,
        sample_targets=lambda batch, targets, generator: SAMPLED,
        progress=progress,
    )


def measurement_of(model: ihvp.InfluenceModel) -> Callable[[Any, Any], Tensor]:
    net = model.net
    assert isinstance(net, Objective)
    return lambda batch, targets: each_of(net.measurement(batch), batch)


def each_of(total: Tensor, batch: Any) -> Tensor:
    """A sum over a batch as one number an example: what is differentiated is their sum."""
    if not isinstance(total, Tensor) or total.numel() != 1:
        got = tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
        raise ValueError(f"a task must return the sum over its batch, got {got}")
    N = ihvp.Batch(args=(batch,)).size
    return total.reshape(1).expand(N) / N


def with_moments_of_positions(kfac: ihvp.IHVP) -> ihvp.IHVP:
    """kronfluence's G is the mean over positions where ihvp's is the sum over an example's."""
    state = kfac.state_dict()
    for key, counts in state.items():
        if key.endswith("/counts"):
            name, (positions, examples) = key.removesuffix("/counts"), counts.tolist()
            state[f"{name}/values_G"] = state[f"{name}/values_G"] * examples / positions
            state[key] = torch.tensor([positions, positions])
    kfac.load_state_dict(state)
    return kfac


def fitting(
    size: int | None,
    attempt: int,
    device: torch.device,
    loader: Callable[[int], Iterable[Any]],
    compute: Callable[[Iterable[Any]], Any],
) -> Any:
    """compute(loader(size)); without a size, from `attempt` on half of it as often as a device's memory runs out."""
    if size is not None:
        return compute(loader(size))
    if device.type == "cpu":  # whose memory does not run out with an error
        attempt = min(attempt, CPU_BATCH)
    while attempt > 1:
        try:
            return compute(loader(attempt))
        except torch.OutOfMemoryError:
            attempt //= 2
    return compute(loader(1))


def by_module(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    ending = f"/{what}"
    return {key.removesuffix(ending).removeprefix(PREFIX): x for key, x in state.items() if key.endswith(ending)}


def described(arguments: Any, kind: type, **more: str) -> dict[str, str]:
    """The arguments that results depend on: those that `kind` has."""
    return {own.name: str(getattr(arguments, own.name)) for own in fields(kind)} | more


def made(path: Path, arguments: dict[str, str], overwrite: bool) -> bool:
    """Whether a file is there and stays. Raises ValueError when it was made with other arguments."""
    if overwrite or not path.exists():
        return False
    known = json.loads(path.with_suffix(".json").read_text())
    if known != arguments:
        raise ValueError(
            f"{path} was made with {known}, asked for is {arguments}; take another name, or overwrite_output_dir=True"
        )
    return True


def saved(scores: dict[str, Tensor], path: Path, arguments: dict[str, str]) -> dict[str, Tensor]:
    """The scores on the CPU, in a file: under a temporary name first, then moved into place."""
    own = {name: x.detach().cpu().contiguous() for name, x in scores.items()}
    note(path, arguments)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(own, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return own


def note(path: Path, arguments: dict[str, str]) -> None:
    """Beside a file that is about to be written, what it was made with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(arguments))
