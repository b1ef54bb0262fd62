"""kronfluence's Analyzer gives kronfluence's answers: recorded ones on every run, its own where it can be imported."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kronfluence_cases
import pytest
import torch
import torch.nn.functional as F
from ihvp import EKFACIHVP, FirstOrderInfluenceCalculator, InfluenceModel
from ihvp.adapters import kronfluence_api
from ihvp.adapters.kronfluence_api import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from kronfluence_cases import BATCH, CASES, data, kronfluence_names, mlp, task_of
from nets import assert_near
from torch import Tensor, nn
from torch.utils.data import DataLoader

AGREE = 1e-4  # relative; both are in float32
RECORD = json.loads(kronfluence_cases.RECORD.read_text())

needs_kronfluence = pytest.mark.skipif(
    importlib.util.find_spec("kronfluence") is None, reason="kronfluence is not installed"
)


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_recorded_of_kronfluence(name: str) -> None:
    own, theirs = CASES[name](kronfluence_api), RECORD["answers"][name]
    assert own.keys() == theirs.keys()
    for what, values in theirs.items():
        assert_near(own[what].double(), torch.tensor(values, dtype=torch.float64), AGREE)


@needs_kronfluence
@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_kronfluence(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = CASES[name](kronfluence_names())
    for what, x in CASES[name](kronfluence_api).items():
        assert_near(x.double(), theirs[what].double(), AGREE)


METHODS = [
    "fit_all_factors",
    "fit_covariance_matrices",
    "perform_eigendecomposition",
    "fit_lambda_matrices",
    "compute_pairwise_scores",
    "compute_self_scores",
    "__init__",
]


@needs_kronfluence
@pytest.mark.parametrize("name", METHODS)
def test_leading_arguments_are_those_of_kronfluence(name: str) -> None:
    own, theirs = (
        list(inspect.signature(getattr(api.Analyzer, name)).parameters.values())
        for api in (kronfluence_api, kronfluence_names())
    )
    shared = [one for one in theirs if one.name in {other.name for other in own}]
    assert [(one.name, str(one.default)) for one in own] == [(one.name, str(one.default)) for one in shared]


def test_the_record_says_where_it_is_from() -> None:
    assert (RECORD["kronfluence"], RECORD["command"]) == ("1.0.1", kronfluence_cases.COMMAND)
    assert RECORD["answers"].keys() == CASES.keys()


# --- what is not in the answers ------------------------------------------------------------------------------------

EMPIRICAL = FactorArguments(use_empirical_fisher=True)


def analyzer(folder: Path, task: Any = None, model: nn.Module | None = None) -> Analyzer:
    task = task_of(kronfluence_api, None) if task is None else task
    return Analyzer("own", mlp() if model is None else model, task, cpu=True, disable_tqdm=True, output_dir=folder)


def scored(own: Analyzer, name: str, query_batch: int = 2, **options: Any) -> Tensor:
    arguments = ScoreArguments(**({"damping_factor": 0.1} | options))
    train, queries = data("mlp", 10, 2.3), data("mlp", 3, 3.1)
    found = own.compute_pairwise_scores(name, "f", queries, train, query_batch, BATCH, score_args=arguments)
    return found["all_modules"]


@pytest.mark.parametrize("rank", [None, 1])
def test_the_same_as_ihvps_own_objects(rank: int | None, tmp_path: Path) -> None:
    own = analyzer(tmp_path)
    own.fit_all_factors("f", data("mlp", 10, 2.3), BATCH, factor_args=EMPIRICAL)
    net = mlp()
    model = InfluenceModel(net, lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"))
    train, queries = (list(DataLoader(data("mlp", *which), BATCH)) for which in ((10, 2.3), (3, 3.1)))
    curvature = EKFACIHVP(model, train, damping=0.1)
    calculator = FirstOrderInfluenceCalculator(
        model, train, curvature, measurement=lambda outputs, targets: outputs.tanh()[..., 0], query_rank=rank
    )
    assert_near(scored(own, "s", query_gradient_low_rank=rank), calculator.scores(queries).double(), 1e-5)


def test_what_exists_is_kept_unless_it_is_to_be_overwritten(tmp_path: Path) -> None:
    train = data("mlp", 10, 2.3)
    analyzer(tmp_path).fit_all_factors("f", train, BATCH, factor_args=EMPIRICAL)
    own = analyzer(tmp_path)
    first = scored(own, "s")
    own.fit_all_factors("f", data("mlp", 6, 0.7), BATCH, factor_args=EMPIRICAL)
    assert torch.equal(scored(own, "s2"), first)
    assert torch.equal(scored(own, "s"), first)
    with pytest.raises(ValueError, match=r"pairwise_scores.* was made with .*'0\.1'.* asked for is .*'3\.0'"):
        scored(own, "s", damping_factor=3.0)
    with pytest.raises(ValueError, match=r"covariance.* was made with .*'ekfac'.* asked for is .*'kfac'"):
        own.fit_all_factors("f", train, BATCH, factor_args=FactorArguments("kfac", True))
    own.fit_all_factors("f", data("mlp", 6, 0.7), BATCH, factor_args=EMPIRICAL, overwrite_output_dir=True)
    assert not torch.equal(scored(own, "s3"), first)
    assert {path.name for path in (tmp_path / "own").iterdir()} == {"factors_f", "scores_s", "scores_s2", "scores_s3"}


def test_steps_apart_and_the_first_examples(tmp_path: Path) -> None:
    train = data("mlp", 10, 2.3)
    steps, whole = analyzer(tmp_path / "steps"), analyzer(tmp_path / "whole")
    some = FactorArguments(use_empirical_fisher=True, covariance_max_examples=7, lambda_max_examples=7)
    steps.fit_covariance_matrices("f", train, BATCH, factor_args=some)
    steps.perform_eigendecomposition("f", factor_args=some)
    steps.fit_lambda_matrices("f", train, BATCH, factor_args=some)
    whole.fit_all_factors("f", torch.utils.data.Subset(train, range(7)), BATCH, factor_args=EMPIRICAL)
    assert torch.equal(scored(steps, "s"), scored(whole, "s"))
    assert int(steps.load_lambda_matrices("f")["num_lambda_processed"]["0"]) == 7


def test_parts_of_the_data(tmp_path: Path) -> None:
    own = analyzer(tmp_path)
    train, queries = data("mlp", 10, 2.3), data("mlp", 3, 3.1)
    own.fit_all_factors("f", train, BATCH, factor_args=EMPIRICAL)
    whole = scored(own, "s")
    arguments = ScoreArguments(damping_factor=0.1)
    some = own.compute_pairwise_scores(
        "some", "f", queries, train, 2, query_indices=[2, 0], train_indices=[5, 1, 9], score_args=arguments
    )["all_modules"]
    assert_near(some, whole[[2, 0]][:, [5, 1, 9]].double(), 1e-5)


def test_sampled_targets_are_the_tasks_to_draw(tmp_path: Path) -> None:
    asked = []

    class Sampling(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            asked.append(sample)
            logits = model(batch[0])
            targets = logits.detach().argmax(1) if sample else batch[1]
            return F.cross_entropy(logits, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    own = analyzer(tmp_path, Sampling())
    own.fit_all_factors("f", data("mlp", 10, 2.3), BATCH)
    assert asked == [True] * 6
    scored(own, "s")
    assert asked[6:] == [False] * 5


def test_automatic_mixed_precision(tmp_path: Path) -> None:
    train = data("mlp", 10, 2.3)
    wide, narrow = analyzer(tmp_path / "wide"), analyzer(tmp_path / "narrow")
    wide.fit_all_factors("f", train, BATCH, factor_args=EMPIRICAL)
    narrow.fit_all_factors("f", train, BATCH, factor_args=FactorArguments("ekfac", True, torch.bfloat16))
    got, want = scored(narrow, "s", amp_dtype=torch.bfloat16), scored(wide, "s")
    assert not torch.equal(got, want)
    assert_near(got, want.double(), 8 * 2**-8)  # a few roundings to bfloat16 in a row


def test_memory_that_runs_out_halves_the_batch(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Large(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            sizes.append(len(batch[0]))
            if len(batch[0]) > 3:
                raise torch.OutOfMemoryError
            return model(batch[0]).square().sum()

    analyzer(tmp_path, Large()).fit_covariance_matrices("f", data("mlp", 10, 2.3))
    assert sizes == [10, 10, 10, 8, 4, 2, 2, 2, 2, 2], "from 64 on, which a CPU begins with"


class Options:
    def to_dict(self) -> dict[str, Any]:
        return {"collate_fn": lambda items: [torch.stack(own) for own in zip(*items, strict=True)][::-1]}


def test_options_of_the_loader(tmp_path: Path) -> None:
    class Turned(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return F.cross_entropy(model(batch[1]), batch[0], reduction="sum")

    own, plainly = analyzer(tmp_path / "own", Turned()), analyzer(tmp_path / "plainly")
    own.set_dataloader_kwargs(Options())
    for one in (own, plainly):
        one.fit_covariance_matrices("f", data("mlp", 10, 2.3), BATCH, factor_args=EMPIRICAL)
    got, want = (one.load_covariance_matrices("f")["gradient_covariance"]["4"] for one in (own, plainly))
    assert torch.equal(got, want)


# --- errors ------------------------------------------------------------------------------------------------------


class Flagged(Task):
    enable_post_process_per_sample_gradient = True


class Masks(Task):
    def get_attention_mask(self, batch: Any) -> Any:
        return {"0": torch.ones(2, 1)}


class Unsummed(Task):
    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


WRONG: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "a strategy": (
        lambda path: analyzer(path).fit_all_factors("f", data("mlp", 4, 1.0), 2, factor_args=FactorArguments("newton")),
        ValueError,
        "strategy must be one of identity, diagonal, kfac, ekfac, got 'newton'",
    ),
    "no factors": (lambda path: scored(analyzer(path), "s"), ValueError, "factors 'f' are not there: fit them, lambda"),
    "no covariances": (
        lambda path: analyzer(path).perform_eigendecomposition("f"),
        ValueError,
        "factors 'f' are not there: fit them, covariance",
    ),
    "no scores": (lambda path: analyzer(path).load_self_scores("s"), ValueError, "scores 's' are not there"),
    "a loss that is no sum": (
        lambda path: analyzer(path, Unsummed()).fit_all_factors("f", data("mlp", 4, 1.0), 2),
        ValueError,
        r"a task must return the sum over its batch, got \(2,\)",
    ),
    "a task that says nothing": (
        lambda path: analyzer(path, Task()).fit_all_factors("f", data("mlp", 4, 1.0), 2),
        NotImplementedError,
        "Task must implement compute_train_loss",
    ),
    "gradients changed by the task": (lambda path: analyzer(path, Flagged()), NotImplementedError, "no gradient is"),
    "half precision": (
        lambda path: analyzer(path).fit_all_factors(
            "f", data("mlp", 4, 1.0), 2, factor_args=FactorArguments(amp_dtype=torch.float16)
        ),
        NotImplementedError,
        "amp_dtype=torch.float16 needs its losses scaled",
    ),
    "a module that is not there": (
        lambda path: analyzer(path, task_of(kronfluence_api, ["9"])),
        ValueError,
        "no module of name or pattern 'model.9'",
    ),
    "tokens and modules": (
        lambda path: scored(analyzer(path), "s", compute_per_token_scores=True, compute_per_module_scores=True),
        NotImplementedError,
        "compute_per_token_scores goes with neither",
    ),
    "self scores by module": (
        lambda path: analyzer(path).compute_self_scores(
            "s", "f", data("mlp", 4, 1.0), score_args=ScoreArguments(compute_per_module_scores=True)
        ),
        NotImplementedError,
        "self scores are of all modules and tokens together",
    ),
    "a saved model": (
        lambda path: Analyzer("own", mlp(), Task(), cpu=True, output_dir=path, disable_model_save=False),
        NotImplementedError,
        "disable_model_save=False",
    ),
    "a mask for each module": (
        lambda path: analyzer(path, Masks()).fit_all_factors("f", data("mlp", 4, 1.0), 2),
        NotImplementedError,
        "get_attention_mask must return one mask",
    ),
    "parts of modules": (
        lambda path: analyzer(path).compute_self_scores("s", "f", data("mlp", 4, 1.0), target_module_partitions=[0]),
        NotImplementedError,
        "scores are computed whole",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_calls_are_named_and_leave_nothing(what: str, tmp_path: Path) -> None:
    call, error, match = WRONG[what]
    with pytest.raises(error, match=match):
        call(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_is_prepared_by_being_looked_at() -> None:
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    assert prepare_model(net, task_of(kronfluence_api, None)) is net
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    embedding = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    assert prepare_model(embedding, task_of(kronfluence_api, None)) is embedding
    with pytest.raises(TypeError, match=r"unsupported layers: 'model\.0'"):
        prepare_model(embedding, task_of(kronfluence_api, ["0"]))
