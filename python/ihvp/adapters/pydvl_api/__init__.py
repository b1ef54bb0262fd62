"""The names, arguments and result shapes of pyDVL's torch influence functions, over ihvp.

    influence = DirectInfluence(net, torch.nn.functional.cross_entropy, regularization=0.01)
    influence.fit(train_loader)
    values = influence.influences(x_test, y_test, x, y)           # (n_test, n_train), + <H^-1 g_test, g_train>

Losses take (outputs, targets), as pyDVL's do: reduced to the mean over the batch. The values have pyDVL's sign and
scale: positive for an example that lowered the loss, no factor 1/N, the mean Hessian over all examples.

Where pyDVL 0.10.0 strays from its own documentation, the documentation is followed here. It weights the batches of its
harmonic mean and of its products with the Gauss-Newton matrix by the number of systems that are solved at once, divides
the Gauss-Newton matrix of the direct solve by another number than that of the examples, and gives batches of unequal
size the same weight in its Hessian products. It refuses a regularization by blocks whose keys are blocks. Its EKFAC by
layer gives the transpose when there are fewer training than test examples. LiSSA takes all the data here in each step.
"""

from ihvp.adapters.pydvl_api.composable import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    InverseHarmonicMeanInfluence,
    JacobiPreconditioner,
    LissaInfluence,
    NystroemPreconditioner,
    NystroemSketchInfluence,
)
from ihvp.adapters.pydvl_api.ekfac import EkfacInfluence
from ihvp.adapters.pydvl_api.translation import BlockMode, InfluenceMode, SecondOrderMode

__all__ = [
    "ArnoldiInfluence",
    "BlockMode",
    "CgInfluence",
    "DirectInfluence",
    "EkfacInfluence",
    "InfluenceMode",
    "InverseHarmonicMeanInfluence",
    "JacobiPreconditioner",
    "LissaInfluence",
    "NystroemPreconditioner",
    "NystroemSketchInfluence",
    "SecondOrderMode",
]
