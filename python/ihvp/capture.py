"""The only hooks: one forward and backward pass that hands each tracked layer's tokens to a sink.

No parameter collects a gradient and no weight-gradient product is run: parameters do not require grad during the pass,
and the backward pass is asked only for the gradient at a scalar that the outputs of the first tracked layers are tied
to. What lies before those layers is not part of the graph. Whatever happens, the net is left as it was found.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ihvp.batch import Batch, FiniteChecks
from ihvp.cache import TokenCache, Tokens
from ihvp.model import InfluenceModel, Layer, LossFn

Sink = Callable[[Layer, Tensor, Tensor, "Tensor | None"], None]
"""Receives (layer, a, delta, mask) as the backward pass reaches the layer: (N,T,I), (N,T,O), (N,T) or None."""


@dataclass
class _Use:
    """One use of a layer in the forward pass. `version` tells whether its input was overwritten since."""

    module: nn.Module
    a: Tensor
    version: int
    delta: Tensor | None = None


class _Tap(torch.autograd.Function):
    """Identity that reports the gradient passing through. It depends on `root`, so that the backward pass comes by.

    The result is no view of the output in autograd's eyes: what follows may change it in place.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, root: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        result: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
        return result

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None]:
        ctx.receive(delta)
        return delta, None, None


_tap: Callable[[Tensor, Tensor, Callable[[Tensor], None]], Tensor] = _Tap.apply


@contextlib.contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Undo what a pass does to a net: `requires_grad` and buffers."""
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) is in training mode, where an example's loss depends on the "
                "rest of its batch; call net.eval() first"
            )
    required = [(p, p.requires_grad) for p in net.parameters()]
    buffers = [
        (module._buffers, key, buffer, buffer.clone())
        for module in net.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for p, flag in required:
            p.requires_grad_(flag)
        with torch.no_grad():
            for owner, key, buffer, value in buffers:
                owner[key] = buffer.copy_(value)


@contextlib.contextmanager
def differentiable(model: InfluenceModel) -> Iterator[None]:
    """Where torch.func may differentiate the net again and again; it is left as it was.

    Attention runs by plain products here: torch's fused kernels have no second derivatives.
    """
    with torch.inference_mode(False), torch.enable_grad(), untouched(model.net), sdpa_kernel(SDPBackend.MATH):
        for p in model.net.parameters():
            p.requires_grad_(False)
        yield


@contextlib.contextmanager
def replaced_outputs(model: InfluenceModel, f: Callable[[Layer, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While the net runs, f(layer, input, output) takes the place of each tracked layer's output."""

    def replace(layer: Layer) -> Callable[..., Tensor]:
        return lambda module, args, kwargs, output: f(layer, args[0] if args else kwargs["input"], output)

    with contextlib.ExitStack() as stack:
        for layer in model.layers.values():
            for module in layer.modules:
                stack.callback(module.register_forward_hook(replace(layer), with_kwargs=True).remove)
        yield


def capture(
    model: InfluenceModel,
    batch: Batch,
    sink: Sink,
    *,
    index: int = 0,
    generator: torch.Generator | None = None,
    measurement: LossFn | None = None,
) -> Tensor:
    """Run one batch forward and backward and feed the sink; return the losses per example (N,), detached.

    A layer used several times in the forward pass is handed over once, its uses joined as further positions. `index`
    names the batch in errors. With a `generator` the targets are drawn from the model's own predictive distribution.
    A `measurement`, (outputs, targets) -> (N,) or (N,T), takes the place of the model's loss.

    Raises:
        ValueError: the loss is not per example, a layer's input does not have the example as its first dimension, the
            mask does not fit a layer, or no tracked layer reaches the loss.
        FloatingPointError: a loss is not finite; names the batch and the examples.
        RuntimeError: a layer's input was changed in place after the layer ran.
    """
    cache = model.cache if generator is None and measurement is None else None
    if cache is not None:
        known = cache.find(model.net, batch, index)
        if known is not None:
            for tokens in known.tokens:
                sink(*tokens)
            return known.losses
        recorder = _Recorder(cache, batch, sink)
        losses = _run(model, batch, recorder, index, generator, measurement)
        if recorder.tokens is not None:
            cache.keep(batch, index, recorder.tokens, losses)
        return losses
    return _run(model, batch, sink, index, generator, measurement)


