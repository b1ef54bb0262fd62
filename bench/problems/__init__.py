"""The problems by what they are about: each function makes an op's problem at the sizes it is given."""

from bench.problems.eigenbasis import diagonal, project, rotate, self_influence, solve
from bench.problems.kronecker import factorize, kronecker_solve
from bench.problems.plain import covariance, plain_product
from bench.problems.scores import dot, ghosts, gradients, low_rank, norms, weighted_ghosts

__all__ = [
    "covariance",
    "diagonal",
    "dot",
    "factorize",
    "ghosts",
    "gradients",
    "kronecker_solve",
    "low_rank",
    "norms",
    "plain_product",
    "project",
    "rotate",
    "self_influence",
    "solve",
    "weighted_ghosts",
]
