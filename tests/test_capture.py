"""The one loop with hooks: what reaches the sink, what is run for it, and that the net stays as it was."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from ihvp import Batch, InfluenceModel
from ihvp.capture import capture
from nets import F64, Vectors, assert_near, chain, cross_entropy, gradients, losses, pooled, squared_error, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

N = 5


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def captured(model: InfluenceModel, batch: Batch) -> Vectors:
    """Per-example gradients from what the sink is handed, each layer once."""
    g: Vectors = {}

    def sink(layer: Any, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        assert layer.name not in g
        assert a.shape[:2] == delta.shape[:2] and not a.requires_grad and not delta.requires_grad
        if mask is not None:
            assert mask.shape == a.shape[:2] and mask.dtype == torch.bool
            a, delta = (x.masked_fill(~mask.unsqueeze(-1), 0) for x in (a, delta))
        if layer.bias:
            real = torch.ones(a.shape[:2]) if mask is None else mask
            a = torch.cat([a, real.to(a.dtype).unsqueeze(-1)], dim=-1)
        g[layer.name] = torch.einsum("nto,nti->noi", delta, a)

    capture(model, batch, sink)
    return g


def ignore(layer: Any, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
    pass


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


# --- nets --------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """One layer used three times, with another between: not in the order of the net."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.step, self.side = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.step(x).tanh()
        return self.out(self.step(self.side(self.step(h).tanh())).sin())


class Twins(nn.Module):
    """Two modules with the same Parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Joined(nn.Module):
    """Two arguments that meet, called by keyword inside; an output dict; a branch that does not reach the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left: Tensor, right: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        h = self.left(input=left) * scale.unsqueeze(-1)
        self.right(right + 1)
        return {"logits": h + self.right(right).relu()}


def logits_loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return cross_entropy(outputs["logits"], targets)


def frozen(net: nn.Module) -> nn.Module:
    for p in net.parameters():
        p.requires_grad_(False)
    return net


def mean_of_positions(outputs: Tensor, targets: Tensor) -> Tensor:
    """One loss an example, from all its positions."""
    return (outputs.flatten(1).mean(1) - targets).square()


def image_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs.flatten(1, -2), targets)


@dataclass(frozen=True)
class Case:
    net: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss_fn: Callable[[Any, Any], Tensor] = cross_entropy
    options: dict[str, Any] = field(default_factory=dict)


def labels(*shape: int) -> Tensor:
    return torch.randint(3, shape)


