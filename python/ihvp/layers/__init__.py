"""The layer types, one a file. A new one is a file and a line in LAYER_TYPES."""

from torch import nn

from ihvp.layers._layer_type import LayerType
from ihvp.layers.conv import CONVOLUTIONS
from ihvp.layers.gpt2_conv1d import GPT2_CONV1D
from ihvp.layers.linear import LINEAR

LAYER_TYPES: dict[type | str, LayerType] = {own.module: own for own in (LINEAR, *CONVOLUTIONS, GPT2_CONV1D)}


def layer_types(module: nn.Module) -> tuple[LayerType, ...]:
    """The types of the layers that a module is, most often one; none where its class is not known."""
    cls = type(module)
    own = LAYER_TYPES.get(cls) or LAYER_TYPES.get(f"{cls.__module__}.{cls.__qualname__}")
    if own is None:
        return ()
    return (own,) if own.parts is None else own.parts(module)


def supported() -> str:
    """The classes that can be tracked."""
    return ", ".join(own if isinstance(own, str) else own.__name__ for own in LAYER_TYPES)


__all__ = ["LAYER_TYPES", "LINEAR", "LayerType", "layer_types", "supported"]
