"""IHVP objects: one method a file. A new one is a file and a line in METHODS."""

from ihvp.methods.arnoldi import ArnoldiIHVP
from ihvp.methods.base import IHVP
from ihvp.methods.cg import CgIHVP
from ihvp.methods.datainf import DataInfIHVP
from ihvp.methods.diagonal import DiagonalIHVP
from ihvp.methods.ekfac import EKFACIHVP
from ihvp.methods.exact import ExactIHVP
from ihvp.methods.factory import METHODS, make_ihvp
from ihvp.methods.files import load
from ihvp.methods.fisher import FisherIHVP
from ihvp.methods.harmonic_mean import InverseHarmonicMeanIHVP
from ihvp.methods.identity import IdentityIHVP
from ihvp.methods.iterative import ConvergenceError, ConvergenceWarning, IterationReport
from ihvp.methods.kfac import KFACIHVP
from ihvp.methods.kronecker import KroneckerIHVP
from ihvp.methods.lissa import LissaIHVP
from ihvp.methods.nystroem import NystroemIHVP
from ihvp.methods.preconditioners import JacobiPreconditioner, NystroemPreconditioner

__all__ = [
    "EKFACIHVP",
    "IHVP",
    "KFACIHVP",
    "METHODS",
    "ArnoldiIHVP",
    "CgIHVP",
    "ConvergenceError",
    "ConvergenceWarning",
    "DataInfIHVP",
    "DiagonalIHVP",
    "ExactIHVP",
    "FisherIHVP",
    "IdentityIHVP",
    "InverseHarmonicMeanIHVP",
    "IterationReport",
    "JacobiPreconditioner",
    "KroneckerIHVP",
    "LissaIHVP",
    "NystroemIHVP",
    "NystroemPreconditioner",
    "load",
    "make_ihvp",
]
