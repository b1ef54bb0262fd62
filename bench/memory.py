"""Extra memory of the fused ops: the peak resident size above operands, result and code, each call in its own process.

"Independent of N" means less than one tile of O I numbers more at `growth` times the examples; "below three tiles"
counts tiles of O I numbers in the op's type, for each thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch

from bench import problems
from bench.measure import forget_peak_memory, peak_memory, status_bytes
from bench.problem import Problem

TILES = 3

# The ops of the table with a number of examples that holds whole chunks of the kernels; O = I = 768 or 1024.
LINES: dict[str, tuple[Callable[[int], Problem], int, int]] = {
    "ekfac_diagonal_update_ T=1 1024x1024": (lambda N: problems.diagonal(N, 1, 1024, 1024), 2048, 1024 * 1024),
    "ekfac_diagonal_update_ T=128 768x768": (lambda N: problems.diagonal(N, 128, 768, 768), 16, 768 * 768),
    "ekfac_solve 768x768": (partial(problems.solve, O=768, I=768), 16, 768 * 768),
    "gradient_dot Q=32 T=128 768x768": (lambda N: problems.dot(32, N, 128, 768, 768), 72, 768 * 768),
    "gradient_dot Q=64 T=1 1024x1024": (lambda N: problems.dot(64, N, 1, 1024, 1024), 2048, 1024 * 1024),
    "ekfac_self_influence T=1 1024x1024": (lambda N: problems.self_influence(N, 1, 1024, 1024), 2048, 1024 * 1024),
}


def extra(name: str, examples: int, threads: int) -> int:
    """Bytes, in this process, which must not have computed before: what it allocated then could be used again."""
    torch.set_num_threads(threads)
    make, _, _ = LINES[name]
    problem = make(examples)
    forget_peak_memory()
    before = status_bytes("VmRSS") - status_bytes("RssFile")
    result = problem.run()
    added = 0 if problem.target is not None else result.numel() * result.element_size()
    return peak_memory() - status_bytes("RssFile") - before - added  # code that is read in is no one's workspace


def in_a_child(name: str, examples: int, threads: int) -> int:
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(start, str(extra(name, examples, threads)).encode())
        os._exit(0)
    os.close(start)
    with os.fdopen(end) as file:
        answer = file.read()
    os.waitpid(child, 0)
    if not answer:
        raise SystemExit(f"the measurement of memory of {name} with {examples} examples died")
    return int(answer)


def measure_all(names: list[str], threads: int, growth: int, precision: str) -> dict[str, list[int]]:
    """Of each line the bytes for N and for growth N examples. The process must not have run a parallel region yet."""
    torch.set_float32_matmul_precision(precision)
    return {name: [in_a_child(name, times * LINES[name][1], threads) for times in (1, growth)] for name in names}


def extra_memory(threads: int, pattern: str, growth: int) -> list[dict[str, Any]]:
    names = [name for name in LINES if fnmatchcase(name, f"*{pattern}*")]
    if not names:
        return []
    command = [sys.executable, "-W", "ignore", "-m", "bench", "_memory", str(threads), str(growth)]
    command.append(torch.get_float32_matmul_precision())
    done = subprocess.run(command, input=json.dumps(names), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the measurement of memory failed:\n{done.stdout}\n{done.stderr}")
    records = []
    for name, (few, many) in json.loads(done.stdout.splitlines()[-1]).items():
        _, examples, tile = LINES[name]
        limit = TILES * 4 * tile * threads
        records.append(
            {
                "bench": "memory",
                "case": name,
                "threads": threads,
                "examples": [examples, growth * examples],
                "bytes": [few, many],
                "limit": limit,
                "met": many < limit and many - few < 4 * tile,
            }
        )
    return records