def mask(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.4


CASES = {
    "(N,I)": Case(lambda: chain(4, 5, 3), lambda: (x(N, 4), labels(N))),
    "(N,I) without bias": Case(lambda: chain(4, 5, 3, bias=False), lambda: (x(N, 4), labels(N))),
    "(N,T,I)": Case(lambda: chain(4, 5, 3), lambda: (x(N, 6, 4), labels(N, 6))),
    "(N,T,I) without bias": Case(lambda: chain(4, 5, 3, bias=False), lambda: (x(N, 6, 4), labels(N, 6))),
    "(N,T1,T2,I)": Case(lambda: chain(4, 5, 3), lambda: (x(N, 2, 3, 4), labels(N, 6)), image_loss),
    "(N,T1,T2,I) strided": Case(
        lambda: chain(4, 5, 3), lambda: (x(N, 4, 2, 3).permute(0, 2, 3, 1), labels(N, 6)), image_loss
    ),
    "one example": Case(lambda: chain(4, 5, 3), lambda: (x(1, 6, 4), labels(1, 6))),
    "only the layer": Case(lambda: nn.Linear(4, 3), lambda: (x(N, 4), labels(N))),
    "one loss an example of positions": Case(lambda: chain(4, 5, 3), lambda: (x(N, 6, 4), x(N)), mean_of_positions),
    "mask": Case(lambda: chain(4, 5, 3), lambda: Batch(args=(x(N, 6, 4),), targets=labels(N, 6), mask=mask(N, 6))),
    "mask of numbers": Case(
        lambda: chain(4, 5, 3), lambda: Batch(args=(x(N, 6, 4),), targets=labels(N, 6), mask=mask(N, 6).long())
    ),
    "mask of (N,T1,T2,I)": Case(
        lambda: chain(4, 5, 3),
        lambda: Batch(args=(x(N, 2, 3, 4),), targets=labels(N, 6), mask=mask(N, 6)),
        image_loss,
    ),
    "mask of one position": Case(
        lambda: chain(4, 5, 3),
        lambda: Batch(args=(x(4, 1, 4),), targets=labels(4, 1), mask=torch.tensor([[1], [0], [1], [0]])),
    ),
    "weights": Case(
        lambda: chain(4, 5, 3), lambda: Batch(args=(x(N, 4),), targets=labels(N), weights=torch.rand(N, dtype=F64))
    ),
    "weights and mask": Case(
        lambda: chain(4, 5, 3),
        lambda: Batch(args=(x(N, 6, 4),), targets=labels(N, 6), mask=mask(N, 6), weights=torch.rand(N, dtype=F64)),
    ),
    "ignored targets": Case(lambda: chain(4, 5, 3), lambda: (x(N, 6, 4), torch.where(mask(N, 6), labels(N, 6), -100))),
    "regression": Case(lambda: chain(4, 5, 3), lambda: (x(N, 6, 4), x(N, 6, 3)), squared_error),
    "layer used three times": Case(Recurrent, lambda: (x(N, 4), labels(N))),
    "layer used three times, (N,T,I)": Case(Recurrent, lambda: (x(N, 6, 4), labels(N, 6))),
    "layer used three times, mask": Case(
        Recurrent, lambda: Batch(args=(x(N, 6, 4),), targets=labels(N, 6), mask=mask(N, 6))
    ),
    "modules with the same parameters": Case(Twins, lambda: (x(N, 6, 4), labels(N, 6))),
    "args, kwargs, dicts": Case(
        Joined,
        lambda: Batch(args=(x(N, 4), x(N, 2)), kwargs={"scale": torch.rand(N, dtype=F64)}, targets=labels(N)),
        logits_loss,
    ),
    "inputs as a dict": Case(
        Joined, lambda: ({"left": x(N, 4), "right": x(N, 2), "scale": x(N)}, labels(N)), logits_loss
    ),
    "process_batch": Case(
        lambda: chain(4, 5, 3),
        lambda: {"pixels": x(N, 4), "label": labels(N), "note": "what a loader yields"},
        options={"process_batch": lambda raw: (raw["pixels"], raw["label"])},
    ),
    "process_batch to a Batch": Case(
        lambda: chain(4, 5, 3),
        lambda: [x(N, 6, 4), labels(N, 6), mask(N, 6)],
        options={"process_batch": lambda raw: Batch(args=(raw[0],), targets=raw[1], mask=raw[2])},
    ),
    "frozen parameters": Case(lambda: frozen(chain(4, 5, 3)), lambda: (x(N, 4), labels(N))),
    "first layer frozen": Case(
        lambda: nn.Sequential(frozen(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), lambda: (x(N, 4), labels(N))
    ),
    "train mode": Case(lambda: chain(4, 5, 3, between=nn.Dropout).train(), lambda: (x(N, 4), labels(N))),
    "eval mode": Case(lambda: chain(4, 5, 3, between=nn.Dropout).eval(), lambda: (x(N, 4), labels(N))),
    "in-place ReLU": Case(
        lambda: chain(4, 5, 5, 3, between=lambda: nn.ReLU(inplace=True)), lambda: (x(N, 4), labels(N))
    ),
    "in-place ReLU, (N,T,I)": Case(
        lambda: chain(4, 5, 5, 3, between=lambda: nn.ReLU(inplace=True)), lambda: (x(N, 6, 4), labels(N, 6))
    ),
    "in-place ReLU without bias, (N,T,I)": Case(
        lambda: chain(4, 5, 5, 3, bias=False, between=lambda: nn.ReLU(inplace=True)),
        lambda: (x(N, 6, 4), labels(N, 6)),
    ),
    "from a layer": Case(
        lambda: chain(4, 5, 5, 3), lambda: (x(N, 6, 4), labels(N, 6)), options={"start_layer": 1, "last_layer": 1}
    ),
    "to a layer": Case(lambda: chain(4, 5, 5, 3), lambda: (x(N, 4), labels(N)), options={"last_layer": "2"}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_torch_func(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = InfluenceModel(case.net().double(), case.loss_fn, **case.options)
    batch = model.batch(case.batch())
    torch.manual_seed(1)  # the masks of dropout
    want = gradients(model, batch)
    torch.manual_seed(1)
    got = captured(model, batch)
    assert got.keys() == want.keys()
    for layer, g in got.items():
        assert g.shape == (batch.size, *model.layers[layer].shape)
        assert_near(g, want[layer])


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_caller_may_have_switched_gradients_off(caller: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    problem = tokens()
    model, batch = problem.model(), problem.train
    want = gradients(model, batch)
    with caller():
        got = captured(model, batch)
    for name in want:
        assert_near(got[name], want[name])


def test_batches_may_be_made_in_inference_mode() -> None:
    """A DataLoader read in inference mode stacks its batches there."""
    net = chain(4, 5, 3).double()
    model = InfluenceModel(net, cross_entropy, progress=False)
    inputs, targets = x(N, 4), labels(N)
    want = gradients(model, Batch(args=(inputs,), targets=targets))
    with torch.inference_mode():
        (got,) = [
            captured(model, batch) for _, batch in model.passes(DataLoader(TensorDataset(inputs, targets), N), "")
        ]
    for name in want:
        assert_near(got[name], want[name])


class Wanting(nn.Module):
    """What fine-tuning with checkpoints does to embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach().requires_grad_()


def test_gradients_of_inputs_do_not_matter() -> None:
    """Inputs that the caller, or the net itself, wants gradients of."""
    net = chain(4, 5, 3).double()
    inputs, targets = x(N, 4), labels(N)
    want = gradients(InfluenceModel(net, cross_entropy), Batch(args=(inputs,), targets=targets))
    inputs.requires_grad_()
    got = captured(InfluenceModel(net, cross_entropy), Batch(args=(inputs,), targets=targets))
    inside = captured(
        InfluenceModel(nn.Sequential(Wanting(), *net), cross_entropy), Batch(args=(inputs,), targets=targets)
    )
    assert inputs.grad is None and inputs.requires_grad
    for g in (got, inside):
        assert len(g) == len(want)
        for a, b in zip(sorted(g), sorted(want), strict=True):
            assert_near(g[a], want[b])


def test_a_mask_of_one_position_leaves_out_examples_of_a_plain_net() -> None:
    """(N,1): T is 1 where layers have one position an example."""
    model = InfluenceModel(chain(4, 5, 3).double(), cross_entropy)
    batch = Batch(args=(x(N, 4),), targets=labels(N))
    kept = torch.tensor([1, 0, 1, 1, 0])
    want = gradients(model, batch)
    seen: dict[str, Tensor] = {}
    masked = Batch(args=batch.args, targets=batch.targets, mask=kept.unsqueeze(1))
    capture(model, masked, lambda layer, a, delta, mask: seen.update({layer.name: mask}))
    assert all(mask is not None and torch.equal(mask[:, 0], kept.bool()) for mask in seen.values())
    for name, g in captured(model, masked).items():
        assert_near(g, want[name] * kept.view(-1, 1, 1))
    assert_near(capture(model, masked, ignore), capture(model, batch, ignore) * kept)


class Point(NamedTuple):
    left: Tensor
    right: Tensor


class Containers(nn.Module):
    """A net that asks what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, point: Point, parts: list[Tensor]) -> Tensor:
        assert type(parts) is list
        return self.inner(point.left + point.right) + sum(parts)


def test_containers_arrive_as_they_were() -> None:
    model = InfluenceModel(Containers().double(), lambda outputs, point: squared_error(outputs, point.left))
    point, targets, parts = Point(x(N, 4), x(N, 4)), Point(x(N, 3), x(N, 3)), [x(N, 3), x(N, 3)]
    batch = Batch(args=(point,), kwargs={"parts": parts}, targets=targets)
    want = gradients(model, Batch(args=(point,), kwargs={"parts": parts}, targets=targets))
    assert_near(captured(model, model.batch(batch))["inner"], want["inner"])


def test_losses_come_back() -> None:
    problem = pooled()
    model, batch = problem.model(), problem.train
    got = capture(model, batch, ignore)
    assert_near(got, losses(model, batch, model.net(**batch.kwargs)).detach())
    assert not got.requires_grad


# --- which layers ------------------------------------------------------------------------------------------------


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


# --- the net stays as it was -------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A net whose forward pass changes a buffer, in place or by assigning another tensor, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.register_buffer("calls", torch.zeros(()))
        self.assigns = self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.assigns:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        h = self.first(x)
        if self.fails:
            raise KeyError("net")
        return self.last(self.drop(self.norm(h)))


HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def snapshot(net: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, p in net.named_parameters():
        state[f"{name} requires_grad"], state[f"{name} grad"] = p.requires_grad, p.grad
        state[name] = p.detach().clone()
    for name, b in net.named_buffers():
        state[name] = b.clone()
    for name, module in net.named_modules():
        state[f"{name} training"] = module.training
        state[f"{name} hooks"] = [list(getattr(module, hooks)) for hooks in HOOKS]
        state[f"{name} forward"] = vars(module).get("forward")
    return state


@contextlib.contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    before = snapshot(net)
    yield
    after = snapshot(net)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, f"{key}: {value} became {after[key]}"


def counting(training: bool) -> Counting:
    net = Counting().double().train(training)
    net.norm.eval()
    net.first.bias.requires_grad_(False)
    net.last.weight.grad = torch.ones_like(net.last.weight)
    net.first.register_forward_hook(lambda module, args, output: None)
    return net


def fails(*args: Any) -> Tensor:
    raise KeyError("here")


FAILURES: dict[str, tuple[bool, Any, Any, type[BaseException] | None]] = {
    "nothing": (False, cross_entropy, ignore, None),
    "the net": (True, cross_entropy, ignore, KeyError),
    "the loss": (False, fails, ignore, KeyError),
    "the sink": (False, cross_entropy, fails, KeyError),
    "a scalar loss": (False, lambda outputs, targets: outputs.sum(), ignore, ValueError),
    "a loss that is not finite": (False, lambda outputs, targets: outputs.sum(1) / 0, ignore, FloatingPointError),
    "a loss of something else": (False, lambda outputs, targets: torch.ones(N), ignore, ValueError),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_net_stays_as_it_was_whatever_fails(failure: str) -> None:
    net_fails, loss_fn, sink, error = FAILURES[failure]
    net = counting(training=True)
    net.fails = net_fails
    model = InfluenceModel(net, loss_fn)
    with unchanged(net), contextlib.ExitStack() as stack:
        if error is not None:
            stack.enter_context(pytest.raises(error))
        capture(model, Batch(args=(x(N, 4),), targets=labels(N)), sink)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("assigns", [True, False], ids=["assigned", "in place"])
def test_buffers_stay_as_they_were(assigns: bool, training: bool) -> None:
    net = counting(training)
    net.assigns, buffers = assigns, dict(net.named_buffers())
    with unchanged(net):
        capture(InfluenceModel(net, cross_entropy), Batch(args=(x(N, 4),), targets=labels(N)), ignore)
    assert all(b is buffers[name] for name, b in net.named_buffers())


def test_no_parameter_collects_a_gradient_and_the_next_training_step_is_as_ever() -> None:
    net = chain(4, 5, 3).double()
    inputs, targets = x(N, 4), labels(N)
    want = torch.autograd.grad(cross_entropy(net(inputs), targets).sum(), list(net.parameters()))
    capture(InfluenceModel(net, cross_entropy), Batch(args=(inputs,), targets=targets), ignore)
    assert all(p.grad is None for p in net.parameters())
    cross_entropy(net(inputs), targets).sum().backward()
    for p, g in zip(net.parameters(), want, strict=True):
        assert p.grad is not None and torch.equal(p.grad, g)


def test_batch_normalisation_in_training_mode_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False))
    with unchanged(net), pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) is in training mode.*net\.eval\(\)"):
        capture(InfluenceModel(net, cross_entropy), Batch(args=(torch.randn(N, 4),), targets=labels(N)), ignore)


# --- what is run -------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts matrix products as they are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "mv", "linear", "matmul")
        return func(*args, **(kwargs or {}))


class Fork(nn.Module):
    """Two first layers that meet, and two above them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(4, 5, bias=False)
        self.middle, self.out = nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.left(x).tanh() * self.right(x)).tanh())


# One product for each layer's forward pass, one back to the input of each that is above a first tracked one.
PRODUCTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int]] = {
    "all of three": (lambda: chain(4, 5, 5, 3), {}, 3 + 2),
    "without bias": (lambda: chain(4, 5, 5, 3, bias=False), {}, 3 + 2),
    "the last": (lambda: chain(4, 5, 5, 3), {"start_layer": -1}, 3 + 0),
    "the second": (lambda: chain(4, 5, 5, 3), {"layers": ["2"]}, 3 + 1),
    "two first layers": (Fork, {}, 4 + 2),
}


@pytest.mark.parametrize("T", [None, 6])
@pytest.mark.parametrize("name", PRODUCTS)
def test_no_weight_gradient_product_is_run(name: str, T: int | None) -> None:
    net, options, expected = PRODUCTS[name]
    shape = (N,) if T is None else (N, T)
    model = InfluenceModel(net(), cross_entropy, **options)
    with Products() as products:
        capture(model, Batch(args=(torch.randn(*shape, 4),), targets=labels(*shape)), ignore)
    assert products.count == expected


def test_each_layer_is_handed_over_once_from_the_top_down() -> None:
    order: list[str] = []
    model = InfluenceModel(chain(4, 5, 5, 3), cross_entropy)
    capture(model, Batch(args=(torch.randn(N, 4),), targets=labels(N)), lambda layer, *_: order.append(layer.name))
    assert order == ["4", "2", "0"]


def test_what_was_handed_over_is_let_go() -> None:
    """When the backward pass reaches a layer, inputs and gradients of those above it are free."""
    model = InfluenceModel(chain(4, 5, 5, 3), cross_entropy)
    alive: dict[str, weakref.ref[Any]] = {}

    def sink(layer: Any, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        assert [name for name, storage in alive.items() if storage() is not None] == []
        alive[f"{layer.name} a"] = weakref.ref(a.untyped_storage())
        alive[f"{layer.name} delta"] = weakref.ref(delta.untyped_storage())

    capture(model, Batch(args=(torch.randn(N, 4),), targets=labels(N)), sink)
    assert len(alive) == 6


class Checkpointed(nn.Module):
    """Recomputes the parts named in the backward pass; `counts` are the calls of each part."""

    def __init__(self, parts: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(chain(4, 4, 4) for _ in range(3))
        self.recomputed = parts
        self.counts: Counter[int] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        for i, part in enumerate(self.parts):

            def run(x: Tensor, i: int = i, part: nn.Module = part) -> Tensor:
                self.counts[i] += 1
                return part(x).tanh()

            x = checkpoint(run, x, use_reentrant=False) if i in self.recomputed else run(x)
        return x


@pytest.mark.parametrize("parts", [(1,), (2,), (1, 2), (0,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"start_layer": "parts.1.0"}], ids=["all", "some"])
def test_activation_checkpoints_change_nothing(parts: tuple[int, ...], options: dict[str, Any]) -> None:
    batch = Batch(args=(x(N, 6, 4),), targets=labels(N, 6))
    want = gradients(InfluenceModel(Checkpointed(()).double(), cross_entropy, **options), batch)
    net = Checkpointed(parts).double()
    got = captured(InfluenceModel(net, cross_entropy, **options), batch)
    assert got.keys() == want.keys()
    for name in want:
        assert_near(got[name], want[name])
    first = 1 if options else 0  # what lies before the first tracked layer is not part of the graph
    assert net.counts == {i: 2 if i in parts and i >= first else 1 for i in range(3)}


# --- what is refused ---------------------------------------------------------------------------------------------


class Overwriting(nn.Module):
    """Changes the input of a layer in place after the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.second(h)
        return y + h.mul_(2)


def test_input_changed_in_place_is_refused_by_name() -> None:
    net = Overwriting()
    with unchanged(net), pytest.raises(RuntimeError, match=r"input of layer 'second' was changed in place"):
        capture(InfluenceModel(net, squared_error), Batch(args=(torch.randn(N, 4),), targets=torch.zeros(N, 4)), ignore)


class Routed(nn.Module):
    """Uses one of two layers, as the batch says; a third shields itself from gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.shielded = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, way: int) -> Tensor:
        with torch.no_grad():
            shift = self.shielded(x)
        return (self.one if way == 1 else self.two)(x) + shift


@pytest.mark.parametrize(("way", "reached"), [(1, "one"), (2, "two")])
def test_only_the_layers_that_a_batch_reaches_are_handed_over(way: int, reached: str) -> None:
    model = InfluenceModel(Routed().double(), cross_entropy)
    batch = Batch(args=(x(N, 4), way), targets=labels(N))
    got = captured(model, batch)
    assert list(got) == [reached]
    assert_near(got[reached], gradients(model, batch)[reached])


def test_no_layer_reached_is_refused() -> None:
    model = InfluenceModel(Routed(), cross_entropy, layers=["one"])
    with pytest.raises(ValueError, match="no tracked layer reaches the loss; tracked: 'one'"):
        capture(model, Batch(args=(torch.randn(N, 4), 2), targets=labels(N)), ignore)
