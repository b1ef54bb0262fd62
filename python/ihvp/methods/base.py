"""What every IHVP object does: the contract of the family, and the generic way to each of its answers."""

from __future__ import annotations

import copy
import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ihvp import ops
from ihvp.batch import Batch, FiniteChecks
from ihvp.capture import capture
from ihvp.methods.blocks import Block, BlockStructure, make_blocks
from ihvp.methods.damping import Damping, check_damping
from ihvp.methods.queries import DenseQueries, LayerQueries, Queries, low_rank, small_layers, truncated
from ihvp.model import InfluenceModel, Layer, LossFn

if TYPE_CHECKING:
    from typing_extensions import Self

Vectors = dict[str, Tensor]
"""Layer name -> (Q,O,I'): Q vectors in the space of the tracked parameters."""


class IHVP(ABC):
    """An inverse-Hessian-vector product: (F + damping I)^-1 for one curvature F of the mean loss.

    A subclass says what it sums over the data (`fit`) and how it solves. V and the results map a layer's name to
    (Q,O,I'): weights, then the bias as last column. V may have any floating dtype; results are float64 for a float64
    model, float32 otherwise.

    Args:
        model: the InfluenceModel.
        hessian_loader: the data of the curvature; the constructor fits when it is given.
        damping: a number >= 0, or "auto": 0.1 times the mean eigenvalue of each block; or a mapping with one of them
            for every block.

    Attributes:
        blocks: block name -> layer name -> columns of its (O,I'); the curvature is zero between blocks.

    Raises:
        TypeError, ValueError: a wrong argument, named. FloatingPointError: a sum is not finite; names layer and batch.
    """

    block_structure: BlockStructure = "full"

    def __init__(
        self, model: InfluenceModel, hessian_loader: Iterable[Any] | None = None, damping: Damping = 1e-3
    ) -> None:
        if not isinstance(model, InfluenceModel):
            raise TypeError(f"model must be an ihvp.InfluenceModel, got {type(model).__name__}")
        self.model = model
        self.blocks: dict[str, Block] = make_blocks(model, self.block_structure)
        check_damping(damping, self.blocks)
        self.damping = damping
        if hessian_loader is not None:
            self.fit(hessian_loader)

    # --- what a method says -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def is_fitted(self) -> bool:
        """Whether `solve` can be asked."""

    @abstractmethod
    def fit(self, loader: Iterable[Any]) -> IHVP:
        """Sum the curvature over a loader, replacing an earlier fit. A fit that fails leaves the object as it was."""

    @abstractmethod
    def _solve(self, V: Vectors, damping: Damping) -> Vectors: ...

    @abstractmethod
    def _multiply(self, V: Vectors) -> Vectors: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The fitted state as a flat dict of tensors; sums and counts as they were accumulated."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a fitted state. Raises ValueError, and changes nothing, when it is not one of this model's."""

    def _config(self) -> dict[str, Any]:
        """The constructor's arguments, for `save`."""
        return {"damping": self.damping}

    # --- what all of them answer ------------------------------------------------------------------------------

    def solve(self, V: Vectors, damping: Damping | Sequence[Damping] | None = None) -> Vectors:
        """(F + damping I)^-1 V.

        Args:
            V: layer name -> (Q,O,I'), of every tracked layer.
            damping: None: the object's own. A sequence of D solves for all of them and puts a dimension D in front:
                (D,Q,O,I').

        Raises:
            RuntimeError: not fitted. ValueError: V does not fit the layers, or a damping is negative.
            torch.linalg.LinAlgError: the damped curvature is singular; the block is named.
        """
        self._check_fitted()
        V = self._vectors(V)
        if damping is None or isinstance(damping, (int, float, str, Mapping)):
            single = self.damping if damping is None else damping
            check_damping(single, self.blocks)
            return self._solve(V, single)
        if not isinstance(damping, Sequence):
            raise TypeError(
                f'damping must be a number, "auto", a mapping of blocks to them or a sequence of those, got {damping!r}'
            )
        for value in damping:
            check_damping(value, self.blocks)
        if not damping:
            return {name: v.new_empty(0, *v.shape) for name, v in V.items()}
        return self._solve_several(V, list(damping))

    def _solve_several(self, V: Vectors, dampings: list[Damping]) -> Vectors:
        solutions = [self._solve(V, value) for value in dampings]
        return {name: torch.stack([solution[name] for solution in solutions]) for name in V}

    def with_damping(self, damping: Damping) -> Self:
        """The same fitted object with another damping; the two share what was fitted."""
        check_damping(damping, self.blocks)
        other = copy.copy(self)
        other.damping = damping
        return other

    def merge(self, *others: IHVP) -> Self:
        """The fit to all of their data together: a new object with this one's damping and model.

        For methods whose state is a sum or a list over the data: each part of it is fitted by a process of its own and
        brought here, by a file or otherwise. The result is that of one fit to rounding. EKFAC objects must have been
        fitted with one `basis`; parts of a sampled Fisher matrix need seeds of their own.

        Raises:
            TypeError: an object of another class. RuntimeError: one is not fitted. ValueError: its layers or arguments
            are others, or they do not add up. NotImplementedError: the method's state is neither.
        """
        for i, other in enumerate((self, *others)):
            if type(other) is not type(self):
                raise TypeError(
                    f"others[{i - 1}] must be of the class {type(self).__name__}, got {type(other).__name__}"
                )
            other._check_fitted()
            check_layers(f"others[{i - 1}]", other.model, self.model)
            free = ("damping", "seed")
            got, want = ({key: x for key, x in one._config().items() if key not in free} for one in (other, self))
            if got != want:
                raise ValueError(f"others[{i - 1}] must have the arguments {want}, got {got}")
        merged = copy.copy(self)
        merged._merge(others)
        return merged

    def _merge(self, others: Sequence[Any]) -> None:
        """Take the data of others of this class over. What is shared with another object is replaced, never changed."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged: its state is no sum over the data")

    def multiply(self, V: Vectors) -> Vectors:
        """F V, undamped. Shapes and errors as for `solve`."""
        self._check_fitted()
        return self._multiply(self._vectors(V))

    def compute_ihvp(self, loader: Iterable[Any], use_gradient: bool = True) -> Vectors:
        """`solve` for every example of a loader: their gradients, or with use_gradient=False its items, each a V."""
        return self._over(loader, use_gradient, self.solve, "inverse-Hessian-vector products")

    def compute_hvp(self, loader: Iterable[Any], use_gradient: bool = True) -> Vectors:
        """`multiply` for every example of a loader: their gradients, or with use_gradient=False its items, each a V."""
        return self._over(loader, use_gradient, self.multiply, "Hessian-vector products")

    def _over(
        self, loader: Iterable[Any], use_gradient: bool, f: Callable[[Vectors], Vectors], description: str
    ) -> Vectors:
        self._check_fitted()
        if not use_gradient:
            parts = [f(V) for V in loader]
            if not parts:
                raise ValueError("the loader yielded no vectors")
            return concatenate(parts)
        batches = enumerate(self.model.passes(loader, description))
        return concatenate([f(gradients(self.model, batch, index=i)) for i, (_, batch) in batches])

    def queries(
        self, batch: Batch, *, index: int = 0, measurement: LossFn | None = None, rank: int | None = None
    ) -> Queries:
        """The batch's gradients, preconditioned with the object's damping, ready to score training data.

        Gradients of the loss, or of a `measurement` (outputs, targets) -> (N,) or (N,T). With a `rank` each is kept as
        factors of it, layer by layer, but for small layers of which there are many.
        """
        return self.precondition(gradients(self.model, batch, index=index, measurement=measurement), rank)

    def precondition(self, g: Vectors, rank: int | None = None) -> Queries:
        """What `queries` makes of gradients, here given."""
        return low_rank({name: DenseQueries(P) for name, P in self.solve(g).items()}, self.model, rank)

    def quadratic(self, batch: Batch, power: int = 1, *, index: int = 0) -> Tensor:
        """g_n^T (F + damping I)^-power g_n for every example (N,), power 1 or 2.

        Power 1 is the self-influence; power 2 is ||(F + damping I)^-1 g_n||^2, what RelatIF divides by.
        """
        self._check_fitted()
        V = gradients(self.model, batch, index=index)
        P = self._solve(V, self.damping)
        return dots(P, V if power == 1 else P)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted state to a safetensors file: under a temporary name first, then moved into place."""
        self._check_fitted()
        target = Path(path)
        layers = {name: layer.shape for name, layer in self.model.layers.items()}
        metadata = {
            "ihvp": "1",
            "method": type(self).__name__,
            "config": json.dumps(self._config()),
            "layers": json.dumps(layers),
        }
        state = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        owners = {x.data_ptr(): name for name, x in state.items()}  # a file has no tensors that share memory
        state = {name: x if owners[x.data_ptr()] == name else x.clone() for name, x in state.items()}
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # what the umask allows; save_file would keep the file to its owner
            save_file(state, temporary, metadata=metadata)
            temporary.chmod(mode)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _check_fitted(self) -> None:
        if not self.is_fitted:
            raise RuntimeError(f"{type(self).__name__} is not fitted; call fit(loader) or give the constructor data")

    def _vectors(self, V: Vectors) -> Vectors:
        """V in the model's dtype, after the check that it fits the layers."""
        layers, dtype = self.model.layers, self.model.dtype
        if not isinstance(V, Mapping) or set(V) != set(layers):
            got = ", ".join(map(repr, V)) if isinstance(V, Mapping) else type(V).__name__
            raise ValueError(f"V must map every tracked layer to (Q,O,I'): {', '.join(map(repr, layers))}; got {got}")
        counts = {x.shape[0] if x.dim() == 3 else -1 for x in V.values()}
        for name, layer in layers.items():
            if V[name].dim() != 3 or tuple(V[name].shape[1:]) != layer.shape or len(counts) > 1:
                O, I = layer.shape
                raise ValueError(
                    f"V[{name!r}] must be (Q,O,I') with O={O}, I'={I}, one Q for all layers, got {tuple(V[name].shape)}"
                )
        return {name: V[name].to(dtype) for name in layers}


