"""Other libraries' signatures give the native objects' values, in those libraries' shapes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ihvp
import pytest
import torch
from guide_case import guide_data, guide_loaders, guide_net
from ihvp.adapters import empirical_if_api, influenciae_api
from ihvp.adapters.influenciae_api import ORDER
from nets import F64, assert_near, cross_entropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LOSS = nn.CrossEntropyLoss(reduction="none")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return guide_net((5, 6, 4, 3), nn.Tanh).double()


def loader(N: int, batch_size: int, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(N, 5, generator=generator, dtype=F64), torch.randint(3, (N,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


TRAIN, TEST = loader(23, 8), loader(5, 3, seed=1)


def tensors(data: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    x, y = data.dataset.tensors
    return x, y


# --- Influenciae -------------------------------------------------------------------------------------------------


def watched() -> influenciae_api.InfluenceModel:
    return influenciae_api.InfluenceModel(mlp(), "hidden", "classifier", LOSS)


def test_layers_of_the_influence_model() -> None:
    net, model = mlp(), influenciae_api.InfluenceModel
    assert list(model(net, "hidden", "classifier", LOSS).layers) == ["hidden", "classifier"]
    assert list(model(net).layers) == ["classifier"]
    assert list(model(net, "hidden").layers) == ["hidden"]
    assert list(model(net, -2, -1).layers) == ["hidden", "classifier"]
    by_position = model(net, "hidden", LOSS)  # (model, target_layer, loss_function)
    assert list(by_position.layers) == ["hidden"] and by_position.loss_fn is LOSS
    assert model(net, "hidden", "classifier").nb_params == 7 * 4 + 5 * 3


def test_process_batch_gives_inputs_labels_and_weights() -> None:
    def process(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs, labels = batch
        return inputs, labels, torch.full(labels.shape, 2.0, dtype=F64)

    twice = influenciae_api.InfluenceModel(mlp(), "classifier", None, LOSS, process)
    once = influenciae_api.InfluenceModel(mlp(), "classifier", None, LOSS, lambda batch: (*batch, None))
    scores = [
        ihvp.FirstOrderInfluenceCalculator(model, TRAIN, ihvp.IdentityIHVP(model)).scores(TEST)
        for model in (twice, once)
    ]
    assert_near(scores[0], 4 * scores[1])


NATIVE: dict[str, Any] = {
    "exact": lambda model: ihvp.ExactIHVP(model, TRAIN, 0.0, rcond=1e-12),
    "cgd": lambda model: ihvp.CgIHVP(model, TRAIN, 0.5, maxiter=100),
    "lissa": lambda model: ihvp.LissaIHVP(model, TRAIN, 0.5, maxiter=100, on_failure="return"),
    "fisher": lambda model: ihvp.FisherIHVP(model, TRAIN, 0.5),
    "kfac": lambda model: ihvp.KFACIHVP(model, TRAIN, 0.5),
    "ekfac": lambda model: ihvp.EKFACIHVP(model, TRAIN, 0.5),
}


@pytest.mark.parametrize("name", ["exact", "fisher", "kfac", "ekfac"])
def test_ihvp_objects_by_name(name: str) -> None:
    model = watched()
    V = {key: torch.randn(2, *layer.shape, dtype=F64) for key, layer in model.layers.items()}
    own = influenciae_api.IHVPFactory(name).build(model, TRAIN)
    native = NATIVE[name](model).with_damping(own.damping)
    for key, x in own.solve(V).items():
        assert_near(x, native.solve(V)[key], 1e-8)
    assert influenciae_api.IHVPS.keys() == NATIVE.keys()


def test_iterative_ihvp_objects_by_name() -> None:
    model = watched()
    cgd, lissa = (influenciae_api.IHVPFactory(name).build(model, TRAIN) for name in ("cgd", "lissa"))
    assert isinstance(cgd, ihvp.CgIHVP) and cgd.maxiter == 100
    assert isinstance(lissa, ihvp.LissaIHVP) and (lissa.maxiter, lissa.damping, lissa.scale) == (100, 1e-4, 10.0)
    with pytest.raises(ValueError, match="must be one of exact, cgd, lissa, fisher, kfac, ekfac, got 'newton'"):
        influenciae_api.IHVPFactory("newton")


def test_spellings_of_the_damping_and_of_pi() -> None:
    model = watched()
    for kind in (influenciae_api.FisherIHVP, influenciae_api.KFACIHVP, influenciae_api.EKFACIHVP):
        assert kind(model, TRAIN, regul=0.25).damping == kind(model, TRAIN, 0.25).damping == 0.25
    assert influenciae_api.KFACIHVP(model, use_pi=False).split == "even"
    assert influenciae_api.KFACIHVP(model).split == "pi"


def test_factors_by_position() -> None:
    model = watched()
    for own, native in (
        (influenciae_api.EKFACIHVP(model, TRAIN), ihvp.EKFACIHVP(model, TRAIN)),
        (influenciae_api.KFACIHVP(model, TRAIN), ihvp.KFACIHVP(model, TRAIN)),
    ):
        for i, (A, G) in own.kfac_blocks.items():
            name = own.layer_info[i]["layer"].name
            assert torch.equal(A, native.kfac_blocks[name][0]) and torch.equal(G, native.kfac_blocks[name][1])
            assert torch.equal(own.evals[i], native.evals[name])
            assert torch.equal(own.evecs[i][0], native.evecs[name][0])
        calculator = influenciae_api.FirstOrderInfluenceCalculator(model, TRAIN, own)
        assert [len(values) for _, values in calculator.compute_influence_values(TRAIN)] == [8, 8, 7]


def test_a_given_hessian() -> None:
    model = watched()
    p = model.nb_params
    H = torch.eye(p, dtype=F64) * 2
    H[0, 0] = 0  # the pseudo-inverse leaves it out
    V = {key: torch.ones(1, *layer.shape, dtype=F64) for key, layer in model.layers.items()}
    solved = influenciae_api.ExactIHVP(model, train_hessian=H).solve(V)
    want = torch.full((4, 7), 0.5, dtype=F64)
    want[0, 0] = 0
    assert_near(solved["hidden"][0], want)


def calculators() -> list[tuple[Any, Any]]:
    """(adapter, native object that must have given its values)."""
    model = watched()
    curvature = ihvp.EKFACIHVP(model, TRAIN, 0.1)
    api = influenciae_api
    last = api.InfluenceModel(model.net, "classifier", LOSS)
    exact = api.ExactIHVP(last, TRAIN)
    others = [watched() for _ in range(2)]
    with torch.no_grad():
        for p in others[1].net.parameters():
            p.mul_(1.1)
    return [
        (
            api.FirstOrderInfluenceCalculator(model, TRAIN, curvature),
            ihvp.FirstOrderInfluenceCalculator(model, TRAIN, curvature),
        ),
        (
            api.FirstOrderInfluenceCalculator(model, TRAIN, curvature, normalize=True),
            ihvp.FirstOrderInfluenceCalculator(model, TRAIN, curvature, normalize=True),
        ),
        (
            api.TracIn(others, [0.1, 0.2]),
            ihvp.TracInCalculator(others[0], TRAIN, [own.net.state_dict() for own in others], [0.1, 0.2]),
        ),
        (api.RepresenterPointL2(model.net, TRAIN, LOSS, 0.1), ihvp.RepresenterPointL2(last, TRAIN, 0.1)),
        (api.RepresenterPointLJE(model, TRAIN), ihvp.RepresenterPointLJE(last, TRAIN, exact)),
        (
            api.ArnoldiInfluenceCalculator(model, TRAIN, 20, True, 4),
            ihvp.FirstOrderInfluenceCalculator(
                model, TRAIN, ihvp.ArnoldiIHVP(model, TRAIN, rank=4, krylov_dimension=20)
            ),
        ),
    ]


def test_values_and_shapes_of_the_calculators() -> None:
    x, _ = tensors(TRAIN)
    for own, native in calculators():
        batches = list(own.compute_influence_values(TRAIN))
        assert [values.shape for _, values in batches] == [(8, 1), (8, 1), (7, 1)]
        assert_near(torch.cat([values for _, values in batches])[:, 0], native.self_scores(TRAIN))
        samples, values = own.compute_top_k_from_training_dataset(TRAIN, 3, ORDER.ASCENDING)
        want, indices = native.compute_top_k_from_training_dataset(TRAIN, 3, ORDER.ASCENDING)
        assert torch.equal(samples, x[indices]) and torch.equal(values, want)

        scores = native.scores(TEST, TRAIN)
        blocks = [
            torch.cat([block for _, block in inner], dim=1)
            for _, inner in own.estimate_influence_values_in_batches(TEST, TRAIN)
        ]
        assert_near(torch.cat(blocks), scores)
        found = list(own.top_k(TEST, TRAIN, k=2, order=ORDER.DESCENDING))
        for ((inputs, labels), values, samples), own_scores in zip(found, scores.split([3, 2]), strict=True):
            assert inputs.shape == (len(labels), 5) and values.shape == (len(labels), 2)
            assert_near(values, own_scores.topk(2).values)
            assert torch.equal(samples, x[own_scores.topk(2).indices])


def test_top_k_of_a_loader_that_shuffles() -> None:
    """The samples are those that came with the values."""
    model = watched()
    shuffled = DataLoader(TRAIN.dataset, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))
    curvature = ihvp.EKFACIHVP(model, TRAIN, 0.1)
    own = influenciae_api.FirstOrderInfluenceCalculator(model, TRAIN, curvature)
    x, _ = tensors(TRAIN)
    want = ihvp.FirstOrderInfluenceCalculator(model, TRAIN, curvature).scores(TEST).topk(3)
    found = list(own.top_k(TEST, shuffled, 3))
    assert_near(torch.cat([values for _, values, _ in found]), want.values)
    assert torch.equal(torch.cat([samples for _, _, samples in found]), x[want.indices])


def test_groups() -> None:
    model = watched()
    curvature = influenciae_api.EKFACIHVP(model, TRAIN, 0.1)
    batches = list(TRAIN)
    groups, tests = [batches[:1], batches[2:]], [list(TEST)[:1], list(TEST)[1:]]
    for own, native in (
        (influenciae_api.FirstOrderInfluenceCalculator, ihvp.FirstOrderInfluenceCalculator),
        (influenciae_api.SecondOrderInfluenceCalculator, ihvp.SecondOrderInfluenceCalculator),
    ):
        for arguments in ((groups,), (groups, tests)):
            found = list(own(model, TRAIN, curvature).estimate_influence_values_group(*arguments))
            want = list(native(model, TRAIN, curvature).estimate_influence_values_group(*arguments))
            assert [value.shape for value in found] == [(1, 1), (1, 1)]
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_boundaries() -> None:
    net = mlp()
    model = influenciae_api.InfluenceModel(net, 0, -1)
    assert list(model.layers) == ["feature_extractor", "hidden", "classifier"]
    for own, native in (
        (influenciae_api.SampleBoundaryCalculator(net), ihvp.SampleBoundaryCalculator(model)),
        (influenciae_api.WeightsBoundaryCalculator(net), ihvp.WeightsBoundaryCalculator(model)),
    ):
        found = torch.cat([values for _, values in own.compute_influence_values(TRAIN)])
        assert found.shape == (23, 1)
        assert torch.equal(found[:, 0], native.self_scores(TRAIN))
    with pytest.raises(ValueError, match="norm_type must be 2, got 1"):
        influenciae_api.WeightsBoundaryCalculator(net, norm_type=1)


def test_the_guides_section_seven() -> None:
    """Word for word but for torch's data and layers."""
    torch.manual_seed(42)
    model = guide_net()
    train_dataset, test_dataset, hessian_dataset = guide_loaders(*guide_data())

    def process_batch_for_loss(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs, labels = batch
        return inputs, labels, torch.ones_like(labels, dtype=torch.float32)

    influence_model = influenciae_api.InfluenceModel(
        model,
        start_layer="hidden",
        last_layer="classifier",
        loss_function=LOSS,
        process_batch_for_loss_fn=process_batch_for_loss,
    )
    assert influence_model.nb_params == 65 * 32 + 33 * 10
    ihvp_calculator = influenciae_api.EKFACIHVP(
        model=influence_model, train_dataset=hessian_dataset, damping=1e-3, update_eigen=True
    )
    for layer_idx, (A, G) in ihvp_calculator.kfac_blocks.items():
        layer = ihvp_calculator.layer_info[layer_idx]["layer"]
        assert (*G.shape[:1], *A.shape[:1]) == layer.shape == ihvp_calculator.evals[layer_idx].shape
    influence_calculator = influenciae_api.FirstOrderInfluenceCalculator(
        influence_model, train_dataset, ihvp_calculator
    )
    top_k_results = influence_calculator.top_k(test_dataset, train_dataset, k=5, order=ORDER.DESCENDING)
    seen = 0
    for test_samples, influence_values, train_samples in top_k_results:
        test_inputs, test_labels = test_samples
        assert test_inputs.shape == (10, 100) and test_labels.shape == (10,)
        assert influence_values.shape == (10, 5) and train_samples.shape == (10, 5, 100)
        assert all((earlier >= later).all() for earlier, later in pairwise(influence_values.T))
        seen += 1
    assert seen == 1


# --- Empirical IF ------------------------------------------------------------------------------------------------


def last_layer(name: str, param: nn.Parameter) -> bool:
    return "classifier" in name


@pytest.mark.parametrize("chosen", [None, last_layer])
def test_one_score_for_each_training_example(chosen: Any) -> None:
    net = mlp()
    model = ihvp.InfluenceModel(net, LOSS, layers=None if chosen is None else ["classifier"])
    query_input, query_target = (x[:1] for x in next(iter(TEST)))
    query = [(query_input, query_target)]
    curvature = ihvp.ExactIHVP(model, TRAIN, 0.5)
    wanted = {
        "BaseInfluenceFunction": -ihvp.FirstOrderInfluenceCalculator(model, TRAIN, curvature).scores(query)[0],
        "TracIn": ihvp.FirstOrderInfluenceCalculator(model, TRAIN, ihvp.IdentityIHVP(model)).scores(query)[0],
        "EmpiricalIF": ihvp.EmpiricalInfluence(model, TRAIN).scores(query)[0],
    }
    options: dict[str, dict[str, Any]] = {"BaseInfluenceFunction": {"damping": 0.5, "ihvp_calculator": "exact"}}
    for name, want in wanted.items():
        own = getattr(empirical_if_api, name)(
            dl_train=TRAIN, model=net, param_filter_fn=chosen, criterion=LOSS, **options.get(name, {})
        )
        scores = own.query_influence(query_input, query_target)
        assert scores.shape == (23,)
        assert_near(scores, want)


def test_reverse_check() -> None:
    net = mlp()
    own = empirical_if_api.EmpiricalIF(TRAIN, net, last_layer, LOSS)
    query_input, query_target = (x[:1] for x in next(iter(TEST)))
    scores = own.query_influence(query_input, query_target)
    most, least = own.reverse_check(
        query_input=query_input, query_target=query_target, influence_values=scores, check_ratio=0.1
    )
    native = ihvp.EmpiricalInfluence(ihvp.InfluenceModel(net, LOSS, layers=["classifier"]), TRAIN)
    assert (most, least) == native.reverse_check(query_input, query_target, scores, 0.1)
    assert len(most) == len(least) == 2


def test_tracin_over_checkpoints() -> None:
    net = mlp()
    states = [{key: x * scale for key, x in net.state_dict().items()} for scale in (0.5, 2.0)]
    own = empirical_if_api.TracIn(TRAIN, net, criterion=cross_entropy, checkpoints=states, learning_rates=[1.0, 0.1])
    native = ihvp.TracInCalculator(ihvp.InfluenceModel(net, cross_entropy), TRAIN, states, [1.0, 0.1])
    query_input, query_target = (x[:1] for x in next(iter(TEST)))
    assert torch.equal(own.query_influence(query_input, query_target), native.scores([(query_input, query_target)])[0])


def test_wrong_input() -> None:
    own = empirical_if_api.EmpiricalIF(TRAIN, mlp(), None, LOSS)
    with pytest.raises(ValueError, match="query_input must be a batch of 1, got 3"):
        own.query_influence(*next(iter(TEST)))
    with pytest.raises(ValueError, match=r"param_filter_fn must take a layer's parameters all or none, .*'hidden'"):
        empirical_if_api.EmpiricalIF(TRAIN, mlp(), lambda name, param: name == "hidden.weight", LOSS)
    with pytest.raises(ValueError, match="force_hermitian must be True"):
        influenciae_api.ArnoldiInfluenceCalculator(watched(), TRAIN, 20, False, 4)
