"""The lines of `bench ops`: each op at its shapes, with what it is expected to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bench import problems
from bench.problem import F64, Problem


@dataclass(frozen=True)
class Goal:
    """`against` a family of rivals: so many times as fast. "library": the fastest of torch.mm, oneDNN and OpenBLAS.
    "peak": that share of the processor's peak. "one thread": so many times as fast as with one thread.
    """

    against: str
    least: float


@dataclass(frozen=True)
class Case:
    """`threads` None: as many as the run is given."""

    name: str
    make: Callable[[], Problem]
    goals: tuple[Goal, ...] = ()
    threads: int | None = None


def plain(name: str, make: Callable[[], Problem], *goals: Goal) -> list[Case]:
    """A plain product with one thread, where the goals count, and with two."""
    return [
        Case(f"product {name}, one thread", make, goals, threads=1),
        Case(f"product {name}, two threads", make, threads=2),
    ]


CASES = [
    *plain("1024^3", partial(problems.plain_product, 1024, 1024), Goal("peak", 0.90), Goal("library", 1.0)),
    *plain("256x768x768", partial(problems.plain_product, 256, 768), Goal("peak", 0.80)),
    *plain("2048x64x64", partial(problems.plain_product, 2048, 64), Goal("peak", 0.60)),
    Case("product 2048^3, two threads", partial(problems.plain_product, 2048, 2048), (Goal("one thread", 1.85),), 2),
    *plain("1024^3 float64", partial(problems.plain_product, 1024, 1024, F64), Goal("peak", 0.85)),
    Case(
        "covariance_update_ 8192x768",
        partial(problems.covariance, 8192, 768),
        (Goal("torch.addmm_", 4.0), Goal("library", 1.6)),
    ),
    Case("eigenbasis_project N=64 T=128 768, mask and bias", partial(problems.project, 64, 128, 768)),
    Case("eigenbasis_rotate Q=64 768x768", partial(problems.rotate, 64, 768, 768)),
    Case(
        "ekfac_diagonal_update_ N=256 T=1 1024x1024",
        partial(problems.diagonal, 256, 1, 1024, 1024),
        (Goal("peer", 1000.0), Goal("torch.mm", 2.0)),
    ),
    Case(
        "ekfac_diagonal_update_ N=8 T=128 768x768",
        partial(problems.diagonal, 8, 128, 768, 768),
        (Goal("peer", 10.0), Goal("torch.mm", 2.2), Goal("library", 1.1)),
    ),
    Case(
        "ekfac_diagonal_update_ N=8 T=128 768x3072",
        partial(problems.diagonal, 8, 128, 768, 3072),
        (Goal("peer", 10.0), Goal("torch.mm", 2.2), Goal("library", 1.1)),
    ),
    Case("ekfac_solve Q=64 768x768", partial(problems.solve, 64, 768, 768), (Goal("peer", 2.0),)),
    Case(
        "ekfac_self_influence N=256 T=1 1024x1024",
        partial(problems.self_influence, 256, 1, 1024, 1024),
        (Goal("peer", 300.0),),
    ),
    Case("ekfac_self_influence N=8 T=128 768x768", partial(problems.self_influence, 8, 128, 768, 768)),
    Case("kfac_factorize 768x768", partial(problems.factorize, 768, 768)),
    Case("kfac_solve Q=64 768x768", partial(problems.kronecker_solve, 64, 768, 768)),
    Case(
        "gradient_dot Q=32 N=64 T=128 768x768",
        partial(problems.dot, 32, 64, 128, 768, 768),
        (Goal("einsum", 2.0),),
    ),
    Case(
        "gradient_dot Q=64 N=256 T=1 1024x1024",
        partial(problems.dot, 64, 256, 1, 1024, 1024),
        (Goal("einsum", 2.0),),
    ),
    Case("gradient_dot per token Q=4 N=16 T=128 768x768", partial(problems.dot, 4, 16, 128, 768, 768, True)),
    Case("gradient_dot_low_rank Q=32 r=32 N=64 T=128 768x768", partial(problems.low_rank, 32, 32, 64, 128, 768, 768)),
    Case("weighted_ghost_dot Q=64 N=256 1024x1024", partial(problems.weighted_ghosts, 64, 256, 1024, 1024)),
    Case("ghost_dot M=8 N=64 T=128 768x768", partial(problems.ghosts, 8, 64, 128, 768, 768)),
    Case("ghost_norm N=64 T=128 768x768", partial(problems.norms, 64, 128, 768, 768)),
    Case("per_sample_gradient N=64 T=128 768x768", partial(problems.gradients, 64, 128, 768, 768)),
]
