"""Small nets and data, and what the library owes them: dense matrices in float64, written from the definitions.

Nothing here uses the library's hooks, ops or methods; per-example gradients are torch.func's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import ihvp
import torch
import torch.nn.functional as F
from ihvp import Batch, InfluenceModel
from ihvp.methods.blocks import make_blocks
from torch import Tensor, nn

F32, F64 = torch.float32, torch.float64
RELATIVE = {F64: 1e-11, F32: 1e-5}  # what end-to-end results owe a dense float64 reference

Vectors = dict[str, Tensor]


def assert_near(got: Tensor, want: Tensor, relative: float | None = None) -> None:
    """|got - want| <= relative |want| in the Frobenius norm; the dtype of `got` says how much, unless it is given."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    bound = (RELATIVE[got.dtype] if relative is None else relative) * float(want.norm())
    error = float((got.double() - want.double()).norm())
    assert error <= bound, f"error {error:.3g} above {bound:.3g}"


# --- losses, not reduced -----------------------------------------------------------------------------------------


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """(N,C) or (N,T,C) -> (N,) or (N,T); targets of -100 are ignored."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1) / 2


# --- nets and data -----------------------------------------------------------------------------------------------


def chain(*sizes: int, bias: bool = True, between: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers "0", "2", "4", ... with something between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), between()]
    return nn.Sequential(*layers[:-1])


class Pooled(nn.Module):
    """Token layers, one of them used twice, their masked mean, and a head of one position an example."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 3)
        self.mix = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        h = h + self.mix(self.mix(h).tanh())
        h = torch.where(mask.unsqueeze(-1), h, 0)
        return self.head(h.sum(1) / mask.sum(1, keepdim=True))


@dataclass(frozen=True)
class Problem:
    """A net in float64 and its data. `tests` are query batches of several sizes and sequence lengths."""

    net: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    train: Batch
    tests: tuple[Batch, ...]

    def model(self, **options: Any) -> InfluenceModel:
        return InfluenceModel(self.net, self.loss_fn, progress=False, **options)


def plain(N: int = 29) -> Problem:
    """One position an example; a bias in one layer only."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()

    def data(N: int) -> Batch:
        return Batch(args=(torch.randn(N, 4, dtype=F64),), targets=torch.randint(3, (N,)))

    return Problem(net, cross_entropy, data(N), (data(2), data(1), data(4)))


def tokens(N: int = 29) -> Problem:
    """A loss per position; padding holds data that would show; sequences of several lengths."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()

    def data(N: int, T: int) -> Batch:
        x, targets = torch.randn(N, T, 4, dtype=F64), torch.randint(3, (N, T))
        return Batch(args=(x,), targets=targets, mask=torch.arange(T) < torch.randint(1, T + 1, (N, 1)))

    return Problem(net, cross_entropy, data(N, 4), (data(2, 5), data(3, 1), data(4, 2)))


def pooled(N: int = 29) -> Problem:
    """Layers of T positions, of 2 T (used twice) and of one; weights on the examples."""
    torch.manual_seed(3)
    net = Pooled().double()

    def data(N: int, T: int) -> Batch:
        mask = torch.arange(T) < torch.randint(1, T + 1, (N, 1))
        inputs = {"x": torch.randn(N, T, 4, dtype=F64), "mask": mask}
        return Batch(kwargs=inputs, targets=torch.randint(3, (N,)), mask=mask, weights=torch.rand(N, dtype=F64) + 0.5)

    return Problem(net, cross_entropy, data(N, 3), (data(1, 4), data(3, 1)))


PROBLEMS = {"plain": plain, "tokens": tokens, "pooled": pooled}


def rows(batch: Batch, at: Any) -> Batch:
    """The examples `at` of a batch."""

    def pick(x: Any) -> Any:
        return None if x is None else x[at]

    return replace(
        batch,
        args=tuple(map(pick, batch.args)),
        kwargs={key: pick(x) for key, x in batch.kwargs.items()},
        targets=pick(batch.targets),
        mask=pick(batch.mask),
        weights=pick(batch.weights),
    )


def batches(batch: Batch, size: int) -> list[Batch]:
    return [rows(batch, slice(start, start + size)) for start in range(0, batch.size, size)]


# --- the definitions ---------------------------------------------------------------------------------------------


def losses(model: InfluenceModel, batch: Batch, outputs: Any) -> Tensor:
    """(N,): weighted, masked, summed over positions."""
    value = model.loss_fn(outputs, batch.targets)
    if value.dim() == 2:
        value = (value if batch.mask is None else torch.where(batch.mask, value, 0)).sum(1)
    return value if batch.weights is None else value * batch.weights


