"""What a layer type must say about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerType:
    """How one kind of module maps to the canonical tokens `a` (N,T,I), `delta` (N,T,O) and to matrices (O,I').

    `module` is a class, or the full name of one in a library that may be missing. `activation` and `output_gradient`
    take (module, tensor), the tensor's first dimension being the example. `split` takes a matrix (..., O, I') apart
    into views of it, the module's own parameters (..., *) by name, and `join` puts them together.

    A module whose weights are a block diagonal matrix is several layers. `parts` has their types: each has its `rows`
    of every parameter, of which `split` and `join` are, and of `delta`, and its `columns` of `a`; the tokens that
    `activation` and `output_gradient` make are the whole module's.
    """

    module: type[nn.Module] | str
    outputs: Callable[[nn.Module], int]
    inputs: Callable[[nn.Module], int]
    bias: Callable[[nn.Module], bool]
    activation: Callable[[nn.Module, Tensor], Tensor]
    output_gradient: Callable[[nn.Module, Tensor], Tensor]
    split: Callable[[nn.Module, Tensor], dict[str, Tensor]]
    join: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    rows: slice | None = None  # all
    columns: slice | None = None  # all
    parts: Callable[[nn.Module], tuple[LayerType, ...]] | None = None
