"""The user's model with what influence needs to know of it: the loss, the tracked layers, the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ihvp.batch import Batch, as_batch
from ihvp.cache import TokenCache
from ihvp.layers import LayerType, layer_types, supported

LossFn = Callable[[Any, Any], Tensor]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Layer:
    """A tracked layer. `modules` are the modules that share its parameters, most often one.

    A group of a convolution is a layer: `rows` are its part of each parameter and of the module's `delta`, `columns`
    its part of the module's `a`.
    """

    name: str
    module: str  # the name in the net of the first of
    modules: tuple[nn.Module, ...]
    type: LayerType
    outputs: int
    inputs: int  # without the bias feature
    bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I')."""
        return self.outputs, self.inputs + self.bias

    @property
    def rows(self) -> slice:
        return slice(None) if self.type.rows is None else self.type.rows

    @property
    def columns(self) -> slice:
        return slice(None) if self.type.columns is None else self.type.columns

    def parameters(self) -> dict[str, nn.Parameter]:
        """Its modules' parameters by their names in the net."""
        return {self._named(key): p for key, p in self.modules[0].named_parameters(recurse=False)}

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """(..., O, I') as the layer's rows of parameters, by their names in the net."""
        return {self._named(key): value for key, value in self.type.split(self.modules[0], matrix).items()}

    def join(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The way back, from whole parameters (..., *)."""
        own = {}
        for key, p in self.modules[0].named_parameters(recurse=False):
            at: tuple[Any, ...] = (..., self.rows, *[slice(None)] * (p.dim() - 1))
            own[key] = parameters[self._named(key)][at]
        return self.type.join(self.modules[0], own)

    def matrix(self) -> Tensor:
        """The layer's parameters as one (O,I') matrix, detached."""
        return self.join({key: p.detach() for key, p in self.parameters().items()})

    def _named(self, key: str) -> str:
        return f"{self.module}.{key}" if self.module else key


class InfluenceModel:
    """A torch model, its loss and the layers whose influence is asked for.

    Args:
        net: any torch module. It is never changed: no hook, mode, buffer, `requires_grad` or `.grad` stays behind.
        loss_fn: (outputs, targets) -> one loss per example (N,) or per position (N,T). Any callable; not reduced.
        layers: names or shell patterns of names ("blocks.*.mlp"), module types (torch.nn.Linear), or both. None: every
            module with parameters of its own, and each of them must be of a supported type.
        start_layer, last_layer: a part of those layers, both ends included, each by name or by position (negative from
            the end). None: from the first, to the last.
        process_batch: turns what a loader yields into (inputs, targets) or an `ihvp.Batch`. None: it yields that.
        sample_targets: (outputs, targets, generator) -> targets drawn from the model's own predictive distribution,
            for `fisher="sampled"`. None: softmax of the logits where the targets are integers.
        progress: a progress bar on passes over data; None: only on a terminal.
        cache_bytes: memory for the tokens of captured batches. A fit and its scores pass over the training data three
            times; batches whose tokens are kept run through the net once. They are known by their contents, so the
            loader must not shuffle to gain by it. 0 keeps nothing. See `clear_cache`.

    Attributes:
        layers: tracked layers by name, in the order of the net; those of a convolution's groups are "name/0", "name/1",
            ... `nb_params` counts their parameters and `weights` has them by name.

    Raises:
        ValueError: a name, pattern or position that does not exist, or nothing left to track.
        TypeError: a module of an unsupported type, named, with the ways out.
    """

    def __init__(
        self,
        net: nn.Module,
        loss_fn: LossFn,
        layers: Sequence[str | type[nn.Module]] | None = None,
        start_layer: str | int | None = None,
        last_layer: str | int | None = None,
        process_batch: Callable[[Any], Any] | None = None,
        *,
        sample_targets: Callable[[Any, Any, torch.Generator], Any] | None = None,
        progress: bool | None = None,
        cache_bytes: int = 0,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
        for name, function in (("process_batch", process_batch), ("sample_targets", sample_targets)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        self.net = net
        self.loss_fn = loss_fn
        self.process_batch = process_batch
        self.sample_targets = sample_targets
        self.progress = progress
        if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int) or cache_bytes < 0:
            raise ValueError(f"cache_bytes must be a whole number >= 0, got {cache_bytes!r}")
        self.cache = TokenCache(cache_bytes) if cache_bytes > 0 else None
        self.layers = _layers(_between(_tracked(net, layers), start_layer, last_layer))

    def clear_cache(self) -> None:
        """Forget kept tokens. Needed only after a change that autograd cannot see, as through `parameter.data`."""
        if self.cache is not None:
            self.cache.clear()

    @property
    def parts(self) -> list[list[Layer]]:
        """The layers, together those that are parts of one module."""
        found: dict[str, list[Layer]] = {}
        for layer in self.layers.values():
            found.setdefault(layer.module, []).append(layer)
        return list(found.values())

    @property
    def nb_params(self) -> int:
        return sum(outputs * inputs for outputs, inputs in (layer.shape for layer in self.layers.values()))

    def split(self, V: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer name -> (..., O, I') as parameters (..., *) by their names in the net."""
        found: dict[str, list[Tensor]] = {}
        for name, layer in self.layers.items():
            for key, part in layer.split(V[name]).items():
                found.setdefault(key, []).append(part)
        first = next(iter(V.values())).dim() - 2  # dimension of a parameter
        return {key: own[0] if len(own) == 1 else torch.cat(own, dim=first) for key, own in found.items()}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return {name: p for layer in self.layers.values() for name, p in layer.parameters().items()}

    @property
    def device(self) -> torch.device:
        return next(self._parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of factors and scores: float64 for a float64 model, float32 otherwise."""
        wide = any(p.dtype == torch.float64 for p in self._parameters())
        return torch.float64 if wide else torch.float32

    def _parameters(self) -> Iterator[nn.Parameter]:
        for layer in self.layers.values():  # asked for once a layer or more, so without named_parameters' ways
            yield from (p for p in layer.modules[0]._parameters.values() if p is not None)

    def batch(self, raw: Any) -> Batch:
        """What a loader yields, as a Batch on the model's device."""
        return as_batch(self.process_batch(raw) if self.process_batch else raw).to(self.device)

    def passes(self, loader: Iterable[Any], description: str) -> Iterator[tuple[Any, Batch]]:
        """One pass over a loader: (what it yields, the Batch of it). Raises ValueError when it yields nothing."""
        seen = False
        try:
            total = len(loader) if isinstance(loader, Sized) else None
        except TypeError:  # a DataLoader of a stream
            total = None
        disable = None if self.progress is None else not self.progress
        for raw in tqdm(iter(loader), desc=description, total=total, disable=disable, leave=False):
            seen = True
            yield raw, self.batch(raw)
        if not seen:
            raise ValueError(
                f"the loader yielded no batch ({description}); it must hold data, and be an object that can be "
                "iterated again, such as a DataLoader or a list, when a method makes several passes"
            )

    def losses(self, outputs: Any, batch: Batch, targets: Any, measurement: LossFn | None = None) -> Tensor:
        """Losses per example (N,): weighted, masked, summed over positions. A `measurement` takes loss_fn's place."""
        losses = self.losses_apart(outputs, batch, targets, measurement)
        return losses.sum(1) if losses.dim() == 2 else losses

    def losses_apart(self, outputs: Any, batch: Batch, targets: Any, measurement: LossFn | None = None) -> Tensor:
        """The terms of `losses` as the function returns them, per position (N,T) or per example (N,)."""
        N = batch.size
        function, who, what = (
            (self.loss_fn, "loss_fn", "loss") if measurement is None else (measurement, "measurement", "value")
        )
        losses = function(outputs, targets)
        if not isinstance(losses, Tensor):
            raise TypeError(f"{who} must return a tensor, got {type(losses).__name__}")
        if losses.dim() not in (1, 2) or losses.shape[0] != N:
            came = "a scalar" if losses.dim() == 0 else str(tuple(losses.shape))
            raise ValueError(
                f"{who} must return one {what} per example (N,) or per position (N,T) with N={N}, got {came}; "
                'torch losses take reduction="none"'
            )
        losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
        if losses.dim() == 2:
            if batch.mask is not None:
                if batch.mask.shape != losses.shape:
                    raise ValueError(
                        f"mask must be (N,T) = {tuple(losses.shape)} as the loss, got {tuple(batch.mask.shape)}"
                    )
                losses = torch.where(batch.mask, losses, losses.new_zeros(()))
        elif batch.mask is not None and batch.mask.shape[1] == 1:
            losses = torch.where(batch.mask[:, 0], losses, losses.new_zeros(()))
        if batch.weights is None:
            return losses
        return losses * (batch.weights if losses.dim() == 1 else batch.weights.unsqueeze(1))

    def draw_targets(self, outputs: Any, targets: Any, generator: torch.Generator) -> Any:
        """Targets from the model's own predictive distribution."""
        with torch.no_grad():  # the targets are data: no gradient flows through the draw
            if self.sample_targets is not None:
                return self.sample_targets(outputs, targets, generator)
            return draw_classes(outputs, targets, generator)


def draw_classes(outputs: Any, targets: Any, generator: torch.Generator) -> Tensor:
    """Class targets from the softmax of logits (*, C), or (N, C, *) as torch's cross_entropy has them.

    Negative targets mark positions that the loss ignores; they stay. One uniform number is drawn per position, in
    order, so that the draw does not depend on the batch size.
    """
    logits = getattr(outputs, "logits", outputs)
    known = isinstance(logits, Tensor) and isinstance(targets, Tensor) and not targets.is_floating_point()
    last = known and logits.dim() == targets.dim() + 1 and logits.shape[:-1] == targets.shape
    second = (
        known
        and targets.dim() > 1
        and logits.dim() == targets.dim() + 1
        and logits.movedim(1, -1).shape[:-1] == targets.shape
    )
    if last == second:
        shapes = f"outputs {tuple(logits.shape)}, targets {tuple(targets.shape)}" if known else type(outputs).__name__
        raise ValueError(
            'fisher="sampled" knows integer targets with logits (N,C), (N,T,C) or (N,C,T), where C is not T, '
            f"got {shapes}; give InfluenceModel a sample_targets"
        )
    if second:
        logits = logits.movedim(1, -1)
    cumulative = logits.detach().double().softmax(-1).cumsum(-1)
    uniform = torch.rand(targets.shape, generator=generator, dtype=torch.float64).to(targets.device)
    drawn = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * cumulative[..., -1:]).squeeze(-1)
    return torch.where(targets < 0, targets, drawn.clamp_max(logits.shape[-1] - 1).to(targets.dtype))


