"""The layer types, one a file. A new one is a file and a line in LAYER_TYPES."""

from torch import nn

from ihvp.layers._layer_type import LayerType
from ihvp.layers.conv import CONVOLUTIONS
from ihvp.layers.linear import LINEAR
from ihvp.layers.transposed import TRANSPOSED

LAYER_TYPES: dict[type | str, LayerType] = {own.module: own for own in (LINEAR, *CONVOLUTIONS, TRANSPOSED)}


def layer_type(module: nn.Module) -> LayerType | None:
    """The layer type of a module, None where its class has none."""
    own = type(module)
    return LAYER_TYPES.get(own) or LAYER_TYPES.get(f"{own.__module__}.{own.__qualname__}")


def unsupported(module: nn.Module) -> str:
    """A module's type where that is not supported, with what about it is not; "" for one that can be tracked."""
    name, own = type(module).__name__, layer_type(module)
    if own is None:
        return name
    reason = own.lacks(module)
    return f"{name} {reason}" if reason else ""


def supported() -> str:
    """The classes that can be tracked."""
    return ", ".join(own if isinstance(own, str) else own.__name__ for own in LAYER_TYPES)


__all__ = ["LAYER_TYPES", "LINEAR", "LayerType", "layer_type", "supported", "unsupported"]
