"""Which layers an InfluenceModel tracks: by name, pattern, type and ends."""

from __future__ import annotations

from typing import Any

import pytest
from ihvp import InfluenceModel
from nets import cross_entropy
from torch import nn


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(3))
        self.head = nn.Linear(4, 3)


MLPS = ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]


CHOICES: list[tuple[dict[str, Any], list[str]]] = [
    ({"layers": ["head"]}, ["head"]),
    ({"layers": ["head", "blocks.1.mlp"]}, ["blocks.1.mlp", "head"]),  # in the order of the net
    ({"layers": ["blocks.*.mlp"]}, MLPS),
    ({"layers": ["blocks.[02].mlp", "head"]}, [MLPS[0], MLPS[2], "head"]),
    ({"layers": [nn.Linear]}, [*MLPS, "head"]),
    ({"layers": [nn.Linear, "head"]}, [*MLPS, "head"]),
    ({"layers": [nn.Linear], "start_layer": "blocks.2.mlp"}, [MLPS[2], "head"]),
    ({"layers": [nn.Linear], "start_layer": 1, "last_layer": -2}, MLPS[1:]),
    ({"layers": [nn.Linear], "start_layer": -1}, ["head"]),
    ({"layers": [nn.Linear], "last_layer": "blocks.0.mlp"}, MLPS[:1]),
    ({"layers": [nn.Linear], "start_layer": "blocks.1.mlp", "last_layer": 1}, [MLPS[1]]),
]


@pytest.mark.parametrize(("options", "names"), CHOICES)
def test_layers_by_name_pattern_type_and_ends(options: dict[str, Any], names: list[str]) -> None:
    model = InfluenceModel(Blocks(), cross_entropy, **options)
    assert list(model.layers) == names
    assert model.nb_params == sum(15 if name == "head" else 20 for name in names)
    assert list(model.weights) == [f"{name}.{key}" for name in names for key in ("weight", "bias")]
    assert all(model.weights[name] is p for name, p in model.net.named_parameters() if name in model.weights)
