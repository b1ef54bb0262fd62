"""What an op is made of, and the choice among its implementations and contraction orders."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ihvp.ops import _gpu
from ihvp.ops._precision import common_precision, float32_products

IMPLEMENTATIONS = ("reference", "native", "triton", "cuda")
GPU = ("triton", "cuda")
REMEMBERED = 4096  # choices of an order; a loader of texts brings a new length with every batch
DEVICES = {"reference": ("cpu", "cuda"), "native": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}

_library = torch.library.Library("ihvp", "DEF")
_ops: dict[str, Op] = {}


@dataclass(frozen=True, eq=False)
class _Forced:
    """One `use`, the innermost at the end of `_forced`."""

    implementation: str


_forced: list[_Forced] = []
_explaining: set[int] = set()  # the threads inside `explain`


@dataclass(frozen=True)
class Candidate:
    """A contraction order with its cost: floating point operations, bytes moved, and workspace in bytes.

    `overhead` counts what is not a product, in floating point operations that would take as long: see `packing` and
    `short`. `saved` counts in the same way what narrower products save.
    """

    order: str
    flops: float
    bytes: float
    workspace: float = 0.0
    overhead: float = 0.0
    saved: float = 0.0

    def seconds(self, wide: bool, threads: int) -> float:
        """max((flops + overhead - saved) / peak, bytes / bandwidth) on a typical core.

        That is 100 GFLOP/s in float32, 8 GB/s from memory, 32 GB/s where all of it lies in a cache of 16 MB.
        """
        peak = (50e9 if wide else 100e9) * threads
        bandwidth = (32e9 if self.bytes < 16e6 else 8e9) * threads
        return max((self.flops + self.overhead - self.saved) / peak, self.bytes / bandwidth)


def packing(elements: float) -> float:
    """The overhead of copying elements into panels, from beyond the L2 cache. Measured on AVX-512."""
    return 120.0 * elements


def short(flops: float, depth: int) -> float:
    """The overhead of tiles that sum over few terms: loading, storing or squaring a tile takes as long as five."""
    return flops * 5.0 / max(depth, 1)


def segments(pairs: float) -> float:
    """The overhead of summing finished tiles over the positions of each example."""
    return 110.0 * pairs


def padded(count: int, unit: int) -> int:
    """The next multiple."""
    return (count + unit - 1) // unit * unit


@dataclass(frozen=True)
class Explanation:
    """Which implementation and order of an op would run for given arguments, and what the others would cost."""

    op: str
    implementation: str
    reason: str
    order: str | None
    candidates: tuple[Candidate, ...] = ()
    seconds: tuple[float, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.implementation} ({self.reason})"]
        for candidate, seconds in zip(self.candidates, self.seconds, strict=True):
            mark = "->" if candidate.order == self.order else "  "
            lines.append(
                f"{mark} {candidate.order:<16}{candidate.flops / 1e9:12.3f} GFLOP {candidate.bytes / 1e6:12.2f} MB"
                f" {candidate.workspace / 1e6:10.2f} MB workspace {seconds * 1e3:10.3f} ms"
            )
        return "\n".join(lines)


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    """Those among the arguments, and in the lists among them."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


