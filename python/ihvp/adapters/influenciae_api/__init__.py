"""The names, arguments and result shapes of Influenciae, over ihvp, on torch models and loaders.

    influence_model = InfluenceModel(net, start_layer="hidden", last_layer="classifier", loss_function=loss)
    ihvp_calculator = EKFACIHVP(influence_model, train_dataset, damping=1e-3)
    calculator = FirstOrderInfluenceCalculator(influence_model, train_dataset, ihvp_calculator)
    for (inputs, labels), influence_values, train_samples in calculator.top_k(test_dataset, train_dataset, k=5): ...

Values have Influenciae's sign: + g_test^T H^-1 g_train, positive for an example that lowered the loss. Its guide prints
the influence with the other sign. Self-influence has the shape (B,1), a top-k brings the training inputs themselves.
Losses take (outputs, targets) and are not reduced.

The modules are Influenciae's too: what `deel.influenciae.common` has stands in `ihvp.adapters.influenciae_api.common`.
"""

from ihvp.adapters.influenciae_api.boundary_based import SampleBoundaryCalculator, WeightsBoundaryCalculator
from ihvp.adapters.influenciae_api.common import (
    EKFACIHVP,
    IHVPS,
    KFACIHVP,
    ConjugateGradientDescentIHVP,
    ExactIHVP,
    FisherIHVP,
    IHVPFactory,
    InfluenceModel,
    LissaIHVP,
)
from ihvp.adapters.influenciae_api.influence import (
    ArnoldiInfluenceCalculator,
    FirstOrderInfluenceCalculator,
    SecondOrderInfluenceCalculator,
)
from ihvp.adapters.influenciae_api.rps import RepresenterPointL2, RepresenterPointLJE
from ihvp.adapters.influenciae_api.trac_in import TracIn
from ihvp.adapters.influenciae_api.utils import ORDER

__all__ = [
    "EKFACIHVP",
    "IHVPS",
    "KFACIHVP",
    "ORDER",
    "ArnoldiInfluenceCalculator",
    "ConjugateGradientDescentIHVP",
    "ExactIHVP",
    "FirstOrderInfluenceCalculator",
    "FisherIHVP",
    "IHVPFactory",
    "InfluenceModel",
    "LissaIHVP",
    "RepresenterPointL2",
    "RepresenterPointLJE",
    "SampleBoundaryCalculator",
    "SecondOrderInfluenceCalculator",
    "TracIn",
    "WeightsBoundaryCalculator",
]
