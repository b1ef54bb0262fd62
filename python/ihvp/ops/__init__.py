"""The ops: the contract of the kernels. One op a file, with its formula, reference, trace and cost model."""

from ihvp.ops.covariance_update import covariance_update_
from ihvp.ops.eigenbasis_project import eigenbasis_project
from ihvp.ops.eigenbasis_rotate import eigenbasis_rotate
from ihvp.ops.ekfac_diagonal_update import ekfac_diagonal_update_
from ihvp.ops.ekfac_self_influence import ekfac_self_influence
from ihvp.ops.ekfac_solve import ekfac_solve
from ihvp.ops.ekfac_solve_grouped import ekfac_solve_grouped
from ihvp.ops.ghost_dot import ghost_dot
from ihvp.ops.ghost_norm import ghost_norm
from ihvp.ops.gradient_dot import gradient_dot
from ihvp.ops.gradient_dot_grouped import gradient_dot_grouped
from ihvp.ops.gradient_dot_low_rank import gradient_dot_low_rank
from ihvp.ops.kfac_factorize import kfac_factorize
from ihvp.ops.kfac_solve import kfac_solve
from ihvp.ops.per_sample_gradient import per_sample_gradient
from ihvp.ops.weighted_ghost_dot import weighted_ghost_dot

__all__ = [
    "covariance_update_",
    "eigenbasis_project",
    "eigenbasis_rotate",
    "ekfac_diagonal_update_",
    "ekfac_self_influence",
    "ekfac_solve",
    "ekfac_solve_grouped",
    "ghost_dot",
    "ghost_norm",
    "gradient_dot",
    "gradient_dot_grouped",
    "gradient_dot_low_rank",
    "kfac_factorize",
    "kfac_solve",
    "per_sample_gradient",
    "weighted_ghost_dot",
]
