"""ihvp: the fast numerical backend for influence functions and training-data attribution.

    model = ihvp.InfluenceModel(net, loss_fn)
    curvature = ihvp.EKFACIHVP(model, train_loader, damping="auto")
    scores = ihvp.FirstOrderInfluenceCalculator(model, train_loader, curvature).scores(test_loader)   # (Q,N)

A score is + g_query^T (F + damping I)^-1 g_train: positive means that training on the example lowered the query's loss.
"""

from ihvp import ops
from ihvp.batch import Batch
from ihvp.calculators import (
    EmpiricalInfluence,
    FirstOrderInfluenceCalculator,
    MultiStageInfluenceCalculator,
    Order,
    ProximalBregmanCalculator,
    RepresenterPointL2,
    RepresenterPointLJE,
    SampleBoundaryCalculator,
    SecondOrderInfluenceCalculator,
    TracInCalculator,
    WeightsBoundaryCalculator,
    input_gradients,
)
from ihvp.methods import (
    EKFACIHVP,
    IHVP,
    KFACIHVP,
    METHODS,
    ArnoldiIHVP,
    CgIHVP,
    ConvergenceError,
    ConvergenceWarning,
    DataInfIHVP,
    DiagonalIHVP,
    ExactIHVP,
    FisherIHVP,
    IdentityIHVP,
    InverseHarmonicMeanIHVP,
    IterationReport,
    JacobiPreconditioner,
    KroneckerIHVP,
    LissaIHVP,
    NystroemIHVP,
    NystroemPreconditioner,
    load,
    make_ihvp,
)
from ihvp.model import InfluenceModel
from ihvp.ops._registry import explain, use
from ihvp.prefilter import tfidf_candidates

__version__ = "0.1.0"

__all__ = [
    "EKFACIHVP",
    "IHVP",
    "KFACIHVP",
    "METHODS",
    "ArnoldiIHVP",
    "Batch",
    "CgIHVP",
    "ConvergenceError",
    "ConvergenceWarning",
    "DataInfIHVP",
    "DiagonalIHVP",
    "EmpiricalInfluence",
    "ExactIHVP",
    "FirstOrderInfluenceCalculator",
    "FisherIHVP",
    "IdentityIHVP",
    "InfluenceModel",
    "InverseHarmonicMeanIHVP",
    "IterationReport",
    "JacobiPreconditioner",
    "KroneckerIHVP",
    "LissaIHVP",
    "MultiStageInfluenceCalculator",
    "NystroemIHVP",
    "NystroemPreconditioner",
    "Order",
    "ProximalBregmanCalculator",
    "RepresenterPointL2",
    "RepresenterPointLJE",
    "SampleBoundaryCalculator",
    "SecondOrderInfluenceCalculator",
    "TracInCalculator",
    "WeightsBoundaryCalculator",
    "explain",
    "input_gradients",
    "load",
    "make_ihvp",
    "ops",
    "tfidf_candidates",
    "use",
]
