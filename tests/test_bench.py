"""The benches' own logic: their formulas, what they judge, what they refuse. Nothing here takes a timing seriously."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ihvp.demo import measures, steps
from torch import nn

from bench import methods, orders, pipeline, problems, pydvl, report, small_layers
from bench.cases import CASES, Goal
from bench.measure import QUICK, Effort, Timing, check, race, relative_error
from bench.memory import extra_memory
from bench.ops import TOLERANCES, checked, figure, measured
from bench.problem import F64, Problem
from bench.products import products, threads
from bench.roofline import Peak
from bench.settings import SETTINGS, losses, text

SMALL: list[tuple[str, Callable[[], Problem]]] = [
    ("product", lambda: problems.plain_product(9, 7)),
    ("product in float64", lambda: problems.plain_product(9, 7, F64)),
    ("covariance", lambda: problems.covariance(20, 7)),
    ("project", lambda: problems.project(3, 4, 7)),
    ("rotate", lambda: problems.rotate(3, 5, 7)),
    ("diagonal, T=1", lambda: problems.diagonal(6, 1, 5, 7)),
    ("diagonal", lambda: problems.diagonal(3, 4, 5, 7)),
    ("solve", lambda: problems.solve(3, 5, 7)),
    ("self-influence, T=1", lambda: problems.self_influence(6, 1, 5, 7)),
    ("self-influence", lambda: problems.self_influence(3, 4, 5, 7)),
    ("factorize", lambda: problems.factorize(5, 7)),
    ("Kronecker solve", lambda: problems.kronecker_solve(3, 5, 7)),
    ("dot, T=1", lambda: problems.dot(2, 6, 1, 5, 7)),
    ("dot", lambda: problems.dot(2, 3, 4, 5, 7)),
    ("dot per token", lambda: problems.dot(2, 3, 4, 5, 7, True)),
    ("low rank", lambda: problems.low_rank(2, 3, 3, 4, 5, 7)),
    ("ghosts", lambda: problems.ghosts(2, 3, 4, 5, 7)),
    ("norms", lambda: problems.norms(3, 4, 5, 7)),
    ("gradients", lambda: problems.gradients(3, 4, 5, 7)),
    ("weighted ghosts", lambda: problems.weighted_ghosts(2, 3, 5, 7)),
]


@pytest.mark.parametrize("make", [make for _, make in SMALL], ids=[name for name, _ in SMALL])
def test_op_and_rivals_compute_the_same(make: Callable[[], Problem]) -> None:
    problem = make()
    reference = problem.reference()
    assert reference.dtype == torch.float64 and problem.flops > 0 and problem.bytes(reference) > 0
    for run in (problem.run, *(rival.run for rival in problem.rivals)):
        if problem.target is not None:
            problem.target.zero_()
        assert relative_error(run().view(reference.shape), reference) <= TOLERANCES["highest"][problem.dtype]


def test_products_are_products() -> None:
    for dtype, limit in TOLERANCES["highest"].items():
        X, Y = torch.randn(5, 7, dtype=dtype), torch.randn(3, 7, dtype=dtype)
        for mm in products(dtype).values():
            assert relative_error(mm(X, Y.T), X.double() @ Y.double().T) <= limit
    assert "oneDNN" not in products(torch.float64)


def test_threads_are_set_and_given_back() -> None:
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1.001])
def test_a_wrong_answer_stops_the_bench(wrong: float) -> None:
    problem = problems.plain_product(9, 7)
    with pytest.raises(SystemExit, match=r"wrong answer: .*bad.*was not timed"):
        checked(CASES[0], problem, problem.reference(), {"bad": lambda: problem.run() * wrong})
    with pytest.raises(SystemExit, match="relative error nan"):
        check("something", float("nan"), 1.0)


def test_a_race_goes_in_turns_and_keeps_to_the_budget() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in ("a", "b", "slow")}
    timings = race(runs, {"a": 1.0, "b": 1.0, "slow": 9.0}, Effort(3, 5.0))
    assert calls == ["a", "b"] * 3
    assert [timings[name].samples for name in runs] == [3, 3, 1]
    assert timings["slow"] == Timing(9.0, 9.0, 9.0, 1)


def test_goals_are_judged_against_the_best_of_a_family() -> None:
    timings = {
        name: Timing(x, x, x, 1) for name, x in {"ihvp": 2.0, "torch.mm": 8.0, "OpenBLAS": 4.0, "peer": 20.0}.items()
    }
    families = {name: name for name in timings if name != "ihvp"}
    assert figure(Goal("library", 1.0), timings, families, 0.5) == (2.0, "OpenBLAS")
    assert figure(Goal("torch.mm", 1.0), timings, families, 0.5) == (4.0, "torch.mm")
    assert figure(Goal("peer", 1.0), timings, families, 0.5) == (10.0, "peer")
    assert figure(Goal("peak", 1.0), timings, families, 0.5) == (0.5, "peak")


def test_the_goals_of_every_case_have_a_rival() -> None:
    """Named by what the small problems have; building the cases themselves would take a while."""
    families = {rival.family for _, make in SMALL for rival in make().rivals}
    known = families | {"library", "peak", "one thread"}
    assert all(goal.against in known for case in CASES for goal in case.goals)
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_case_is_measured_and_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from bench.cases import Case

    case = Case("small", lambda: problems.dot(2, 3, 4, 5, 7), (Goal("einsum", 2.0), Goal("peak", 0.9)), threads=1)
    record = measured(case, 1, {1: {"copy": 1e9}}, quick=True)
    assert set(record["families"].values()) == {"einsum"}, "a quick run has the rivals of its goals alone"
    assert record["order"] in ("query_first", "gradient_first") and 0 < record["share_of_peak"] < 1
    from bench.measure import write

    path = tmp_path / "records.jsonl"
    write(path, [record])
    report.run(path)
    report.report([record])
    printed = capsys.readouterr().out
    tables = printed[printed.index("\nTimes are medians") :]
    half = len(tables) // 2
    assert tables[:half] == tables[half:], "a table is the same from its records and from their JSON"
    assert "small" in tables and "einsum" in tables


def test_reports_refuse_what_they_do_not_know() -> None:
    with pytest.raises(SystemExit, match=r"records must be of .*got unheard"):
        report.report([{"bench": "unheard"}])


def test_the_peak_runs_what_it_says() -> None:
    peak = Peak("float32", 1)
    assert peak() == peak.flops and peak.rate(Timing(2.0, 2.0, 2.0, 1)) == peak.flops / 2


def test_an_order_can_be_forced_and_its_record_judges_the_choice() -> None:
    problem = problems.dot(2, 3, 4, 5, 7)
    with orders.forced("gradient_dot", "gradient_first"):
        assert problem.explain().order == "gradient_first"
    assert orders.Op.best is not None and problem.explain().order in ("query_first", "gradient_first")
    with pytest.raises(SystemExit, match="was not forced"), orders.forced("gradient_dot", "gradient_first"):
        problems.plain_product(9, 7).run()
    record = orders.measured(lambda: problems.dot(2, 3, 4, 5, 7), QUICK)
    assert record is not None and record["ratio"] >= 1 and record["met"] == (record["ratio"] <= orders.SLACK)
    assert orders.measured(lambda: problems.plain_product(9, 7), QUICK) is None


def test_memory_lines_that_do_not_fit_the_pattern_are_left_out() -> None:
    assert extra_memory(1, "no such op", 2) == []


# --- the pipeline ----------------------------------------------------------------------------------------------


def test_the_text_fills_the_vocabulary_and_is_the_same_each_time() -> None:
    ids = text()
    assert ids == text() and len(ids) > 272 * 128 and 0 <= min(ids) and max(ids) < 512 and max(ids) > 256


@pytest.mark.parametrize("model", SETTINGS)
def test_the_settings_are_what_the_titles_say(model: str) -> None:
    one, again = SETTINGS[model](), SETTINGS[model]()
    assert one.name == model and all(torch.equal(x, y) for x, y in zip(one.train, again.train, strict=True))
    assert all(isinstance(one.net.get_submodule(name), (nn.Linear, nn.Conv2d)) for name in one.layers)
    inputs, targets = one.queries[0][:2], one.queries[1][:2]
    assert losses(one.net(inputs), targets).shape == targets.shape


def result(fit: list[float], scores: float, memory: int = 10**6, **more: list[float]) -> dict[str, Any]:
    return {"seconds": {"fit": fit, "scores": [scores], **more}, "memory": memory}


def test_pipeline_goals_are_ratios_of_medians_and_missing_peers_have_none() -> None:
    own = result([1.0, 9.0, 2.0], 1.0, **{"eigendecomposition": [0.5, 0.5, 0.5], "two plain passes": [1.0, 1.0, 1.0]})
    peer = {"seconds": {"covariance": [10.0], "eigendecomposition": [5.0], "lambda": [100.0], "scores": [65.0]}}
    found = pipeline.goals(
        "mlp", "ihvp", own, {"kronfluence": peer | {"memory": 4 * 10**6}, "pydvl": {"missing": "gone"}}
    )
    figures = {(one["against"], one["what"]): (one["figure"], one["met"]) for one in found}
    assert figures[("kronfluence", "ihvp: fit + scores")] == (60.0, True)
    assert figures[("kronfluence", "ihvp: fit")] == (57.5, True)
    assert figures[("kronfluence", "ihvp: memory")] == (4.0, True)
    assert figures[("two plain passes", "ihvp: fit without eigendecomposition")] == (1.5, True)
    assert not any(against == "pydvl" for against, _ in figures)


def test_absent_and_other_versions_of_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
    assert pipeline.absence("pydvl") == "pydvl must be 0.10.0, installed is 0.0.1"
    monkeypatch.setitem(pipeline.PEERS, "no_such_peer", pipeline.Peer("1.0", {}))
    monkeypatch.undo()
    monkeypatch.setitem(pipeline.PEERS, "no_such_peer", pipeline.Peer("1.0", {}))
    assert pipeline.absence("no_such_peer") == "no_such_peer 1.0 is not installed: pip install 'ihvp[bench]'"


def test_older_records_are_still_read(capsys: pytest.CaptureFixture[str]) -> None:
    path = next((Path(report.__file__).parent / "results").glob("*.jsonl"))
    old = json.loads(path.read_text().splitlines()[0])
    report.report([old])
    assert "mlp" in capsys.readouterr().out


# --- pyDVL ---------------------------------------------------------------------------------------------------------


def test_pydvl_bench_has_the_goals_and_size_it_says() -> None:
    own = pydvl.setting(pydvl.SMALL_SIZES, pydvl.SMALL_TRAIN, pydvl.SMALL_QUERIES)
    assert (len(own.train[0]), len(own.queries[0])) == (pydvl.SMALL_TRAIN, pydvl.SMALL_QUERIES)
    assert sum((i + 1) * o for i, o in zip(pydvl.SIZES, pydvl.SIZES[1:], strict=False)) == 10_001
    for name, method in pydvl.METHODS.items():
        assert method.goal == (5.0 if name.startswith(("direct", "CG", "EKFAC")) else 1.0)
    with pytest.raises(SystemExit, match=r"no method has 'newton'|is not installed|pydvl must be"):
        pydvl.run(True, 1, None, "newton")


def test_small_layers_are_scored_both_ways(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(small_layers, "ADAPTERS", 6)
    small_layers.run(tmp_path / "out", torch.device("cpu"), 2, quick=True)
    printed = capsys.readouterr().out
    assert "scores of 12 layers" in printed and "\n12 layers, 2 positions, cpu " in printed
    record = json.loads((tmp_path / "out").read_text())
    assert set(record["times"]) == {"grouped", "loop", "capture"} and record["ratio"] > 0
    report.run(tmp_path / "out")
    assert capsys.readouterr().out in printed, "a table is the same from its records and from their JSON"


# --- methods -------------------------------------------------------------------------------------------------------


def test_methods_bench_prepares_the_demos_data_and_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(steps, "QUICK", steps.Settings(train=200, epochs=4, queries=5))
    setting = methods.prepare(tmp_path, quick=True)
    assert int(setting.digits.flipped.sum()) == 10
    found = measures.detection(methods.by_loss(setting, setting.model("all")), setting.digits.flipped)
    assert 0.5 < found.auc <= 1.0
