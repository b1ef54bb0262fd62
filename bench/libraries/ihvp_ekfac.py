"""This library, and two plain passes of the model through torch beside each fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ihvp
import torch
from ihvp.methods import ekfac
from ihvp.methods.kronecker import eigendecompose
from torch import Tensor, nn

from bench.measure import once, peak_memory
from bench.settings import Setting, losses


def run(setting: Setting, folder: Path, repeats: int, cache_bytes: int = 0) -> dict[str, Any]:
    model = ihvp.InfluenceModel(setting.net, losses, layers=setting.layers, progress=False, cache_bytes=cache_bytes)
    train = setting.batches
    steps = ("fit", "eigendecomposition", "scores", "two plain passes")
    seconds: dict[str, list[float]] = {step: [] for step in steps}
    before, memory = peak_memory(), 0
    for repeat in range(repeats):
        model.clear_cache()
        with eigendecomposition_timed() as eigen:
            curvature, fit = once(lambda: ihvp.EKFACIHVP(model, train, damping="auto"))
        calculator = ihvp.FirstOrderInfluenceCalculator(model, train, curvature)
        scores, score = once(partial(calculator.scores, [setting.queries]))
        if repeat == 0:
            memory = peak_memory() - before
        plain = once(partial(plain_passes, setting, 2))[1]
        for step, value in zip(steps, (fit, sum(eigen), score, plain), strict=True):
            seconds[step].append(value)
    torch.save(scores, folder / "scores.pt")
    return {"seconds": seconds, "memory": memory}


@contextmanager
def eigendecomposition_timed() -> Iterator[list[float]]:
    """The seconds that a fit spends on eigendecompositions, a number a call."""
    spent: list[float] = []

    def timed(*arguments: Any) -> Any:
        result, seconds = once(lambda: eigendecompose(*arguments))
        spent.append(seconds)
        return result

    with mock.patch.object(ekfac, "eigendecompose", timed):
        yield spent
    if not spent:
        raise SystemExit("a fit made no eigendecomposition that could be timed")


def plain_passes(setting: Setting, count: int) -> None:
    """Forward and backward to the outputs of the tracked layers, with nothing done there and no weight gradients."""
    tracked = [setting.net.get_submodule(name) for name in setting.layers]
    required = [(p, p.requires_grad) for p in setting.net.parameters()]
    firsts: list[Tensor] = []

    def root(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not output.requires_grad:
            firsts.append(output.requires_grad_())

    handles = [module.register_forward_hook(root) for module in tracked]
    try:
        for p, _ in required:
            p.requires_grad_(False)
        for inputs, targets in setting.batches * count:
            firsts.clear()
            torch.autograd.grad(losses(setting.net(inputs), targets).sum(), firsts)
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in required:
            p.requires_grad_(flag)