class _ExplanationFound(BaseException):
    """Carries an explanation out of an op's function, past what it would do with a result or an error."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__()
        self.explanation = explanation


@dataclass(frozen=True)
class Op:
    """An op: its torch schema, its implementations by name, its trace (`fake`) and its cost model.

    All take the same positional arguments, those of the schema. `candidates` lists the contraction orders that the
    native implementation knows; an op with a single order needs none.
    """

    name: str
    schema: str
    implementations: dict[str, Callable[..., Any]]
    fake: Callable[..., Any]
    candidates: Callable[..., Sequence[Candidate]] | None = None
    _overload: list[Any] = field(default_factory=list)
    _best: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _library.define(self.name + self.schema)
        _library.impl(self.name, self._run_on_cpu, "CPU")
        _library.impl(self.name, self._run, "CUDA")
        torch.library.register_fake(f"ihvp::{self.name}", self.fake, lib=_library)
        self._overload.append(getattr(torch.ops.ihvp, self.name).default)
        _ops[self.name] = self

    def __call__(self, *args: Any) -> Any:
        if _explaining and threading.get_ident() in _explaining:
            raise _ExplanationFound(self._explain(*args))
        return self._overload[0](*args)

    def _run(self, *args: Any) -> Any:
        name, _ = self._choose(args)
        return self.implementations[name](*args)

    def _run_on_cpu(self, *args: Any) -> Any:
        """Where nothing is forced there is nothing to choose."""
        return self._run(*args) if _forced else self.implementations[self._default](*args)

    @functools.cached_property
    def _default(self) -> str:
        return "native" if "native" in self.implementations else "reference"

    def _choose(self, args: tuple[Any, ...]) -> tuple[str, str]:
        device = next(_tensors(args)).device
        present = [name for name in self.implementations if device.type in DEVICES[name]]
        if _forced:
            name = _forced[-1].implementation
            if name not in present:
                gone = "; no CUDA device is present" if name in GPU and not torch.cuda.is_available() else ""
                raise RuntimeError(
                    f'{self.name} has no "{name}" implementation for {device.type} tensors; it has '
                    + ", ".join(f'"{name}"' for name in present)
                    + gone
                )
            lacks = self._lacks(name, args)
            if lacks:
                raise RuntimeError(f'{self.name} has no "{name}" implementation for {lacks}, which "reference" takes')
            return name, "forced by ihvp.use"
        if device.type == "cuda":
            able = [name for name in present if not self._lacks(name, args)]
            return self._choose_on_gpu(_gpu.device_class(device), able, self._widest(args), _gpu.size_of(args))
        return self._default, f"of {', '.join(present)} on {device.type}"

    def _choose_on_gpu(
        self, kind: str, present: Sequence[str], widest: torch.dtype, size: str = "large"
    ) -> tuple[str, str]:
        """The fastest of what is proven on this device class for such operands; the reference where nothing is."""
        if widest == torch.float64:
            return "reference", "float64 operands have no kernel"
        speeds = _gpu.speedups(self.name, kind, widest, size)
        proven = {name: speed for name, speed in speeds.items() if name in present}
        name = max(proven, key=proven.__getitem__, default="reference")
        if proven.get(name, 0) <= 1:
            return "reference", f"no faster kernel is proven on {kind}" if proven else f"no kernel is proven on {kind}"
        return name, f"measured {proven[name]:.1f} times as fast as the reference on {kind}"

    def _lacks(self, name: str, args: tuple[Any, ...]) -> str:
        """What among the arguments an implementation does not take."""
        if name in GPU and self._widest(args) == torch.float64:
            return "float64 operands"
        if name in GPU and common_precision() is None:
            return "float32 precisions that torch.backends sets apart"
        implementation = self.implementations[name]
        lacks = implementation.lacks if isinstance(implementation, _gpu.Lazy) else None
        return "" if lacks is None else lacks(*args)

    def _widest(self, args: tuple[Any, ...]) -> torch.dtype:
        """The operands' widest type; the accumulator of an in-place op, its first argument, may be wider.

        The tensors of a list are of one type.
        """
        operands = args[1:] if self.name.endswith("_") else args
        firsts = [x[0] if isinstance(x, (list, tuple)) and x else x for x in operands]
        found = [x.dtype for x in firsts if isinstance(x, Tensor) and x.dtype.is_floating_point]
        return max(found, key=lambda dtype: dtype.itemsize)

    def best(self, *args: Any) -> str:
        """The order with the least predicted time; the first of equals.

        It is remembered by all that the costs depend on, for predicting takes longer than a small call.
        """
        key = (
            torch.get_num_threads(),
            float32_products(),
            *[(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in args],
        )
        order = self._best.get(key)
        if order is None:
            candidates, seconds = self._costs(*args)
            order = candidates[min(range(len(candidates)), key=seconds.__getitem__)].order
            if len(self._best) >= REMEMBERED:
                self._best.clear()
            self._best[key] = order
        return order

    def _costs(self, *args: Any) -> tuple[tuple[Candidate, ...], tuple[float, ...]]:
        candidates = tuple(self.candidates(*args)) if self.candidates else ()
        wide = any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args)
        threads = torch.get_num_threads()
        return candidates, tuple(candidate.seconds(wide, threads) for candidate in candidates)

    def _explain(self, *args: Any) -> Explanation:
        implementation, reason = self._choose(args)
        if implementation != "native" or self.candidates is None:
            return Explanation(self.name, implementation, reason, None)
        candidates, seconds = self._costs(*args)
        return Explanation(self.name, implementation, reason, self.best(*args), candidates, seconds)


@contextlib.contextmanager
def use(implementation: str) -> Iterator[None]:
    """Within this context every op runs by this implementation: "reference", "native", "triton" or "cuda".

    It holds for the whole process, other threads included. An op that lacks the implementation for the device of its
    arguments raises RuntimeError when it is called.

    Raises ValueError for an unknown name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    own = _Forced(implementation)
    _forced.append(own)
    try:
        yield
    finally:
        _forced.remove(own)  # not the last one: threads may leave in another order


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which implementation and contraction order `op(*args, **kwargs)` would run, and why. Nothing is computed.

    `op` is a function of `ihvp.ops`; `print` the result for a table of the candidates with their floating point
    operations, bytes and predicted times.

    Raises TypeError when `op` is not an op of ihvp, and whatever the op itself raises for wrong arguments.
    """
    if getattr(op, "__name__", None) not in _ops:
        raise TypeError(f"op must be a function of ihvp.ops, got {op!r}")
    thread = threading.get_ident()
    _explaining.add(thread)
    try:
        op(*args, **kwargs)
    except _ExplanationFound as found:
        return found.explanation
    finally:
        _explaining.discard(thread)
    raise TypeError(f"op must be a function of ihvp.ops, got {op!r}")


def implementations() -> dict[str, tuple[str, ...]]:
    """The implementations present, by op."""
    return {name: tuple(op.implementations) for name, op in sorted(_ops.items())}
