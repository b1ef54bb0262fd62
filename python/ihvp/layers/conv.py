"""nn.Conv1d, 2d and 3d: a linear layer whose positions are the outputs', and whose inputs their patches.

y[o,t] = <W[o], patch_t> + b[o], so g = sum_t delta_t [patch_t; 1]^T, features ordered as the weight is: channel first.
Of several groups each is a layer of its own: it sees its channels and makes its outputs.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ihvp.layers._layer_type import LayerType

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def patches(own: Conv, x: Tensor) -> Tensor:
    """(N,C,*) -> (N,T,C k): what the kernel sees at each of the T places of the output."""
    dims = x.dim() - 2
    spans = [dilation * (size - 1) + 1 for size, dilation in zip(own.kernel_size, own.dilation, strict=True)]
    x = F.pad(x, margins(own, spans), mode="constant" if own.padding_mode == "zeros" else own.padding_mode)
    for i, span in enumerate(spans):
        x = x.unfold(2 + i, span, own.stride[i])[..., :: own.dilation[i]]
    out = x.new_empty(len(x), *x.shape[2 : 2 + dims], x.shape[1], *own.kernel_size)
    for at in product(*map(range, own.kernel_size[:-1])):  # a kernel's row at a time: twice as fast as one copy at 3x3
        row: tuple[Any, ...] = (..., *at, slice(None))
        out[row] = x[row].movedim(1, -2)
    return out.flatten(1 + dims).flatten(1, dims)


def margins(module: Conv, spans: list[int]) -> list[int]:
    """What is padded, as torch.nn.functional.pad takes it: the last dimension first."""
    pairs = []
    for i, span in enumerate(spans):
        if module.padding == "same":
            pairs.append([(span - 1) // 2, span - 1 - (span - 1) // 2])
        else:
            pairs.append([0, 0] if isinstance(module.padding, str) else [int(module.padding[i])] * 2)
    return [margin for pair in reversed(pairs) for margin in pair]


def split(module: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
    own = cast(Conv, module)
    weights = matrix if own.bias is None else matrix[..., :-1]
    weight = weights.unflatten(-1, own.weight.shape[1:])
    return {"weight": weight} if own.bias is None else {"weight": weight, "bias": matrix[..., -1]}


def join(module: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
    weights = parameters["weight"].flatten(1 - cast(Conv, module).weight.dim())
    return weights if module.bias is None else torch.cat([weights, parameters["bias"].unsqueeze(-1)], dim=-1)


def group_of(module: Conv, count: int, group: int) -> slice:
    """What belongs to a group, of `count` in all."""
    width = count // module.groups
    return slice(group * width, (group + 1) * width)


def convolution(module: type[nn.Module], dims: int) -> LayerType:
    def activation(module: nn.Module, x: Tensor) -> Tensor:
        if x.dim() != dims + 2:
            raise ValueError(f"expected (N, channels, {dims} dimensions), got {tuple(x.shape)}")
        return patches(cast(Conv, module), x)

    whole = LayerType(
        module=module,
        outputs=lambda module: cast(Conv, module).out_channels // cast(Conv, module).groups,
        inputs=lambda module: prod(cast(Conv, module).weight.shape[1:]),
        bias=lambda module: module.bias is not None,
        activation=activation,
        output_gradient=lambda module, delta: delta.flatten(2).mT,
        split=split,
        join=join,
    )

    def parts(module: nn.Module) -> tuple[LayerType, ...]:
        own = cast(Conv, module)
        inputs, outputs = own.in_channels * prod(own.kernel_size), own.out_channels
        return tuple(
            replace(whole, rows=group_of(own, outputs, group), columns=group_of(own, inputs, group))
            for group in range(own.groups)
        )

    return replace(whole, parts=parts)


CONVOLUTIONS = convolution(nn.Conv1d, 1), convolution(nn.Conv2d, 2), convolution(nn.Conv3d, 3)
