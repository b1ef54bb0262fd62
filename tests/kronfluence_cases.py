"""What is asked of kronfluence's Analyzer and of its adapter alike: a case takes either module and gives tensors.

PYTHONPATH=. python tests/kronfluence_cases.py        writes kronfluence 1.0.1's answers to tests/kronfluence.json
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from pydvl_cases import waves
from torch import Tensor, nn
from torch.utils.data import TensorDataset

COMMAND = "PYTHONPATH=. python tests/kronfluence_cases.py"
RECORD = Path(__file__).with_name("kronfluence.json")
N, QUERIES, BATCH, CLASSES, POSITIONS = 10, 3, 4, 3, 4
F32 = torch.float32


def kronfluence_names() -> Any:
    """kronfluence's names as the adapter has them."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    return SimpleNamespace(
        Analyzer=Analyzer,
        prepare_model=prepare_model,
        FactorArguments=FactorArguments,
        ScoreArguments=ScoreArguments,
        Task=Task,
    )


def filled(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(waves(*p.shape, step=1.7 + i, dtype=F32))
    return net


def mlp() -> nn.Module:
    layers = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, CLASSES)
    return filled(nn.Sequential(*layers))


def convolutions() -> nn.Module:
    own = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    return filled(nn.Sequential(own, nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False), nn.Flatten(), nn.Linear(8, CLASSES)))


INPUTS = {"mlp": (5,), "tokens": (POSITIONS, 5), "convolutions": (2, 5, 5)}


def data(net: str, count: int, step: float) -> TensorDataset:
    x = waves(count, *INPUTS[net], step=step, dtype=F32)
    if net != "tokens":
        return TensorDataset(x, torch.arange(count) * 7 % 5 % CLASSES)
    targets = (torch.arange(count * POSITIONS) * 7 % 5 % CLASSES).view(count, POSITIONS)
    mask = (torch.arange(POSITIONS) <= (torch.arange(count) * 3 % POSITIONS).unsqueeze(1)).long()
    return TensorDataset(x, targets, mask)


def task_of(api: Any, modules: list[str] | None) -> Any:
    class Summed(api.Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0])
            losses = F.cross_entropy(logits.flatten(0, -2), batch[1].flatten(), reduction="none")
            return (losses * batch[2].flatten()).sum() if len(batch) > 2 else losses.sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            own = model(batch[0]).tanh()[..., 0]
            return (own * batch[2]).sum() if len(batch) > 2 else own.sum()

        def get_influence_tracked_modules(self) -> list[str] | None:
            return modules

        def get_attention_mask(self, batch: Any) -> Tensor | None:
            return batch[2] if len(batch) > 2 else None

    return Summed()


Answer = dict[str, Tensor]
Case = Callable[[Any], Answer]


def analysed(net: str, strategy: str, modules: list[str] | None = None) -> Case:
    """Factors, and scores in all their forms."""

    def case(api: Any) -> Answer:
        task = task_of(api, modules)
        model = api.prepare_model(convolutions() if net == "convolutions" else mlp(), task)
        train, queries = data(net, N, 2.3), data(net, QUERIES, 3.1)
        found: Answer = {}
        with tempfile.TemporaryDirectory() as folder:
            own = api.Analyzer("own", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
            arguments = api.FactorArguments(strategy=strategy, use_empirical_fisher=True)
            own.fit_all_factors("f", train, per_device_batch_size=BATCH, factor_args=arguments)

            def pairwise(what: str, **options: Any) -> None:
                given = api.ScoreArguments(**({"damping_factor": 0.1} | options))
                sizes = {"per_device_query_batch_size": 2, "per_device_train_batch_size": BATCH}
                own.compute_pairwise_scores(what, "f", queries, train, **sizes, score_args=given)
                for module, scores in own.load_pairwise_scores(what).items():
                    found[f"{what}, {module}"] = scores

            def themselves(what: str, **options: Any) -> None:
                given = api.ScoreArguments(**({"damping_factor": 0.1} | options))
                own.compute_self_scores(what, "f", train, per_device_train_batch_size=BATCH, score_args=given)
                found[what] = own.load_self_scores(what)["all_modules"]

            pairwise("scores")
            pairwise("scores, automatic damping", damping_factor=None)
            pairwise("scores by module", compute_per_module_scores=True)
            pairwise("scores of all queries", aggregate_query_gradients=True)
            pairwise("scores of all examples", aggregate_train_gradients=True)
            themselves("self scores")
            themselves("self scores of the measurement", use_measurement_for_self_influence=True)
            if net == "tokens":
                pairwise("scores by token", compute_per_token_scores=True)
            if strategy in ("kfac", "ekfac"):
                for what, parts in own.load_covariance_matrices("f").items():
                    found |= {f"{what} of {module}": x.reshape(-1) for module, x in parts.items()}
                for what, parts in own.load_eigendecomposition("f").items():
                    found |= {f"{what} of {module}": x for module, x in parts.items() if "values" in what}
            if strategy == "diagonal":  # EKFAC's is that of a basis which is not unique
                for what, parts in own.load_lambda_matrices("f").items():
                    found |= {f"{what} of {module}": x.reshape(-1) for module, x in parts.items()}
        return found

    return case


CASES: dict[str, Case] = {
    f"{net}, {strategy}": analysed(net, strategy)
    for net in INPUTS
    for strategy in ("identity", "diagonal", "kfac", "ekfac")
} | {"two modules": analysed("mlp", "ekfac", ["0", "4"])}


def main() -> None:
    torch.manual_seed(0)
    names = kronfluence_names()
    answers = {name: {what: x.double().tolist() for what, x in case(names).items()} for name, case in CASES.items()}
    rounded = json.loads(json.dumps(answers), parse_float=lambda x: float(f"{float(x):.8g}"))
    record = {"kronfluence": importlib.metadata.version("kronfluence"), "command": COMMAND, "answers": rounded}
    RECORD.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
