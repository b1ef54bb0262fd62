"""The layer types, one a file. A new one is a file and a line in LAYER_TYPES."""

from torch import nn

from ihvp.layers._layer_type import LayerType
from ihvp.layers.conv import CONVOLUTIONS
from ihvp.layers.linear import LINEAR

LAYER_TYPES: dict[type, LayerType] = {layer_type.module: layer_type for layer_type in (LINEAR, *CONVOLUTIONS)}


def unsupported(module: nn.Module) -> str:
    """A module's type where that is not supported, with what about it is not; "" for one that can be tracked."""
    name, own = type(module).__name__, LAYER_TYPES.get(type(module))
    if own is None:
        return name
    reason = own.lacks(module)
    return f"{name} {reason}" if reason else ""


__all__ = ["LAYER_TYPES", "LINEAR", "LayerType", "unsupported"]
