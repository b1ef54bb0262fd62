"""bench/gpu_check.sh without a GPU: it says so; and its steps, with a stand-in for Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu_check.sh"
STEPS = ["device", "build", "info", "tests", "ops", "small-layers", "pipeline"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="for Linux")


def check(folder: Path, python: str, **environment: str) -> tuple[int, dict[str, str], str]:
    """The exit status, what the table says of each step, and the errors."""
    run = subprocess.run(
        ["bash", SCRIPT, folder], env={**os.environ, "PYTHON": python, **environment}, capture_output=True, text=True
    )
    found = re.findall(r"^([\w-]+) +\d+ s  (.*)$", (folder / "table.txt").read_text(), re.MULTILINE)
    return run.returncode, dict(found), run.stderr


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """Passes, but fails what holds $FAIL; and compute-sanitizer beside it, which fails $TOOL."""
    python, sanitizer = tmp_path / "python", tmp_path / "compute-sanitizer"
    python.write_text(
        '#!/bin/bash\nproven=no\nfor word; do [ "$proven" = next ] && touch "$word"\nproven=no\n'
        '[ "$word" = --proven ] && proven=next\ndone\necho "$@"\n[ -z "$FAIL" ] || [[ "$*" != *"$FAIL"* ]]\n'
    )
    sanitizer.write_text('#!/bin/bash\n[ "$2" != "$TOOL" ]\n')
    for path in (python, sanitizer):
        path.chmod(0o755)
    return str(python)


def test_the_limits_fit_into_nine_minutes() -> None:
    text = SCRIPT.read_text()
    limits = [(name, int(limit)) for name, limit in re.findall(r'^ *step "?\$?([\w-]+)"? (\d+) ', text, re.MULTILINE)]
    assert [name for name, _ in limits] == [*STEPS, "tool"]
    (grace,) = map(int, re.findall(r"--kill-after=(\d+)", text))
    (names,) = re.findall(r"for tool in (.*);", text)
    tools = len(names.split())
    assert sum((limit + grace) * (tools if name == "tool" else 1) for name, limit in limits) < 540


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_it_needs_a_device(tmp_path: Path) -> None:
    status, steps, errors = check(tmp_path / "out", sys.executable)
    assert status == 2 and list(steps) == ["device"]
    assert "gpu_check.sh needs a CUDA device: torch sees no CUDA device" in errors


@pytest.mark.parametrize(
    ("fail", "failed", "left_out"),
    [
        ("", [], []),
        ("small-layers", ["small-layers"], []),
        ("-m pytest", ["tests"], []),
        ("-m pip", ["build"], STEPS[2:]),
    ],
)
def test_a_step_that_fails_stops_no_other(
    stand_in: str, tmp_path: Path, fail: str, failed: list[str], left_out: list[str]
) -> None:
    path = f"{tmp_path}:{os.environ['PATH']}"
    status, steps, _ = check(tmp_path / "out", stand_in, FAIL=fail, TOOL="none", PATH=path)
    expected = [*STEPS, "memcheck", "racecheck"] if not left_out else STEPS[:2]
    assert list(steps) == expected and status == (1 if failed else 0)
    assert [name for name, said in steps.items() if "FAILED with status 1, see" in said] == failed
    if not left_out:
        assert ("--passed" in (tmp_path / "out" / "ops.log").read_text()) == (fail != "-m pytest")
        assert (tmp_path / "out" / "proven.json").exists()


def test_a_sanitizer_that_finds_something_takes_the_record_back(stand_in: str, tmp_path: Path) -> None:
    path = f"{tmp_path}:{os.environ['PATH']}"
    status, steps, _ = check(tmp_path / "out", stand_in, FAIL="", TOOL="memcheck", PATH=path)
    assert status == 1 and steps["memcheck"].startswith("FAILED") and steps["racecheck"] == "passed"
    assert not (tmp_path / "out" / "proven.json").exists()
