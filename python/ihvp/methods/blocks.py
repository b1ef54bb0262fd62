"""Block structure: which tracked parameters a curvature couples. Between blocks it is zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ihvp.model import InfluenceModel, Layer

BlockStructure = str | Mapping[str, Sequence[str]]
""" "full", "layer", "parameter", or block name -> names of layers and parameters."""

Block = dict[str, slice]
"""Layer name -> columns of its (O,I') matrix: weights are :I, the bias is column I."""

STRUCTURES = ("full", "layer", "parameter")


def make_blocks(model: InfluenceModel, structure: BlockStructure) -> dict[str, Block]:
    """Block name -> its layers and their columns.

    "full" is one block of that name, "layer" a block for each layer, "parameter" one for each parameter, both under
    their names in the net. A mapping gives each block the layers and parameters whose names it lists, in its order.

    Raises:
        ValueError: an unknown structure or name, or a parameter that is in no block or in two; it is named.
    """
    layers = model.layers
    if isinstance(structure, str):
        if structure == "full":
            return {"full": {name: slice(0, layer.shape[1]) for name, layer in layers.items()}}
        if structure == "layer":
            return {name: {name: slice(0, layer.shape[1])} for name, layer in layers.items()}
        if structure == "parameter":
            owned: dict[str, Block] = {}
            for name, layer in layers.items():
                for key, own in columns(layer).items():
                    owned.setdefault(key, {})[name] = own
            return owned
    if not isinstance(structure, Mapping):
        raise ValueError(
            f"block_structure must be one of {', '.join(map(repr, STRUCTURES))} or a mapping of block names to names "
            f"of layers and parameters, got {structure!r}"
        )
    return _custom(model, structure)


def columns(layer: Layer) -> dict[str, slice]:
    """The layer's parameters by their names in the net -> their columns of (O,I')."""
    O, I = layer.shape
    at = layer.split(torch.arange(I).expand(O, I))
    return {key: slice(int(part.min()), int(part.max()) + 1) for key, part in at.items()}


def _custom(model: InfluenceModel, structure: Mapping[str, Sequence[str]]) -> dict[str, Block]:
    by_layer = {name: columns(layer) for name, layer in model.layers.items()}
    owners: dict[str, list[str]] = {}  # of several groups of a convolution each has its rows of a parameter
    for name, parts in by_layer.items():
        for key in parts:
            owners.setdefault(key, []).append(name)
    taken: dict[tuple[str, str], str] = {}
    blocks: dict[str, Block] = {}
    for block, names in structure.items():
        if isinstance(names, str) or not names:
            raise ValueError(f"block {block!r} must list names of layers and parameters, got {names!r}")
        found: dict[str, list[slice]] = {}
        for name in names:
            if name not in by_layer and name not in owners:
                raise ValueError(
                    f"block {block!r}: {name!r} is neither a tracked layer nor a parameter of one; there are "
                    f"{', '.join(map(repr, [*by_layer, *owners]))}"
                )
            own = [(name, key) for key in by_layer[name]] if name in by_layer else [(o, name) for o in owners[name]]
            for layer, key in own:
                if (layer, key) in taken:
                    raise ValueError(f"parameter {key!r} is in two blocks: {taken[layer, key]!r} and {block!r}")
                taken[layer, key] = block
                found.setdefault(layer, []).append(by_layer[layer][key])
        blocks[block] = {name: _joined(name, block, parts) for name, parts in found.items()}
    missing = [key for key, layers in owners.items() if any((layer, key) not in taken for layer in layers)]
    if missing:
        raise ValueError(f"every tracked parameter must be in a block; {', '.join(map(repr, missing))} are in none")
    return blocks


def _joined(layer: str, block: str, parts: list[slice]) -> slice:
    start, stop = min(part.start for part in parts), max(part.stop for part in parts)
    if sum(part.stop - part.start for part in parts) != stop - start:
        raise ValueError(f"block {block!r} must take neighbouring columns of layer {layer!r}")
    return slice(start, stop)


def block_size(model: InfluenceModel, block: Block) -> int:
    """Number of parameters."""
    return sum(model.layers[name].shape[0] * (own.stop - own.start) for name, own in block.items())


def take(V: Mapping[str, Tensor], block: Block) -> Tensor:
    """A block of layer name -> (*,O,I') as (*,p_b): layer after layer, each row by row."""
    return torch.cat([V[name][..., own].flatten(-2) for name, own in block.items()], dim=-1)


def apart(model: InfluenceModel, block: Block, flat: Tensor) -> dict[str, Tensor]:
    """(*,p_b) as layer name -> (*,O,columns)."""
    shapes = {name: (model.layers[name].shape[0], own.stop - own.start) for name, own in block.items()}
    parts = flat.split([O * width for O, width in shapes.values()], dim=-1)
    return {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def put_(V: Mapping[str, Tensor], model: InfluenceModel, block: Block, flat: Tensor) -> None:
    """(*,p_b) written into a block of layer name -> (*,O,I')."""
    for name, part in apart(model, block, flat).items():
        V[name][..., block[name]] = part
