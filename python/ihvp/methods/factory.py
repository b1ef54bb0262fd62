"""IHVP objects by name. A new method is a file and a line here."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from ihvp.methods.arnoldi import ArnoldiIHVP
from ihvp.methods.base import IHVP
from ihvp.methods.cg import CgIHVP
from ihvp.methods.datainf import DataInfIHVP
from ihvp.methods.diagonal import DiagonalIHVP
from ihvp.methods.ekfac import EKFACIHVP
from ihvp.methods.exact import ExactIHVP
from ihvp.methods.fisher import FisherIHVP
from ihvp.methods.harmonic_mean import InverseHarmonicMeanIHVP
from ihvp.methods.identity import IdentityIHVP
from ihvp.methods.kfac import KFACIHVP
from ihvp.methods.lissa import LissaIHVP
from ihvp.methods.nystroem import NystroemIHVP
from ihvp.model import InfluenceModel

METHODS: dict[str, type[IHVP]] = {
    "exact": ExactIHVP,
    "cgd": CgIHVP,
    "lissa": LissaIHVP,
    "arnoldi": ArnoldiIHVP,
    "nystroem": NystroemIHVP,
    "fisher": FisherIHVP,
    "harmonic_mean": InverseHarmonicMeanIHVP,
    "datainf": DataInfIHVP,
    "kfac": KFACIHVP,
    "ekfac": EKFACIHVP,
    "diagonal": DiagonalIHVP,
    "identity": IdentityIHVP,
}


def make_ihvp(
    name: str,
    model: InfluenceModel,
    hessian_loader: Iterable[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> IHVP:
    """The IHVP object of a name in METHODS; `options` are its class's own arguments by name.

    Raises ValueError for an unknown name or option; the known ones are listed.
    """
    if name not in METHODS:
        raise ValueError(f"name must be one of {', '.join(METHODS)}, got {name!r}")
    known = list(inspect.signature(METHODS[name]).parameters)[2:]
    for option in options or {}:
        if option not in known:
            raise ValueError(f"options of {name!r} must be among {', '.join(known)}, got {option!r}")
    return METHODS[name](model, hessian_loader, **(options or {}))
