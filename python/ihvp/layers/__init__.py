"""The layer types, one a file. A new one is a file and a line in LAYER_TYPES."""

from ihvp.layers._layer_type import LayerType
from ihvp.layers.linear import LINEAR

LAYER_TYPES: dict[type, LayerType] = {layer_type.module: layer_type for layer_type in (LINEAR,)}

__all__ = ["LAYER_TYPES", "LINEAR", "LayerType"]
