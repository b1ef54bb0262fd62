"""Scores of what an early training saw for a model that was trained on since."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ihvp.batch import Batch
from ihvp.calculators.first_order import FirstOrderInfluenceCalculator
from ihvp.methods.base import IHVP, Vectors, check_layers, dots, gradients
from ihvp.methods.queries import Queries
from ihvp.model import InfluenceModel, LossFn


class MultiStageInfluenceCalculator(FirstOrderInfluenceCalculator):
    """First-order influence through trainings that followed each other, such as pretraining and fine-tuning.

    The score of example n of the first training, with weights theta_1, for a query q of the last, with weights theta_S:

        + g_q(theta_S)^T (F_S + alpha_S I)^-1 ... (F_2 + alpha_2 I)^-1 (F_1 + damping I)^-1 g_n(theta_1).

    Stage s is taken to have minimised its loss plus alpha_s/2 ||theta - theta_{s-1}||^2, so its damping is alpha_s. The
    derivative of the query's loss is alpha_2 ... alpha_S times the score, a factor that all examples share; the source
    leaves it out too. The self-influence of an example is its score for its own loss at theta_S; RelatIF divides by the
    norm of its gradient taken through all stages. All other methods are the first-order calculator's.

    Args:
        stages: fitted IHVP objects in the order of the trainings, two or more, each of its own InfluenceModel with the
            same layers on the same device.
        train_loader: data of the first training, where a method is not given any.
        normalize: RelatIF: True or "theta".
        sign, measurement, query_rank: as for FirstOrderInfluenceCalculator.

    Raises:
        TypeError, ValueError: a wrong argument, named; layers of a stage that are not those of the first.
        RuntimeError: a stage is not fitted.

    Source: Bao et al. 2025 (arXiv:2505.05017), multi-stage influence with EKFAC.
    """

    def __init__(
        self,
        stages: Sequence[IHVP],
        train_loader: Iterable[Any] | None = None,
        normalize: bool | str = False,
        sign: str = "proponent",
        *,
        measurement: LossFn | None = None,
        query_rank: int | None = None,
    ) -> None:
        if isinstance(stages, IHVP) or not isinstance(stages, Sequence) or len(stages) < 2:
            raise ValueError(f"stages must list two or more IHVP objects, got {stages!r}")
        for i, stage in enumerate(stages):
            _check_stage(i, stage, stages[0])
        if normalize == "loss":
            raise ValueError('normalize must be False, True or "theta": through stages g^T F^-1 g may be negative')
        super().__init__(
            stages[0].model, train_loader, stages[0], normalize, sign, measurement=measurement, query_rank=query_rank
        )
        self.later_stages = tuple(stages[1:])

    @property
    def query_model(self) -> InfluenceModel:
        return self.later_stages[-1].model

    def _to_first_stage(self, V: Vectors) -> Vectors:
        for stage in reversed(self.later_stages):
            V = stage.solve(V)
        return V

    def _to_last_stage(self, P: Vectors) -> Vectors:
        for stage in self.later_stages:
            P = stage.solve(P)
        return P

    def _ready(self, batch: Batch, index: int) -> Queries:
        g = gradients(self.query_model, batch, index=index, measurement=self.measurement)
        return self.curvature.precondition(self._to_first_stage(g), self.query_rank)

    def _quadratic(self, batch: Batch, power: int, index: int) -> Tensor:
        moved = self._to_last_stage(self.curvature.solve(gradients(self.model, batch, index=index)))
        other = moved if power == 2 else gradients(self.query_model, batch, index=index)
        return dots(moved, other)


def _check_stage(i: int, stage: IHVP, first: IHVP) -> None:
    if not isinstance(stage, IHVP):
        raise TypeError(f"stages[{i}] must be an IHVP object, got {type(stage).__name__}")
    if not stage.is_fitted:
        raise RuntimeError(f"stages[{i}] ({type(stage).__name__}) is not fitted; call fit(loader)")
    check_layers(f"stages[{i}]", stage.model, first.model)
    if stage.model.device != first.model.device:
        raise ValueError(f"stages[{i}] must be on {first.model.device} as stages[0], got {stage.model.device}")
