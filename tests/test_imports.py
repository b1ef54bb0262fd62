"""Imports point one way, and the public names of the design are there."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ihvp
import pytest

ROOT = Path(ihvp.__file__).parent
MODULES = {
    ".".join(("ihvp", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

EXTENSIONS = ("ihvp._native", "ihvp._cuda")

# From the bottom to the top. Adapters stand on the whole package, whose public names are all they know.
FLOORS = (
    {"_native", "_cuda"},
    {"ops"},
    {"layers"},
    {"batch", "cache", "model", "prefilter"},
    {"capture"},
    {"methods"},
    {"calculators"},
    {"", "demo", "__main__"},
    {"adapters"},
)


def floor(module: str) -> int:
    part = [*module.split("."), ""][1]
    found = [i for i, parts in enumerate(FLOORS) if part in parts]
    assert found, f"{module} stands on no floor of {__name__}.FLOORS"
    return found[0]


def imports(module: str) -> Iterator[str]:
    """The modules that a module imports, anywhere in its text, by their full names."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield whole if whole in MODULES or whole in EXTENSIONS else source


def test_the_walk_sees_the_package() -> None:
    assert {"ihvp", "ihvp.capture", "ihvp.ops", "ihvp.ops.gradient_dot", "ihvp.methods.ekfac"} <= MODULES.keys()
    assert {"ihvp.ops", "ihvp.batch", "ihvp.model", "ihvp.methods"} <= set(imports("ihvp"))
    assert {"torch", "ihvp._native", "ihvp.ops._registry"} <= set(imports("ihvp.ops.gradient_dot"))


@pytest.mark.parametrize("module", MODULES)
def test_no_import_points_back(module: str) -> None:
    own = floor(module)
    back = [name for name in imports(module) if name.split(".")[0] == "ihvp" and floor(name) > own]
    assert not back, f"{module} must not import {', '.join(back)}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("ihvp.ops")])
def test_ops_need_only_torch_and_the_native_core(module: str) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    others = {
        name
        for name in imports(module)
        if name.split(".")[0] not in allowed and not name.startswith(("ihvp.ops", *EXTENSIONS))
    }
    assert not others, f"{module} must not import {', '.join(sorted(others))}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("ihvp.adapters.")])
def test_adapters_know_public_names_only(module: str) -> None:
    """They import ihvp itself, no module of it but their own package's, and take only what it lists."""
    package = ".".join(module.split(".")[:3])
    assert not [name for name in imports(module) if name.startswith("ihvp.") and not name.startswith(f"{package}.")]
    used = {
        node.attr
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ihvp"
    }
    assert used <= set(ihvp.__all__)
    assert used or MODULES[module].name == "__init__.py"


@pytest.mark.parametrize("module", [name for name in MODULES if not {*EXTENSIONS}.isdisjoint(imports(name))])
def test_torch_comes_before_an_extension(module: str) -> None:
    """Then both share one OpenMP runtime: the one that torch brings."""
    names = list(imports(module))
    assert names.index("torch") < min(names.index(name) for name in EXTENSIONS if name in names)


def test_only_capture_has_hooks() -> None:
    users = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and "hook" in node.attr
    }
    assert users == {"ihvp.capture"}


# --- the names of DESIGN.md --------------------------------------------------------------------------------------

