"""pyDVL's names as `ihvp.adapters.pydvl_api` has them, in one namespace: the same calls run on either."""

from __future__ import annotations

from types import SimpleNamespace


def pydvl_names() -> SimpleNamespace:
    import pydvl.influence.torch as models
    from pydvl.influence import InfluenceMode
    from pydvl.influence.torch.preconditioner import JacobiPreconditioner, NystroemPreconditioner
    from pydvl.influence.torch.util import BlockMode, SecondOrderMode

    return SimpleNamespace(
        InfluenceMode=InfluenceMode,
        BlockMode=BlockMode,
        SecondOrderMode=SecondOrderMode,
        JacobiPreconditioner=JacobiPreconditioner,
        NystroemPreconditioner=NystroemPreconditioner,
        **{name: getattr(models, name) for name in dir(models) if name.endswith("Influence")},
    )