@dataclass
class _Recorder:
    """A sink that keeps what it hands on, until the cache has no room for it."""

    cache: TokenCache
    batch: Batch
    sink: Sink
    tokens: list[Tokens] | None = field(default_factory=list)

    def __call__(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        self.sink(layer, a, delta, mask)
        if self.tokens is not None:
            self.tokens.append((layer, a, delta, mask))
            if not self.cache.fits(self.tokens, self.batch):
                self.tokens = None


def _run(
    model: InfluenceModel,
    batch: Batch,
    sink: Sink,
    index: int,
    generator: torch.Generator | None,
    measurement: LossFn | None,
) -> Tensor:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        batch = batch.outside_inference()
        state = _Capture(model, batch, sink, index)
        stack.enter_context(untouched(model.net))
        for p in model.net.parameters():
            p.requires_grad_(False)
        for layer in state.parts:
            for module in layer.modules:
                handle = module.register_forward_hook(state.hook(layer), with_kwargs=True)
                stack.callback(handle.remove)
        outputs = model.net(*batch.args, **batch.kwargs)
        targets = batch.targets if generator is None else model.draw_targets(outputs, batch.targets, generator)
        losses = model.losses(outputs, batch, targets, measurement)
        state.check()
        total = losses.sum()
        if not math.isfinite(float(total.detach())):
            bad = (~losses.detach().isfinite()).nonzero().flatten().tolist()
            raise FloatingPointError(f"the loss of batch {index} is not finite at examples {bad[:10]}")
        if not total.requires_grad:
            raise ValueError(f"no tracked layer reaches the loss; tracked: {', '.join(map(repr, model.layers))}")
        del outputs
        torch.autograd.grad(total, [state.root], allow_unused=True)
        state.finish()
    return losses.detach()


class _Capture:
    """One pass: the uses of layers that wait for their gradients. The parts of a module are one until handed over."""

    def __init__(self, model: InfluenceModel, batch: Batch, sink: Sink, index: int) -> None:
        self.batch, self.sink, self.index = batch, sink, index
        self.root = torch.zeros((), device=model.device, requires_grad=True)
        self.parts = {parts[0]: parts for parts in model.parts}
        self.uses: dict[Layer, list[_Use]] = {}
        self.seen: set[Layer] = set()
        self.forward = True
        self.finite = FiniteChecks()

    def hook(self, layer: Layer) -> Callable[..., Any]:
        def after_forward(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None  # shielded from gradients by the net itself
            if not self.forward:  # recomputed for an activation checkpoint: the first run's use gets the gradient
                if layer not in self.seen:
                    raise RuntimeError(
                        f"layer {layer.module!r} runs in a reentrant activation checkpoint, which hides it; "
                        "use checkpoint(..., use_reentrant=False)"
                    )
                return _tap(output, self.root, lambda delta: None)
            x = args[0] if args else kwargs["input"]
            use = _Use(module, x.detach(), x._version)
            self.uses.setdefault(layer, []).append(use)
            self.seen.add(layer)
            return _tap(output, self.root, lambda delta: self.receive(layer, use, delta))

        return after_forward

    def check(self) -> None:
        self.forward = False
        N = self.batch.size
        for layer, uses in self.uses.items():
            for use in uses:
                if use.a.dim() < 2 or use.a.shape[0] != N:
                    raise ValueError(
                        f"layer {layer.module!r} got an input of shape {tuple(use.a.shape)} for N={N} examples; "
                        "its first dimension must be the example"
                    )

    def receive(self, layer: Layer, use: _Use, delta: Tensor) -> None:
        if use.a._version != use.version:
            raise RuntimeError(
                f"the input of layer {layer.module!r} was changed in place after the layer ran, so its gradient is "
                "lost; make that operation out of place"
            )
        use.delta = delta
        uses = self.uses[layer]
        if all(one.delta is not None for one in uses):
            self.hand_over(layer, uses)

    def hand_over(self, layer: Layer, uses: list[_Use]) -> None:
        del self.uses[layer]
        a = [layer.type.activation(use.module, use.a) for use in uses]
        delta = [layer.type.output_gradient(use.module, use.delta) for use in uses if use.delta is not None]
        masks = [self.mask(layer, use, x) for use, x in zip(uses, a, strict=True)]
        for use in uses:
            del use.a, use.delta  # the graph still holds the use
        mask = masks[0]
        if len(uses) > 1 and any(one is not None for one in masks):
            whole = [x.new_ones(x.shape[:2], dtype=torch.bool) for x in a]
            mask = torch.cat([w if m is None else m for m, w in zip(masks, whole, strict=True)], dim=1)
        joined_a, joined_delta = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (a, delta))
        for what, x in (("input", joined_a), ("output gradient", joined_delta)):
            self.finite.add(x, f"layer {layer.module!r}, batch {self.index}: the {what} is not finite", mask)
        parts = self.parts[layer]
        if len(parts) == 1:
            self.sink(layer, joined_a, joined_delta, mask)
            return
        for part in parts:
            self.sink(part, joined_a[..., part.columns], joined_delta[..., part.rows], mask)

    def mask(self, layer: Layer, use: _Use, x: Tensor) -> Tensor | None:
        mask = self.batch.mask
        if mask is not None and mask.shape[1] == x.shape[1]:
            return mask
        if mask is None or use.a.dim() == 2:
            return None  # one position an example
        raise ValueError(
            f"mask must be (N,T) with T={x.shape[1]} as in layer {layer.module!r}, got {tuple(mask.shape)}"
        )

    def finish(self) -> None:
        """Layers of which some uses got no gradient: the others are their positions."""
        for layer, uses in list(self.uses.items()):
            reached = [use for use in uses if use.delta is not None]
            if reached:
                self.hand_over(layer, reached)
        self.finite.finish()
