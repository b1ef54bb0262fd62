"""Convolutions: a convolution is a linear layer of its patches, so every method says the same of both."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ihvp import Batch, CgIHVP, ExactIHVP, FirstOrderInfluenceCalculator, InfluenceModel
from nets import F64, METHODS, assert_near, cross_entropy, flat, second_derivative
from torch import Tensor, nn

DAMPING = 0.3
CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FUNCTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class AsLinear(nn.Module):
    """The same layer on patches that a convolution with unit vectors as kernels has cut out."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        weight = own.weight.detach()
        self.inner = nn.Linear(weight[0].numel(), len(weight), bias=own.bias is not None).double()
        with torch.no_grad():
            self.inner.weight.copy_(weight.flatten(1))
            if own.bias is not None:
                self.inner.bias.copy_(own.bias)
        self.own = copy.deepcopy(own).requires_grad_(False)
        self.units = torch.eye(weight[0].numel(), dtype=F64).view(-1, *weight.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        own, dims = self.own, x.dim() - 2
        padding = own.padding
        if own.padding_mode != "zeros":
            x = F.pad(x, own._reversed_padding_repeated_twice, mode=own.padding_mode)
            padding = 0
        cut = FUNCTION[dims](x, self.units, None, own.stride, padding, own.dilation)
        y = self.inner(cut.flatten(2).mT).mT
        return y.unflatten(2, cut.shape[2:])


class Net(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = first, second, nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).tanh()).tanh()
        return self.head(h.flatten(2).sum(2))


OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "line": (1, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}),
    "line, no bias": (1, {"kernel_size": 2, "bias": False}),
    "plane": (2, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "plane, same": (2, {"kernel_size": (2, 3), "padding": "same", "dilation": (3, 1)}),
    "plane, valid": (2, {"kernel_size": 2, "padding": "valid"}),
    "plane, circular": (2, {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"}),
    "plane, reflected and the same": (2, {"kernel_size": (3, 2), "padding": "same", "padding_mode": "reflect"}),
    "plane of points": (2, {"kernel_size": 1}),
    "space": (3, {"kernel_size": (2, 1, 3), "stride": (1, 2, 1), "padding": (1, 0, 1), "bias": False}),
}
SIDES = {1: (9,), 2: (6, 7), 3: (3, 4, 3)}


def problem(name: str) -> tuple[Net, Net, Batch, list[Batch]]:
    """A net of convolutions, its twin of linear layers, training data and queries."""
    torch.manual_seed(8)
    dims, options = OPTIONS[name]
    first = CONVOLUTION[dims](2, 4, **options).double()
    second = CONVOLUTION[dims](4, 3, kernel_size=2).double()
    net = Net(first, second)
    twin = Net(AsLinear(first), AsLinear(second))
    twin.head = copy.deepcopy(net.head)

    def data(N: int) -> Batch:
        x = torch.randn(N, 2, *SIDES[dims], dtype=F64)
        return Batch(args=(x,), targets=torch.randint(3, (N,)), weights=torch.rand(N, dtype=F64) + 0.5)

    return net, twin, data(9), [data(2), data(1)]


TWINS = {"first": "first.inner", "second": "second.inner", "head": "head"}


def made(net: Net, train: list[Batch], method: str, layers: Any) -> FirstOrderInfluenceCalculator:
    model = InfluenceModel(net, cross_entropy, layers=layers, progress=False)
    return FirstOrderInfluenceCalculator(model, train, METHODS[method](model, train, damping=DAMPING), "theta")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("method", ["identity", "ekfac", "kfac pi", "fisher", "hessian"])
def test_a_convolution_is_a_linear_layer_of_its_patches(method: str, name: str) -> None:
    net, twin, data, tests = problem(name)
    assert torch.allclose(net(data.args[0]), twin(data.args[0]), atol=1e-12)
    own = made(net, [data], method, None)
    other = made(twin, [data], method, list(TWINS.values()))
    assert list(own.model.layers) == list(TWINS)
    assert_near(own.scores(tests), other.scores(tests))
    assert_near(own.self_scores(), other.self_scores())
    got, want = own.curvature.compute_ihvp(tests), other.curvature.compute_ihvp(tests)
    assert_near(flat(got), flat({key: want[key] for key in TWINS.values()}))


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    net, twin, data, tests = problem("plane")
    own, other = (made(n, [data], method, names) for n, names in ((net, None), (twin, list(TWINS.values()))))
    assert_near(own.scores(tests), other.scores(tests))
    assert_near(own.self_scores(), other.self_scores())
    V = own.curvature.compute_ihvp(tests)
    moved = {TWINS[key]: x for key, x in V.items()}
    assert_near(flat(own.curvature.multiply(V)), flat(other.curvature.multiply(moved)))


def test_parameters_there_and_back() -> None:
    net, _, _, _ = problem("space")
    for layer in InfluenceModel(net, cross_entropy).layers.values():
        matrix = layer.matrix()
        assert tuple(matrix.shape) == layer.shape
        parts = layer.split(matrix)
        assert set(parts) == set(layer.parameters())
        for key, p in layer.parameters().items():
            assert torch.equal(parts[key], p)
            assert parts[key].untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr(), "a view"


def test_a_weight_shared_by_two_convolutions_is_cut_by_each_ones_own_options() -> None:
    """One layer, whose positions are those of both."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near = nn.Conv2d(2, 3, 2, stride=2)
            self.far = nn.Conv2d(2, 3, 2, dilation=2, padding=1)
            self.far.weight, self.far.bias = self.near.weight, self.near.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.near(x).tanh().flatten(2).sum(2) + self.far(x).sin().flatten(2).sum(2)

    torch.manual_seed(0)
    net = Shared().double()
    x, y = torch.randn(6, 2, 4, 5, dtype=F64), torch.randint(3, (6,))
    model = InfluenceModel(net, cross_entropy, progress=False)
    assert list(model.layers) == ["near"]
    calculator = FirstOrderInfluenceCalculator(model, [(x, y)], METHODS["identity"](model, damping=0.0))
    own = {key: p.detach() for key, p in net.named_parameters()}

    def losses(p: dict[str, Tensor]) -> Tensor:
        tied = p | {"far.weight": p["near.weight"], "far.bias": p["near.bias"]}
        return cross_entropy(torch.func.functional_call(net, tied, (x,)), y)

    g = torch.func.jacrev(losses)(own)
    whole = torch.cat([g["near.weight"].flatten(1), g["near.bias"]], dim=1)
    assert_near(calculator.scores([(x, y)]), whole @ whole.T)


def test_float32_and_channels_last() -> None:
    net, _, data, tests = problem("plane")
    want = made(net, [data], "ekfac", None).scores(tests)
    narrow = copy.deepcopy(net).float().to(memory_format=torch.channels_last)

    def float32(batch: Batch) -> Batch:
        return batch.map(
            lambda x: (
                x.float().contiguous(memory_format=torch.channels_last)
                if x.dim() == 4
                else x.float()
                if x.is_floating_point()
                else x
            )
        )

    got = made(narrow, [float32(data)], "ekfac", None).scores([float32(batch) for batch in tests])
    assert got.dtype == torch.float32
    assert_near(got, want, 1e-4)


# --- groups ------------------------------------------------------------------------------------------------------


class Apart(nn.Module):
    """A convolution of groups as one without for each group, under names whose order is the groups'."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        cls, width = type(own), own.out_channels // own.groups
        options = {key: getattr(own, key) for key in ("stride", "padding", "dilation", "padding_mode")}
        for j in range(own.groups):
            part = cls(own.in_channels // own.groups, width, own.kernel_size, bias=own.bias is not None, **options)
            with torch.no_grad():
                part.weight.copy_(own.weight[j * width : (j + 1) * width])
                if own.bias is not None:
                    part.bias.copy_(own.bias[j * width : (j + 1) * width])
            self.add_module(str(j), part.double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [part(own) for part, own in zip(self.children(), x.chunk(len(self._modules), 1), strict=True)], 1
        )


GROUPED = {
    "line of two groups": nn.Conv1d(4, 6, 3, stride=2, groups=2, padding=1),
    "plane, each channel its own": nn.Conv2d(3, 6, 2, groups=3, bias=False, padding_mode="circular", padding=1),
    "space": nn.Conv3d(4, 2, (2, 1, 3), groups=2, dilation=(1, 2, 1)),
}


class Grouped(nn.Module):
    def __init__(self, own: nn.Module, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.own, self.head = own, nn.Linear(outputs, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.own(x).tanh().flatten(2).sum(2))


def grouped(name: str) -> tuple[Grouped, Grouped, Batch]:
    torch.manual_seed(2)
    own = copy.deepcopy(GROUPED[name]).double()
    x = torch.randn(7, own.in_channels, *SIDES[own.weight.dim() - 2], dtype=F64)
    nets = Grouped(own, own.out_channels), Grouped(Apart(own), own.out_channels)
    return *nets, Batch(args=(x,), targets=torch.randint(3, (7,)))


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("method", [method for method in METHODS if "parameter" not in method])
def test_each_group_is_a_layer_of_its_own(method: str, name: str) -> None:
    *nets, data = grouped(name)
    assert torch.allclose(nets[0](data.args[0]), nets[1](data.args[0]), atol=1e-12)
    found = []
    for net in nets:
        calculator = made(net, [data], method, None)
        V = calculator.curvature.compute_ihvp([data])
        multiplied = calculator.curvature.multiply(V)
        plainly = FirstOrderInfluenceCalculator(calculator.model, [data], calculator.curvature)
        found.append(
            (
                calculator.scores([data]),
                calculator.self_scores(),
                flat(V),
                flat(multiplied),
                plainly.perturbation([data]),
            )
        )
        names = list(calculator.model.layers)
    assert names == [f"own.{j}" for j in range(nets[0].own.groups)] + ["head"]
    for got, want in zip(*found, strict=True):
        assert_near(got, want)
    model = InfluenceModel(nets[0], cross_entropy, progress=False)
    assert list(model.layers) == [f"own/{j}" for j in range(nets[0].own.groups)] + ["head"]
    assert model.nb_params == sum(p.numel() for p in nets[0].parameters())


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "fisher"])
def test_products_and_blocks_of_groups(curvature: str, name: str) -> None:
    """Iterative methods, whose blocks may hold some groups of a parameter, and blocks of every structure."""
    *nets, data = grouped(name)
    count = nets[0].own.groups
    split = {"first": ["own/0", "head"], "rest": [f"own/{j}" for j in range(1, count)]}
    other = {"first": ["own.0", "head"], "rest": [f"own.{j}" for j in range(1, count)]}
    structures = {"full": ("full", "full"), "layer": ("layer", "layer"), "some": (split, other)}
    for structure in structures.values():
        found = []
        for net, blocks in zip(nets, structure, strict=True):
            model = InfluenceModel(net, cross_entropy, progress=False)
            exact = ExactIHVP(model, [data], 20.0, curvature, block_structure=blocks)
            cg = CgIHVP(model, [data], 20.0, curvature=curvature, block_structure=blocks, rtol=1e-12, atol=1e-12)
            found.append(tuple(flat(own.compute_ihvp([data])) for own in (exact, cg)))
        (exact, cg), (want, _) = found
        assert_near(exact, want)
        assert_near(cg, want, 1e-9)


@pytest.mark.parametrize("name", GROUPED)
def test_a_parameter_of_groups_is_one_block(name: str) -> None:
    net, _, data = grouped(name)
    model = InfluenceModel(net, cross_entropy, progress=False)
    exact = ExactIHVP(model, [data], 2.0, block_structure="parameter")
    own = dict(net.named_parameters())
    assert list(exact.blocks) == [key for key in own]
    for key, p in own.items():

        def loss(x: Tensor, key: str = key) -> Tensor:
            outputs = torch.func.functional_call(net, {key: x}, data.args)
            return cross_entropy(outputs, data.targets).mean()

        hessian = second_derivative(loss)(p.detach()).reshape(p.numel(), p.numel())
        assert_near(exact.state_dict()[f"{key}/matrix"], hessian.detach())
    with pytest.raises(ValueError, match=r"parameter 'own\.weight' is in two blocks: 'a' and 'b'"):
        ExactIHVP(model, [data], block_structure={"a": ["own/0"], "b": ["own.weight"]})
    with pytest.raises(ValueError, match=r"every tracked parameter must be in a block; 'own\.weight'"):
        ExactIHVP(model, [data], block_structure={"a": ["own/0", "head"]})


def test_groups_there_and_back() -> None:
    net, _, _ = grouped("line of two groups")
    model = InfluenceModel(net, cross_entropy, progress=False)
    own = dict(net.named_parameters())
    several = {key: torch.randn(5, *p.shape, dtype=F64) for key, p in own.items()}
    V = {name: layer.join(several) for name, layer in model.layers.items()}
    assert {name: x.shape for name, x in V.items()} == {n: (5, *layer.shape) for n, layer in model.layers.items()}
    for key, x in model.split(V).items():
        assert torch.equal(x, several[key])


# --- errors ------------------------------------------------------------------------------------------------------


def test_an_image_without_its_batch_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(1))
    model = InfluenceModel(net, lambda outputs, targets: outputs.sum(1)[: len(targets)], progress=False)
    calculator = FirstOrderInfluenceCalculator(model, None, METHODS["identity"](model, damping=0.0))
    with pytest.raises(ValueError, match=r"expected \(N, channels, 2 dimensions\), got \(2, 5, 5\)"):
        calculator.self_scores([(torch.randn(2, 5, 5), torch.zeros(2))])
