"""EKFAC end to end against kronfluence: the same MLP, data, batches, Fisher and damping.

Each library runs in a process of its own, so that memory is its own too: peak resident memory above that of the
process with everything imported and the model and data made. Numbers are checked before a ratio is printed. Both
libraries run at the same float32 matmul precision of torch.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import check, machine, once, peak_memory, relative_error, write

SIZES = (784, 512, 512, 512, 10)
EXAMPLES, QUERIES, BATCH = 2048, 64, 256
LIMITS = {"Lambda": 1e-4, "scores": 1e-3}
GOALS = {"fit": 30.0, "scores": 10.0, "memory": 3.0}


def setting() -> tuple[nn.Sequential, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The MLP with its initial weights, Gaussian inputs, labels of a random linear teacher."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for inputs, outputs in pairwise(SIZES):
        net.append(nn.Linear(inputs, outputs)).append(nn.ReLU())
    del net[-1]
    teacher = torch.randn(SIZES[0], SIZES[-1])
    x, queries = torch.randn(EXAMPLES, SIZES[0]), torch.randn(QUERIES, SIZES[0])
    return net, (x, (x @ teacher).argmax(1)), (queries, (queries @ teacher).argmax(1))


def run_ihvp(folder: Path, repeats: int) -> dict[str, Any]:
    import ihvp

    net, (x, y), query = setting()
    train = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    model = ihvp.InfluenceModel(net, nn.CrossEntropyLoss(reduction="none"), progress=False)
    before = peak_memory()
    seconds: dict[str, list[float]] = {"fit": [], "scores": []}
    memory = 0
    for repeat in range(repeats):
        curvature, fit = once(lambda: ihvp.EKFACIHVP(model, train, damping="auto"))
        calculator = ihvp.FirstOrderInfluenceCalculator(model, train, curvature)
        scores, score = once(lambda calculator=calculator: calculator.scores([query]))
        seconds["fit"].append(fit)
        seconds["scores"].append(score)
        if repeat == 0:
            memory = peak_memory() - before
    torch.save(scores, folder / "scores.pt")
    torch.save(curvature.evals, folder / "lambda.pt")
    return {"seconds": seconds, "memory": memory}


def run_kronfluence(folder: Path, repeats: int) -> dict[str, Any]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    net, train, query = setting()
    task = Classification()
    net = prepare_model(net, task)
    data, queries = TensorDataset(*train), TensorDataset(*query)
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    damping = ScoreArguments(damping_factor=None)  # None: 0.1 x mean(Lambda), as damping="auto"
    before = peak_memory()
    seconds: dict[str, list[float]] = {"covariance": [], "eigendecomposition": [], "lambda": [], "scores": []}
    memory = 0
    for repeat in range(repeats):
        analyzer = Analyzer(
            f"a{repeat}", net, task, cpu=True, output_dir=str(folder), disable_tqdm=True, disable_model_save=True
        )
        steps = {
            "covariance": lambda a=analyzer: a.fit_covariance_matrices(
                "f", data, per_device_batch_size=BATCH, factor_args=arguments
            ),
            "eigendecomposition": lambda a=analyzer: a.perform_eigendecomposition("f", factor_args=arguments),
            "lambda": lambda a=analyzer: a.fit_lambda_matrices(
                "f", data, per_device_batch_size=BATCH, factor_args=arguments
            ),
            "scores": lambda a=analyzer: a.compute_pairwise_scores(
                "s", "f", queries, data, QUERIES, per_device_train_batch_size=BATCH, score_args=damping
            ),
        }
        for step, f in steps.items():
            seconds[step].append(once(f)[1])
        if repeat == 0:
            memory = peak_memory() - before
    torch.save(analyzer.load_pairwise_scores("s")["all_modules"], folder / "scores.pt")
    torch.save(analyzer.load_lambda_matrices("f"), folder / "lambda.pt")
    torch.save(analyzer.load_eigendecomposition("f"), folder / "eigen.pt")
    return {"seconds": seconds, "memory": memory}


def lambda_in_their_basis(eigen: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Lambda by this library's op, given kronfluence's eigenvectors."""
    import ihvp
    from ihvp.capture import capture

    net, (x, y), _ = setting()
    model = ihvp.InfluenceModel(net, nn.CrossEntropyLoss(reduction="none"))
    total = {name: torch.zeros(layer.shape, dtype=torch.float64) for name, layer in model.layers.items()}

    def sink(layer: Any, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        U_A, U_G = eigen["activation_eigenvectors"][layer.name], eigen["gradient_eigenvectors"][layer.name]
        ihvp.ops.ekfac_diagonal_update_(total[layer.name], a, delta, U_A, U_G, mask=mask, bias=layer.bias)

    for pair in zip(x.split(BATCH), y.split(BATCH), strict=True):
        capture(model, model.batch(pair), sink)
    return {name: x / EXAMPLES for name, x in total.items()}


def child(library: str, folder: Path, repeats: int, precision: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "bench", "_child", library, str(folder), str(repeats), precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the run of {library} failed:\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run(quick: bool, output: Path | None, precision: str) -> None:
    print(json.dumps(machine()))
    with tempfile.TemporaryDirectory() as temporary:
        own_folder, peer_folder = Path(temporary, "ihvp"), Path(temporary, "kronfluence")
        own_folder.mkdir()
        peer_folder.mkdir()
        peer = child("kronfluence", peer_folder, 1 if quick else 3, precision)
        own = child("ihvp", own_folder, 5 if quick else 9, precision)

        eigen = torch.load(peer_folder / "eigen.pt")
        theirs = torch.load(peer_folder / "lambda.pt")["lambda_matrix"]
        for name, Lambda in lambda_in_their_basis(eigen).items():
            error = relative_error(Lambda, theirs[name] / EXAMPLES)
            check(f"Lambda of layer {name}, given kronfluence's eigenvectors", error, LIMITS["Lambda"])
        scores = torch.load(own_folder / "scores.pt"), torch.load(peer_folder / "scores.pt")
        check("scores end to end, each with its own eigenvectors", relative_error(*scores), LIMITS["scores"])

    def median(result: dict[str, Any], step: str) -> float:
        return statistics.median(result["seconds"][step])

    peer_fit = sum(median(peer, step) for step in ("covariance", "eigendecomposition", "lambda"))
    rows = [
        ("fit", peer_fit, median(own, "fit"), "s"),
        ("scores", median(peer, "scores"), median(own, "scores"), "s"),
        ("memory", peer["memory"] / 1e6, own["memory"] / 1e6, "MB"),
    ]
    print(f'\ntorch.set_float32_matmul_precision("{precision}") in both')
    print(f"{'EKFAC, MLP ' + '-'.join(map(str, SIZES)):<40}{'kronfluence':>14}{'ihvp':>12}{'ratio':>9}{'goal':>7}")
    for what, theirs_value, own_value, unit in rows:
        ratio = theirs_value / own_value
        print(f"{what:<40}{theirs_value:11.3f} {unit:<2}{own_value:9.3f} {unit:<2}{ratio:9.1f}{GOALS[what]:7.0f}")
    for step, values in peer["seconds"].items():
        print(f"  kronfluence {step}: {', '.join(f'{v:.2f}' for v in values)} s")
    for step, values in own["seconds"].items():
        print(f"  ihvp {step}: {', '.join(f'{v:.3f}' for v in values)} s")
    write(output, [{"bench": "pipeline", "model": "mlp", "precision": precision, "kronfluence": peer, "ihvp": own}])
