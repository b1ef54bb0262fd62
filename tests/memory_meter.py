"""Prints the extra bytes of calls: the peak resident size above what the operands take, each call in a child.

Reads from its input a JSON list of [kernel, order, N, T].
"""

from __future__ import annotations

import json
import os
import resource

import torch
from ihvp import _native, ops

O, J, Q = 256, 256, 4


def peak() -> int:
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def forget_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # nothing before the call took more than the operands


def extra(kernel: str, order: str | None, N: int, T: int) -> int:
    torch.set_num_threads(1)
    tokens = {"a": torch.rand(N, T, J - 1), "delta": torch.rand(N, T, O), "mask": torch.rand(N, T) > 0.5, "bias": True}
    Lambda, U_A, U_G, P = torch.ones(O, J), torch.eye(J), torch.eye(O), torch.ones(Q, O, J)
    influence, scores = torch.zeros(N), torch.zeros(Q, N)
    calls = {
        "ekfac_diagonal_update": lambda: _native.ekfac_diagonal_update(
            Lambda, U_A=U_A, U_G=U_G, **tokens, order=order, precision="float32", threads=1
        ),
        "ekfac_self_influence": lambda: _native.ekfac_self_influence(
            influence, U_A=U_A, U_G=U_G, Lambda=Lambda, damping=1.0, **tokens, threads=1
        ),
        "gradient_dot": lambda: _native.gradient_dot(
            scores, P, per_token=False, **tokens, order=order, precision="float32", threads=1
        ),
        "per_sample_gradient": lambda: ops.per_sample_gradient(**tokens),
    }
    forget_peak()
    before = peak()
    kept = calls[kernel]()
    extra = peak() - before
    del kept
    return extra


def in_a_child(kernel: str, order: str | None, N: int, T: int) -> int:
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(start, str(extra(kernel, order, N, T)).encode())
        os._exit(0)
    os.close(start)
    with os.fdopen(end) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return int(answer)


if __name__ == "__main__":
    print(json.dumps([in_a_child(*case) for case in json.loads(input())]))