LOADER = ["model", "hessian_loader", "damping"]
SIGNATURES: dict[str, list[str]] = {
    "Batch": ["args", "kwargs", "targets", "mask", "weights"],
    "InfluenceModel": ["net", "loss_fn", "layers", "start_layer", "last_layer", "process_batch"],
    "EKFACIHVP": [*LOADER, "update_eigen", "fisher"],
    "KFACIHVP": [*LOADER, "split"],
    "FisherIHVP": [*LOADER],
    "ExactIHVP": [*LOADER],
    "IdentityIHVP": ["model"],
    "DiagonalIHVP": [*LOADER],
    "CgIHVP": [*LOADER, "curvature", "rtol", "atol", "maxiter"],
    "LissaIHVP": [*LOADER, "curvature", "maxiter", "dampen", "scale", "rtol"],
    "ArnoldiIHVP": [*LOADER, "rank", "curvature", "krylov_dimension", "tol", "maxiter"],
    "NystroemIHVP": [*LOADER, "rank", "curvature"],
    "InverseHarmonicMeanIHVP": [*LOADER, "block_structure"],
    "DataInfIHVP": [*LOADER, "block_structure"],
    "make_ihvp": ["name", "model", "hessian_loader", "options"],
    "IHVP.with_damping": ["self", "damping"],
    "IHVP.fit": ["self", "loader"],
    "IHVP.solve": ["self", "V", "damping"],
    "IHVP.multiply": ["self", "V"],
    "IHVP.compute_ihvp": ["self", "loader", "use_gradient"],
    "IHVP.compute_hvp": ["self", "loader", "use_gradient"],
    "IHVP.state_dict": ["self"],
    "IHVP.load_state_dict": ["self", "state"],
    "IHVP.save": ["self", "path"],
    "load": ["path", "model"],
    "FirstOrderInfluenceCalculator": ["model", "train_loader", "curvature", "normalize", "sign"],
    "FirstOrderInfluenceCalculator.scores": ["self", "test_loader", "train_loader"],
    "FirstOrderInfluenceCalculator.self_scores": ["self", "train_loader"],
    "FirstOrderInfluenceCalculator.top_k": ["self", "test_loader", "train_loader", "k", "order"],
    "FirstOrderInfluenceCalculator.compute_influence_values": ["self", "loader"],
    "FirstOrderInfluenceCalculator.compute_top_k_from_training_dataset": ["self", "loader", "k", "order"],
    "FirstOrderInfluenceCalculator.estimate_influence_values_in_batches": ["self", "test_loader", "train_loader"],
    "FirstOrderInfluenceCalculator.estimate_influence_values_group": ["self", "train_groups", "test_groups"],
    "FirstOrderInfluenceCalculator.scores_by_layer": ["self", "test_loader", "train_loader"],
    "FirstOrderInfluenceCalculator.scores_by_block": ["self", "test_loader", "train_loader"],
    "FirstOrderInfluenceCalculator.explore_damping": ["self", "test_loader", "train_loader", "dampings"],
    "FirstOrderInfluenceCalculator.perturbation": ["self", "test_loader", "train_loader"],
    "SecondOrderInfluenceCalculator": ["model", "train_loader", "curvature", "sign"],
    "SecondOrderInfluenceCalculator.estimate_influence_values_group": ["self", "train_groups", "test_groups"],
    "TracInCalculator": ["model", "train_loader", "checkpoints", "learning_rates", "sign"],
    "EmpiricalInfluence": ["model", "train_loader", "step", "sign"],
    "EmpiricalInfluence.reverse_check": ["self", "query_input", "query_target", "influence_values", "check_ratio"],
    "RepresenterPointL2": ["model", "train_loader", "l2", "sign"],
    "RepresenterPointLJE": ["model", "train_loader", "curvature", "sign"],
    "SampleBoundaryCalculator": ["model", "train_loader"],
    "WeightsBoundaryCalculator": ["model", "train_loader"],
    "input_gradients": ["model", "P", "batch"],
    "explain": ["op"],
    "use": ["implementation"],
    "ops.covariance_update_": ["C", "x", "mask", "bias"],
    "ops.eigenbasis_project": ["x", "U", "mask", "bias"],
    "ops.eigenbasis_rotate": ["V", "U_A", "U_G", "inverse"],
    "ops.ekfac_diagonal_update_": ["Lambda", "a", "delta", "U_A", "U_G", "mask", "bias"],
    "ops.ekfac_solve": ["V", "U_A", "U_G", "Lambda", "damping"],
    "ops.kfac_factorize": ["A", "G", "damping", "split"],
    "ops.kfac_solve": ["V", "L_A", "L_G"],
    "ops.gradient_dot": ["P", "a", "delta", "mask", "bias", "per_token"],
    "ops.gradient_dot_low_rank": ["L", "R", "a", "delta"],
    "ops.ekfac_self_influence": ["a", "delta", "U_A", "U_G", "Lambda", "damping"],
    "ops.ghost_dot": ["a1", "delta1", "a2", "delta2"],
    "ops.ghost_norm": ["a", "delta"],
    "ops.per_sample_gradient": ["a", "delta"],
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "EKFACIHVP": {"damping": 1e-3, "update_eigen": True, "fisher": "empirical"},
    "KFACIHVP": {"damping": 1e-3, "split": "pi"},
    "FisherIHVP": {"damping": 1e-3},
    "CgIHVP": {"damping": 0.0, "curvature": "hessian", "rtol": 1e-4, "atol": 1e-6, "maxiter": None},
    "LissaIHVP": {"damping": 0.0, "maxiter": 1000, "dampen": 0.0, "scale": 10.0, "rtol": 1e-4},
    "ArnoldiIHVP": {"damping": 0.0, "rank": 10, "krylov_dimension": None, "tol": 1e-6, "maxiter": None},
    "ExactIHVP": {"damping": 0.0, "block_structure": "full"},
    "InverseHarmonicMeanIHVP": {"block_structure": "full"},
    "DataInfIHVP": {"damping": "auto", "block_structure": "layer"},
    "FirstOrderInfluenceCalculator": {"normalize": False, "sign": "proponent"},
    "FirstOrderInfluenceCalculator.top_k": {"k": 5, "order": ihvp.Order.DESCENDING},
    "IHVP.compute_ihvp": {"use_gradient": True},
    "ops.kfac_factorize": {"split": "pi"},
    "ops.gradient_dot": {"mask": None, "bias": False, "per_token": False},
    "ops.eigenbasis_rotate": {"inverse": False},
}


def public(name: str) -> Any:
    value: Any = ihvp
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_names_take_their_arguments_in_order(name: str) -> None:
    """Those of the design first and in its order; others may follow."""
    parameters = inspect.signature(public(name)).parameters
    assert list(parameters)[: len(SIGNATURES[name])] == SIGNATURES[name]
    for argument, default in DEFAULTS.get(name, {}).items():
        assert parameters[argument].default == default


def test_public_names_are_listed_and_documented() -> None:
    for name in SIGNATURES:
        if "." not in name:
            assert name in ihvp.__all__
        assert inspect.getdoc(public(name)), f"{name} has no docstring"
    assert {order.name for order in ihvp.Order} == {"ASCENDING", "DESCENDING"}
    assert all(hasattr(ihvp, name) for name in ihvp.__all__)
    for name in ("kfac_blocks", "evecs", "evals"):
        assert hasattr(ihvp.KFACIHVP, name) and hasattr(ihvp.EKFACIHVP, name)
    assert all(issubclass(getattr(ihvp, name), ihvp.IHVP) for name in SIGNATURES if name.endswith("IHVP"))