def check_layers(who: str, model: InfluenceModel, own: InfluenceModel) -> None:
    """Raises ValueError unless the layers of `model`, of `who`, have the names and shapes of those of `own`."""
    got, want = ({name: layer.shape for name, layer in one.layers.items()} for one in (model, own))
    if got != want:
        raise ValueError(f"{who} must have the layers (O,I') {want}, got {got}")


class LayerwiseIHVP(IHVP):
    """An IHVP whose curvature is block diagonal by layer, so that each layer is solved as soon as it is captured."""

    block_structure = "layer"

    def _solve(self, V: Vectors, damping: Damping) -> Vectors:
        return {name: self._solve_layer(name, v, damping) for name, v in V.items()}

    @abstractmethod
    def _solve_layer(self, name: str, V: Tensor, damping: Damping) -> Tensor: ...

    def queries(
        self, batch: Batch, *, index: int = 0, measurement: LossFn | None = None, rank: int | None = None
    ) -> Queries:
        self._check_fitted()
        found: Queries = {}
        small, g = small_layers(self.model), Vectors()

        def sink(layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
            if layer.name in small:
                g[layer.name] = ops.per_sample_gradient(a, delta, mask=mask, bias=layer.bias)
            else:
                found[layer.name] = truncated(self._queries_layer(layer, a, delta, mask), layer, rank)

        capture(self.model, batch, sink, index=index, measurement=measurement)
        found |= {name: DenseQueries(P) for name, P in self._solve(g, self.damping).items()}
        zeros = complete(self.model, dict.fromkeys(found, torch.empty(0)), batch.size)
        missing = low_rank({name: DenseQueries(zeros[name]) for name in zeros if name not in found}, self.model, rank)
        return {name: found[name] if name in found else missing[name] for name in self.model.layers}

    def _queries_layer(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> LayerQueries:
        g = ops.per_sample_gradient(a, delta, mask=mask, bias=layer.bias)
        return DenseQueries(self._solve_layer(layer.name, g, self.damping))

    def quadratic(self, batch: Batch, power: int = 1, *, index: int = 0) -> Tensor:
        self._check_fitted()
        parts = [torch.zeros(batch.size, dtype=self.model.dtype, device=self.model.device)]

        def sink(layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
            parts.append(self._quadratic_layer(layer, a, delta, mask, power))

        capture(self.model, batch, sink, index=index)
        return torch.stack(parts).sum(0)

    @abstractmethod
    def _quadratic_layer(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, power: int) -> Tensor:
        """This layer's part of g_n^T (F + damping I)^-power g_n."""


def dots(V: Vectors, W: Vectors) -> Tensor:
    """(Q,): <V_q, W_q>."""
    return torch.stack([(V[name] * W[name]).sum((1, 2)) for name in V]).sum(0)


def gradients(model: InfluenceModel, batch: Batch, *, index: int = 0, measurement: LossFn | None = None) -> Vectors:
    """Per-example gradients of a batch, of the loss or of a measurement: layer name -> (N,O,I')."""
    g: Vectors = {}

    def sink(layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        g[layer.name] = ops.per_sample_gradient(a, delta, mask=mask, bias=layer.bias)

    capture(model, batch, sink, index=index, measurement=measurement)
    return complete(model, g, batch.size)


def complete(model: InfluenceModel, V: Vectors, N: int) -> Vectors:
    """In the order of the layers; a layer that this batch did not reach has gradient zero."""
    zeros = {
        name: torch.zeros(N, *layer.shape, dtype=model.dtype, device=model.device)
        for name, layer in model.layers.items()
        if name not in V
    }
    return {name: V[name] if name in V else zeros[name] for name in model.layers}


def concatenate(parts: Sequence[Vectors]) -> Vectors:
    """Along Q. Layer by layer, so that no more than one layer exists twice."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}


def check_finite(finite: FiniteChecks, layer: Layer, index: int, **values: Tensor) -> None:
    for what, x in values.items():
        finite.add(x, f"layer {layer.name!r}, batch {index}: {what.replace('_', ' ')} is not finite")


def check_reached(model: InfluenceModel, reached: Iterable[str]) -> None:
    missing = set(model.layers) - set(reached)
    if missing:
        raise ValueError(
            f"no batch reached the layers {', '.join(map(repr, sorted(missing)))}: the loss does not depend on them, "
            "or the net uses their parameters without calling them; leave them out by layers=[...]"
        )


def read_state(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], who: str) -> dict[str, Tensor]:
    """Copies of the expected tensors. Raises ValueError naming the first that is missing, superfluous or misshapen."""
    for name, shape in expected.items():
        if name not in state:
            raise ValueError(f"{who}: the state has no {name!r}; it is of another model or method")
        if tuple(state[name].shape) != tuple(shape):
            raise ValueError(
                f"{who}: {name!r} must be {tuple(shape)}, got {tuple(state[name].shape)}; it is of another model"
            )
    for name in state:
        if name not in expected:
            raise ValueError(f"{who}: the state has an unknown {name!r}; it is of another model or method")
    return {name: state[name].clone() for name in expected}


def batches(model: InfluenceModel, loader: Iterable[Any], description: str) -> Iterator[tuple[int, Batch]]:
    """One pass over a loader: (index, Batch)."""
    for index, (_, batch) in enumerate(model.passes(loader, description)):
        yield index, batch