def call(model: InfluenceModel, batch: Batch, parameters: dict[str, Tensor]) -> Any:
    return torch.func.functional_call(model.net, parameters, batch.args, dict(batch.kwargs))


def gradients(model: InfluenceModel, batch: Batch, parameters: dict[str, Tensor] | None = None) -> Vectors:
    """Per-example gradients, layer name -> (N,O,I'): weights, then the bias as last column."""
    own = parameters or {name: p.detach() for name, p in model.net.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: losses(model, batch, call(model, batch, p)))(own)
    result = {}
    for name in model.layers:
        weight, bias = (jacobian.get(f"{name}.{key}" if name else key) for key in ("weight", "bias"))
        result[name] = (weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], dim=-1)).detach()
    return result


def layer_tokens(model: InfluenceModel, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> inputs (M,I'), with the 1 of a bias, and deltas (M,O) of all real positions of all uses."""
    uses: list[tuple[str, Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: uses.append((name, args[0], output)))
        for name, module in model.net.named_modules()
        if name in model.layers
    ]
    outputs = model.net(*batch.args, **batch.kwargs)
    for handle in handles:
        handle.remove()
    deltas = torch.autograd.grad(losses(model, batch, outputs).sum(), [output for _, _, output in uses])
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in model.layers}
    for (name, x, _), d in zip(uses, deltas, strict=True):
        real = batch.mask if batch.mask is not None and x.dim() == 3 else torch.ones(x.shape[:-1], dtype=torch.bool)
        x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1) if model.layers[name].bias else x
        found[name].append((x[real].detach(), d[real]))
    return {name: (torch.cat([x for x, _ in own]), torch.cat([d for _, d in own])) for name, own in found.items()}


