"""EKFAC end to end on a GPU, on a transformer of GPT-2 small's shape: ihvp by each implementation, and kronfluence."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ihvp
import torch
import torch.nn.functional as F
from ihvp.ops import _gpu
from torch import Tensor, nn

from bench.measure import check, relative_error, write

HEADS, VOCABULARY = 12, 512
FULL = {"width": 768, "depth": 12, "positions": 512, "sequences": 64, "queries": 16, "batch": 16}
TINY = {"width": 24, "depth": 1, "positions": 5, "sequences": 4, "queries": 2, "batch": 2}  # to try the bench itself


class Block(nn.Module):
    """A pre-norm transformer block of linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, positions: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(self.tokens(x) + places)))


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")


def timed(device: torch.device, f: Callable[[], Any]) -> tuple[Any, float]:
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = f()
    wait()
    return result, time.perf_counter() - start


def run_ihvp(
    net: nn.Module, layers: list[str], train: list[Any], queries: list[Any], device: torch.device
) -> tuple[Tensor, dict[str, float]]:
    model = ihvp.InfluenceModel(net, losses, layers=layers)
    curvature, fit = timed(device, lambda: ihvp.EKFACIHVP(model, train, damping="auto"))
    calculator = ihvp.FirstOrderInfluenceCalculator(model, train, curvature)
    found, scores = timed(device, lambda: calculator.scores(queries))
    return found, {"fit": fit, "scores": scores}


def run_kronfluence(
    net: nn.Module, layers: list[str], train: list[Any], queries: list[Any], device: torch.device
) -> tuple[Tensor, dict[str, float]]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Summed(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return losses(model(batch[0]), batch[1]).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

    task = Summed()
    data, wanted = (TensorDataset(*(torch.cat(x).cpu() for x in zip(*own, strict=True))) for own in (train, queries))
    own = prepare_model(net, task)
    size = {"per_device_batch_size": len(train[0][0])}
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("gpu", own, task, cpu=device.type == "cpu", output_dir=folder, disable_tqdm=True)
        arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        fit = timed(device, lambda: analyzer.fit_all_factors("f", data, factor_args=arguments, **size))[1]
        scores = timed(
            device,
            lambda: analyzer.compute_pairwise_scores(
                "s",
                "f",
                wanted,
                data,
                len(wanted),
                per_device_train_batch_size=len(train[0][0]),
                score_args=ScoreArguments(damping_factor=None),
            ),
        )[1]
        return analyzer.load_pairwise_scores("s")["all_modules"], {"fit": fit, "scores": scores}


def run(output: Path | None, device: torch.device, sizes: dict[str, int]) -> None:
    """Each run begins with the same weights and data; the scores agree before a time is printed."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench pipeline --device cuda needs a CUDA device, and there is none")
    torch.manual_seed(0)
    net = Transformer(sizes["width"], sizes["depth"], sizes["positions"]).to(device)
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear) and name != "head"]

    def batches(count: int) -> list[Any]:
        x = torch.randint(VOCABULARY, (count, sizes["positions"] + 1), device=device)
        return list(zip(x[:, :-1].split(sizes["batch"]), x[:, 1:].split(sizes["batch"]), strict=True))

    train, queries = batches(sizes["sequences"]), batches(sizes["queries"])
    runs: dict[str, Callable[..., Any]] = {"reference": by("reference", run_ihvp)}
    if device.type == "cuda" and _gpu.installed("triton"):
        runs["triton"] = by("triton", run_ihvp)
    if importlib.util.find_spec("kronfluence"):
        runs["kronfluence"] = run_kronfluence
    else:
        print("kronfluence is not installed: no ratio against it")
    first = None
    for name, call in runs.items():
        # Kernels are compiled and libraries loaded before the clock runs; kronfluence puts other modules into its net.
        call(copy.deepcopy(net), layers, train[:1], queries[:1], device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        scores, seconds = call(net, layers, train, queries, device)
        memory = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
        first = scores if first is None else first
        check(f"pipeline scores: {name}", relative_error(scores.cpu(), first.cpu()), 1e-2)
        text = "  ".join(f"{step} {own:8.3f} s" for step, own in seconds.items())
        print(f"{name:<14}{text}  peak memory {memory / 1e6:.0f} MB", flush=True)
        write(output, [{"bench": "gpu pipeline", "run": name, "seconds": seconds, "memory": memory, "sizes": sizes}])


def by(implementation: str, f: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with ihvp.use(implementation):
            return f(*arguments)

    return call
