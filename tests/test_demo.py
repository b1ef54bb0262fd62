"""The command line: `info` tells what is there, and the demo finds what it was made to find."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ihvp import _native
from ihvp.__main__ import info, main
from ihvp.demo import DemoResult, digits, measures, run
from ihvp.ops import _gpu
from ihvp.ops._registry import implementations
from matplotlib.image import imread


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run(quick=True, output=tmp_path_factory.mktemp("demo") / "new" / "folder", seed=0)


def test_self_influence_finds_the_flipped_labels(result: DemoResult) -> None:
    assert result.test_accuracy > 0.85
    assert result.auc > 0.9
    assert result.recall > 0.75


@pytest.mark.parametrize("reference", measures.REFERENCES, ids=str)
def test_ekfac_is_nearer_to_the_exact_scores_than_no_curvature(
    result: DemoResult, reference: measures.Reference
) -> None:
    own = {one.method: one for one in result.agreements if one.reference == reference}
    assert own["EKFAC"].pearson > own["identity"].pearson + 0.1
    assert own["EKFAC"].spearman > own["identity"].spearman + 0.1
    assert result.correlation > 0.45


def test_the_figure_is_not_blank(result: DemoResult) -> None:
    pixels = torch.from_numpy(imread(result.figure))[..., :3]
    assert min(pixels.shape[:2]) > 500
    dark, red = pixels.max(2).values < 0.2, (pixels[..., 0] > 0.6) & (pixels[..., 1] < 0.2)
    assert 0.02 < float(dark.float().mean()) < 0.5
    assert bool(red.any()), "no flipped label is marked"


def test_every_step_is_timed(result: DemoResult) -> None:
    assert all(seconds > 0 for seconds in result.seconds.values())
    assert {"train the network", "fit EKFAC", "compare with exact scores"} <= set(result.seconds)


def test_the_same_seed_gives_the_same_network_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    weights = [
        torch.nn.utils.parameters_to_vector(digits.train(digits.load(200, seed), 2, seed).parameters())
        for seed in (3, 3, 4)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_flips_are_wrong_labels_of_the_training_data() -> None:
    data = digits.load(400, 0)
    assert int(data.flipped.sum()) == round(digits.FLIPPED * 400)
    assert set(data.train_y.tolist()) == set(range(10))


def test_detection_and_correlation_of_known_cases() -> None:
    flipped = torch.arange(20) < 2
    assert measures.detection(-torch.arange(20.0), flipped) == measures.Detection(auc=1.0, recall=1.0)
    assert measures.detection(torch.arange(20.0), flipped) == measures.Detection(auc=0.0, recall=0.0)
    x = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 2.0]])
    assert measures.correlation(x, 3 * x + 1) == pytest.approx(1)
    assert measures.correlation(x, -x) == pytest.approx(-1)
    assert measures.correlation(measures.ranks(x), measures.ranks(x.exp())) == pytest.approx(1)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ihvp", *arguments], capture_output=True, text=True, timeout=300)


def test_info_lists_every_op_and_the_chosen_instruction_set() -> None:
    done = command("info")
    assert done.returncode == 0, done.stderr
    assert f"{_native.isa()} (chosen)" in done.stdout
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.partition("\nop ")[2].splitlines()[1:]}
    assert set(rows) == set(implementations())
    assert rows["gradient_dot"][:2] == ["yes", "yes"]
    assert all(name in done.stdout for name in _native.isas())


def test_info_shows_the_record_of_the_kernels_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = {"speedup": {"large float32": 3.14}, "sources": _gpu.sources("triton")}
    record = {"sm_90": {"ghost_norm": {"triton": passed}, "ghost_dot": {"triton": passed | {"sources": "other"}}}}
    monkeypatch.setattr(_gpu, "record", lambda: record)
    monkeypatch.setattr(_gpu, "installed", lambda implementation: implementation == "triton")
    rows = [line.split() for line in info().splitlines()]
    assert ["ghost_norm", "yes", "yes", "sm_90", "float32", "-/3.1/-", "-"] in rows
    assert ["ghost_dot", "yes", "yes", "unproven", "-"] in rows, "of other sources"
    assert ["proven", "on", "sm_90"] in rows


@pytest.mark.parametrize("arguments", [(), ("fly",), ("demo", "--fast"), ("demo", "--seed", "x")], ids=str)
def test_wrong_arguments_exit_non_zero(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: python -m ihvp" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_a_missing_package_is_named_with_the_way_out(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.startswith((missing, "ihvp.demo"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"{missing}.* pip install 'ihvp\[demo\]'"):
        main(["demo", "--output", str(tmp_path)])


def test_an_output_that_is_no_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(SystemExit, match=r"cannot write to .*file"):
        main(["demo", "--quick", "--output", str(path)])
    assert path.read_text() == "mine"
