"""A task as an InfluenceModel, and what differs in scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ihvp

SAMPLED = "sampled"  # stands for targets that the task draws itself
PREFIX = "model."


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
    size: int | None, attempt: int, loader: Callable[[int], Iterable[Any]], compute: Callable[[Iterable[Any]], Any]
) -> Any:
    """compute(loader(size)); without a size, from `attempt` on half of it as often as memory runs out."""
    if size is not None:
        return compute(loader(size))
    while attempt > 1:
        try:
            return compute(loader(attempt))
        except torch.OutOfMemoryError:
            attempt //= 2
    return compute(loader(1))


def by_module(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    ending = f"/{what}"
    return {key.removesuffix(ending).removeprefix(PREFIX): x for key, x in state.items() if key.endswith(ending)}


def saved(scores: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {name: x.detach().cpu().contiguous() for name, x in scores.items()}
    save_file(own, path)
    return own
