"""What the machine can do at most: multiply-adds in registers, and copies of memory, measured in the same run."""

from __future__ import annotations

from functools import partial

import torch
from ihvp import _native

from bench.measure import Effort, Timing, once, race
from bench.products import threads

COPIED = 256 << 20  # bytes, well beyond the caches of a core
# Operations of a run on one thread: 10 to 30 ms of a wide vector unit, and of AMX's tiles.
WORK = {"float32": 2e9, "float64": 1e9, "bfloat16": 3e10}


class Peak:
    """A run of multiply-adds in registers with `count` threads."""

    def __init__(self, dtype: str, count: int) -> None:
        self.dtype, self.count = dtype, count
        self.rounds = max(1, int(WORK[dtype] * count / _native.peak(dtype, 1, count)))
        self.flops, self.first = once(self)

    def __call__(self) -> int:
        return _native.peak(self.dtype, self.rounds, self.count)

    def rate(self, timing: Timing) -> float:
        """FLOP per second, of the median."""
        return self.flops / timing.median


def rates(count: int, effort: Effort) -> dict[str, float]:
    """FLOP/s by dtype and "copy" in bytes per second (read and written), with `count` threads."""
    kinds = ["float32", "float64", *(["bfloat16"] if _native.isa() == "amx" else [])]
    with threads(count):
        source, target = torch.ones(COPIED // 4), torch.empty(COPIED // 4)
        peaks = {kind: Peak(kind, count) for kind in kinds}
        copy = partial(target.copy_, source)
        first = {kind: peak.first for kind, peak in peaks.items()} | {"copy": once(copy)[1]}
        timings = race({**peaks, "copy": copy}, first, effort)
    found = {kind: peak.rate(timings[kind]) for kind, peak in peaks.items()}
    return found | {"copy": 2 * COPIED / timings["copy"].median}