def _tracked(net: nn.Module, wanted: Sequence[str | type[nn.Module]] | None) -> dict[str, tuple[nn.Module, ...]]:
    """The wanted modules; those that share all their parameters are together, under the name of the first."""
    weighted = {
        name: module for name, module in net.named_modules() if next(module.parameters(recurse=False), None) is not None
    }
    if wanted is None:
        chosen = weighted
    else:
        if isinstance(wanted, (str, type)) or not isinstance(wanted, Sequence):
            raise TypeError(f"layers must be a list or another sequence of names and module types, got {wanted!r}")
        chosen = {}
        for entry in wanted:
            if not isinstance(entry, (str, type)):
                raise TypeError(f"layers must hold names and module types, got {entry!r}")
            if isinstance(entry, type):
                found = {name: module for name, module in weighted.items() if isinstance(module, entry)}
                what = f"type {entry.__name__}"
            else:
                found = {name: module for name, module in weighted.items() if fnmatchcase(name, entry)}
                what = f"name or pattern {entry!r}"
            if not found:
                raise ValueError(f"layers: no module of {what}; the net has {', '.join(map(repr, weighted)) or 'none'}")
            chosen.update(found)
        chosen = {name: module for name, module in weighted.items() if name in chosen}
    refused = [f"{name!r} ({type(module).__name__})" for name, module in chosen.items() if not layer_types(module)]
    if refused:
        others = [name for name, module in weighted.items() if layer_types(module)]
        raise TypeError(
            f"unsupported layers: {', '.join(refused)}. Supported types: "
            f"{supported()}. Leave them out by layers=[...], for example "
            f"layers={others!r} or layers=[torch.nn.Linear], or add a file to ihvp/layers"
        )
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, module in chosen.items():
        groups.setdefault(tuple(id(p) for p in module.parameters(recurse=False)), []).append(name)
    owners: dict[int, str] = {}
    for name, module in weighted.items():
        for p in module.parameters(recurse=False):
            first = owners.setdefault(id(p), name)
            same = any(first in names and name in names for names in groups.values())
            if first != name and not same and (first in chosen or name in chosen):
                raise TypeError(
                    f"layers {first!r} and {name!r} share a parameter but not as layers of one kind; "
                    "leave them out by layers=[...]"
                )
    return {names[0]: tuple(chosen[name] for name in names) for names in groups.values()}