def factors(model: InfluenceModel, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> A, the mean of a a^T over real positions, and G, the sum of delta delta^T a position over N."""
    own = layer_tokens(model, batch)
    return {name: (x.T @ x / len(x), d.T @ d / batch.size) for name, (x, d) in own.items()}


def flat(V: Vectors) -> Tensor:
    """Layer name -> (Q,O,I') as (Q,p): layer after layer, each row by row."""
    return torch.cat([v.double().flatten(1) for v in V.values()], dim=1)


def random_vectors(model: InfluenceModel, Q: int = 4) -> Vectors:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(Q, *layer.shape, generator=generator, dtype=F64).to(model.dtype)
        for name, layer in model.layers.items()
    }


def by_name(model: InfluenceModel, theta: Tensor) -> dict[str, Tensor]:
    """A flat (p,) taken apart into the net's parameters."""
    parameters = {}
    for name, layer in model.layers.items():
        O, I = layer.shape
        matrix, theta = theta[: O * I].view(O, I), theta[O * I :]
        parameters[f"{name}.weight"] = matrix[:, :-1] if layer.bias else matrix
        if layer.bias:
            parameters[f"{name}.bias"] = matrix[:, -1]
    return parameters


def theta(model: InfluenceModel) -> Tensor:
    own = dict(model.net.named_parameters())
    parts = []
    for name, layer in model.layers.items():
        weight = own[f"{name}.weight"].detach()
        bias = [own[f"{name}.bias"].detach().unsqueeze(1)] if layer.bias else []
        parts.append(torch.cat([weight, *bias], dim=1).flatten())
    return torch.cat(parts)


def second_derivative(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.func.jacrev(torch.func.jacrev(f))


def hessian(model: InfluenceModel, batch: Batch) -> Tensor:
    def mean_loss(theta: Tensor) -> Tensor:
        return losses(model, batch, call(model, batch, by_name(model, theta))).mean()

    return second_derivative(mean_loss)(theta(model))


def gauss_newton(model: InfluenceModel, batch: Batch) -> Tensor:
    """mean_n J_n^T H_n J_n over outputs, example by example."""
    total = torch.zeros(model.nb_params, model.nb_params, dtype=F64)
    for n in range(batch.size):
        one = rows(batch, slice(n, n + 1))

        def outputs(theta: Tensor, one: Batch = one) -> Tensor:
            return call(model, one, by_name(model, theta))

        def loss(outputs: Tensor, one: Batch = one) -> Tensor:
            return losses(model, one, outputs).sum()

        at = outputs(theta(model))
        J = torch.func.jacrev(outputs)(theta(model)).reshape(at.numel(), -1)
        H = second_derivative(loss)(at).reshape(at.numel(), at.numel())
        total += J.T @ H @ J
    return total / batch.size


def fisher(model: InfluenceModel, batch: Batch) -> Tensor:
    g = flat(gradients(model, batch))
    return g.T @ g / batch.size


def kfac(model: InfluenceModel, batch: Batch, damping: float = 0.0, split: str = "none") -> Tensor:
    """The layers' blocks G (x) A, with damped factors for split "pi" and "even"."""
    blocks = []
    for A, G in factors(model, batch).values():
        pi = {
            "pi": ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5,
            "even": 1.0,
        }.get(split)
        if pi is not None:
            A = A + pi * damping**0.5 * torch.eye(len(A), dtype=F64)
            G = G + damping**0.5 / pi * torch.eye(len(G), dtype=F64)
        block = torch.kron(G, A)
        blocks.append(block if pi is not None else block + damping * torch.eye(len(block), dtype=F64))
    return torch.block_diag(*blocks)


def ekfac(model: InfluenceModel, batch: Batch) -> Tensor:
    """The layers' blocks Q diag(mean_n (Q^T g_n)^2) Q^T, Q = U_G (x) U_A the eigenvectors of G (x) A."""
    g = gradients(model, batch)
    blocks = []
    for name, (A, G) in factors(model, batch).items():
        Q = torch.kron(torch.linalg.eigh(G).eigenvectors, torch.linalg.eigh(A).eigenvectors)
        blocks.append(Q * (g[name].flatten(1) @ Q).square().mean(0) @ Q.T)
    return torch.block_diag(*blocks)


def within_blocks(structure: Any, F: Callable[[InfluenceModel, Batch], Tensor]) -> Callable[..., Tensor]:
    """F with zeros between the blocks of a structure; `structure` as the methods take it."""

    def masked(model: InfluenceModel, batch: Batch) -> Tensor:
        owner = {name: torch.full((1, *layer.shape), -1, dtype=F64) for name, layer in model.layers.items()}
        for i, own in enumerate(make_blocks(model, structure).values()):
            for name, columns in own.items():
                owner[name][..., columns] = i
        number = flat(owner)[0]
        return torch.where(number[:, None] == number, F(model, batch), 0.0)

    return masked


@dataclass(frozen=True)
class Method:
    """An IHVP class with its options, and the dense curvature F that it stands for."""

    cls: type[ihvp.IHVP]
    F: Callable[[InfluenceModel, Batch], Tensor]
    options: dict[str, Any]
    split: str | None = None

    def __call__(self, model: InfluenceModel, loader: Iterable[Any] | None = None, **options: Any) -> Any:
        return self.cls(model, loader, **{**self.options, **options})

    def damped(self, model: InfluenceModel, batch: Batch, damping: float) -> Tensor:
        if self.split in ("pi", "even"):
            return kfac(model, batch, damping, self.split)
        F = self.F(model, batch)
        return F + damping * torch.eye(len(F), dtype=F64)


METHODS = {
    "identity": Method(ihvp.IdentityIHVP, lambda model, batch: torch.eye(model.nb_params, dtype=F64), {}),
    "diagonal": Method(ihvp.DiagonalIHVP, lambda model, batch: fisher(model, batch).diagonal().diag(), {}),
    "fisher": Method(ihvp.FisherIHVP, fisher, {}),
    "kfac pi": Method(ihvp.KFACIHVP, kfac, {"split": "pi"}, "pi"),
    "kfac even": Method(ihvp.KFACIHVP, kfac, {"split": "even"}, "even"),
    "kfac none": Method(ihvp.KFACIHVP, kfac, {"split": "none"}, "none"),
    "ekfac": Method(ihvp.EKFACIHVP, ekfac, {}),
    "ekfac uncorrected": Method(ihvp.EKFACIHVP, kfac, {"update_eigen": False}),
    "hessian": Method(ihvp.ExactIHVP, hessian, {}),
    "gauss_newton": Method(ihvp.ExactIHVP, gauss_newton, {"curvature": "gauss_newton"}),
    "fisher matrix": Method(ihvp.ExactIHVP, fisher, {"curvature": "fisher"}),
    "hessian by layer": Method(ihvp.ExactIHVP, within_blocks("layer", hessian), {"block_structure": "layer"}),
    "gauss_newton by parameter": Method(
        ihvp.ExactIHVP,
        within_blocks("parameter", gauss_newton),
        {"curvature": "gauss_newton", "block_structure": "parameter"},
    ),
    "fisher by parameter": Method(
        ihvp.FisherIHVP, within_blocks("parameter", fisher), {"block_structure": "parameter"}
    ),
}


def dense_scores(damped: Tensor, queries: Tensor, train: Tensor) -> Tensor:
    """(Q,N): g_q^T (F + damping I)^-1 g_n."""
    return queries @ torch.linalg.solve(damped, train.T)
