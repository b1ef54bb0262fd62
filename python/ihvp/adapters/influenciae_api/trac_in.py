"""`deel.influenciae.trac_in`: influence traced over checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import ihvp
from ihvp.adapters.influenciae_api._results import Influence


class TracIn(Influence):
    """A model for each checkpoint, all of one architecture, and their learning rates."""

    def __init__(self, models: Sequence[ihvp.InfluenceModel], learning_rates: float | Sequence[float]) -> None:
        states = [model.net.state_dict() for model in models]
        self.native = ihvp.TracInCalculator(models[0], None, states, learning_rates)