def _layers(tracked: Mapping[str, tuple[nn.Module, ...]]) -> dict[str, Layer]:
    """The layers of modules: one a module, under its name, or one a part, under "name/0", "name/1", ..."""
    layers = {}
    for name, modules in tracked.items():
        module, types = modules[0], layer_types(modules[0])
        for i, own in enumerate(types):
            part = name if len(types) == 1 else f"{name}/{i}"
            layers[part] = Layer(part, name, modules, own, own.outputs(module), own.inputs(module), own.bias(module))
    return layers


def _between(layers: dict[str, T], start: str | int | None, last: str | int | None) -> dict[str, T]:
    names = list(layers)
    if not names:
        raise ValueError("layers: the net has no module with parameters to track")

    def position(which: str, value: str | int | None, default: int) -> int:
        if value is None:
            return default
        if isinstance(value, str):
            if value not in layers:
                raise ValueError(f"{which} {value!r} is not a tracked layer; they are {', '.join(map(repr, names))}")
            return names.index(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{which} must be a layer's name or position, got {value!r}")
        if not -len(names) <= value < len(names):
            raise ValueError(f"{which} must be from {-len(names)} to {len(names) - 1}, a tracked layer, got {value}")
        return value % len(names)

    first, end = position("start_layer", start, 0), position("last_layer", last, len(names) - 1)
    if first > end:
        raise ValueError(f"start_layer {names[first]!r} comes after last_layer {names[end]!r}")
    return {name: layers[name] for name in names[first : end + 1]}
