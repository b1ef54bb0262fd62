"""pyDVL's composable influence classes: a curvature cut into blocks, with a regularization for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

import ihvp
from ihvp.adapters.pydvl_api.influence import Influence
from ihvp.adapters.pydvl_api.translation import (
    CURVATURES,
    BlockMode,
    Loss,
    SecondOrderMode,
    influence_model,
    trainable,
)

if TYPE_CHECKING:
    from typing_extensions import Self

Regularization = float | Mapping[str, float | None] | None
BlockStructure = BlockMode | Mapping[str, list[str]]


def JacobiPreconditioner(num_samples_estimator: int = 1) -> ihvp.JacobiPreconditioner:
    """The diagonal, estimated with so many random vectors."""
    return ihvp.JacobiPreconditioner(num_samples_estimator)


def NystroemPreconditioner(rank: int) -> ihvp.NystroemPreconditioner:
    """A Nystroem sketch of the given rank."""
    return ihvp.NystroemPreconditioner(rank)


class ComposableInfluence(Influence):
    """Args, of all classes here:

    model, loss: the net, and (outputs, targets) -> the mean loss of a batch.
    regularization: a number, or one for each block by its name; None, or a block left out, is 0.
    block_structure: a BlockMode, or block names -> names of parameters.
    second_order_mode: the Hessian or the Gauss-Newton matrix.

    `make` builds the IHVP object from (model, None, damping, block_structure=).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization,
        block_structure: BlockStructure,
        make: Callable[..., ihvp.IHVP],
        progress: bool = False,
    ) -> None:
        self.model = model
        self.loss = loss
        self.names = _names(model, block_structure)
        own = influence_model(model, loss, (name for names in self.names.values() for name in names), progress)
        self._ihvp = make(own, None, self._damping(regularization), block_structure=self.names)

    def _damping(self, regularization: Regularization) -> dict[str, float]:
        if not isinstance(regularization, Mapping):
            return dict.fromkeys(self.names, 0.0 if regularization is None else regularization)
        unknown = [block for block in regularization if block not in self.names]
        if unknown:
            raise ValueError(
                f"regularization must have blocks of {', '.join(map(repr, self.names))}, "
                f"got {', '.join(map(repr, unknown))}"
            )
        return {block: regularization.get(block) or 0.0 for block in self.names}

    @property
    def block_names(self) -> list[str]:
        return list(self.names)

    def fit(self, data: Iterable[Any]) -> Self:
        self._ihvp.fit(data)
        return self

    def with_regularization(self, regularization: Regularization) -> Self:
        """Changes this object; what was fitted stays."""
        self._ihvp = self._ihvp.with_damping(self._damping(regularization))
        return self


def _names(model: nn.Module, structure: BlockStructure) -> dict[str, list[str]]:
    names = trainable(model)
    if isinstance(structure, Mapping):
        return {block: list(own) for block, own in structure.items()}
    if structure.value == BlockMode.FULL.value:
        return {"": names}
    if structure.value == BlockMode.PARAMETER_WISE.value:
        return {name: [name] for name in names}
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(name.partition(".")[0], []).append(name)
    return blocks


class DirectInfluence(ComposableInfluence):
    """The matrix itself, solved directly."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode = SecondOrderMode.HESSIAN,
    ) -> None:
        make = partial(ihvp.ExactIHVP, curvature=CURVATURES[second_order_mode.value])
        super().__init__(model, loss, regularization, block_structure, make)


class CgInfluence(ComposableInfluence):
    """Conjugate gradients, one by one or (solve_simultaneously) as block CG.

    A system is solved when its residual is below max(rtol ||b||, atol). `precompute_grad` is taken and changes nothing:
    linearised batches are kept while they fit into memory.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        rtol: float = 1e-4,
        atol: float = 1e-6,
        maxiter: int | None = None,
        progress: bool = False,
        precompute_grad: bool = False,
        preconditioner: ihvp.JacobiPreconditioner | ihvp.NystroemPreconditioner | None = None,
        solve_simultaneously: bool = False,
        warn_on_max_iteration: bool = True,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode = SecondOrderMode.HESSIAN,
    ) -> None:
        make = partial(
            ihvp.CgIHVP,
            curvature=CURVATURES[second_order_mode.value],
            rtol=rtol,
            atol=atol,
            maxiter=maxiter,
            krylov="shared" if solve_simultaneously else "separate",
            preconditioner=preconditioner,
            on_failure="warn" if warn_on_max_iteration else "return",
        )
        super().__init__(model, loss, regularization, block_structure, make, progress)


class LissaInfluence(ComposableInfluence):
    """LiSSA: the Neumann series of 1 - dampen - H / scale, each step with all the data."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        maxiter: int = 1000,
        dampen: float = 0.0,
        scale: float = 10.0,
        rtol: float = 1e-4,
        progress: bool = False,
        warn_on_max_iteration: bool = True,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode = SecondOrderMode.HESSIAN,
    ) -> None:
        make = partial(
            ihvp.LissaIHVP,
            curvature=CURVATURES[second_order_mode.value],
            maxiter=maxiter,
            dampen=dampen,
            scale=scale,
            rtol=rtol,
            on_failure="warn" if warn_on_max_iteration else "return",
        )
        super().__init__(model, loss, regularization, block_structure, make, progress)


class ArnoldiInfluence(ComposableInfluence):
    """The eigenpairs of largest magnitude; use_woodbury divides by the regularization off their span."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: Regularization = None,
        rank: int = 10,
        krylov_dimension: int | None = None,
        tol: float = 1e-6,
        max_iter: int | None = None,
        eigen_computation_on_gpu: bool = False,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode = SecondOrderMode.HESSIAN,
        use_woodbury: bool = False,
    ) -> None:
        if eigen_computation_on_gpu:
            raise ValueError("eigen_computation_on_gpu must be False: ARPACK runs on the CPU")
        make = partial(
            ihvp.ArnoldiIHVP,
            rank=rank,
            curvature=CURVATURES[second_order_mode.value],
            krylov_dimension=krylov_dimension,
            tol=tol,
            maxiter=max_iter,
            complement="damped" if use_woodbury else "dropped",
        )
        super().__init__(model, loss, regularization, block_structure, make)


class NystroemSketchInfluence(ComposableInfluence):
    """A Nystroem sketch of the given rank, solved by Woodbury; the regularization must be positive."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: float | Mapping[str, float | None],
        rank: int,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode = SecondOrderMode.HESSIAN,
    ) -> None:
        make = partial(ihvp.NystroemIHVP, rank=rank, curvature=CURVATURES[second_order_mode.value])
        super().__init__(model, loss, regularization, block_structure, make)


class InverseHarmonicMeanInfluence(ComposableInfluence):
    """The mean over the examples of (g_n g_n^T + regularization I)^-1; the regularization must be positive."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: float | Mapping[str, float | None],
        block_structure: BlockStructure = BlockMode.FULL,
    ) -> None:
        super().__init__(model, loss, regularization, block_structure, ihvp.InverseHarmonicMeanIHVP)
