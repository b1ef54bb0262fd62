"""IHVP objects: one method a file. A new one is a file and a line in METHODS."""

from ihvp.methods.base import IHVP
from ihvp.methods.diagonal import DiagonalIHVP
from ihvp.methods.ekfac import EKFACIHVP
from ihvp.methods.exact import ExactIHVP
from ihvp.methods.files import METHODS, load
from ihvp.methods.fisher import FisherIHVP
from ihvp.methods.identity import IdentityIHVP
from ihvp.methods.kfac import KFACIHVP

__all__ = [
    "EKFACIHVP",
    "IHVP",
    "KFACIHVP",
    "METHODS",
    "DiagonalIHVP",
    "ExactIHVP",
    "FisherIHVP",
    "IdentityIHVP",
    "load",
]
