"""The Analyzer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import ihvp
from ihvp.adapters.kronfluence_api.translation import (
    PREFIX,
    FactorArguments,
    ScoreArguments,
    by_module,
    check_whole,
    described,
    factor_arguments,
    fisher_of,
    fitting,
    influence_model,
    made,
    measurement_of,
    note,
    saved,
    with_moments_of_positions,
)

ALL_MODULES = "all_modules"


def prepare_model(model: nn.Module, task: Any) -> nn.Module:
    """The model as it is, after the check that its modules can be tracked."""
    influence_model(model, task, None, None)
    return model


class Analyzer:
    """Fits factors and computes scores, and keeps both in files under output_dir/analysis_name.

    What exists under a name is not computed again unless `overwrite_output_dir`; asked for with other arguments it is
    a ValueError.
    """

    def __init__(
        self,
        analysis_name: str,
        model: nn.Module,
        task: Any,
        cpu: bool = False,
        log_level: int | None = None,
        log_main_process_only: bool = True,
        profile: bool = False,
        disable_tqdm: bool = False,
        output_dir: str | os.PathLike[str] = "./influence_results",
        disable_model_save: bool = True,
    ) -> None:
        if not disable_model_save:
            raise NotImplementedError("disable_model_save=False: the model is not saved here")
        if getattr(task, "enable_post_process_per_sample_gradient", False):
            raise NotImplementedError("enable_post_process_per_sample_gradient: no gradient is formed here")
        self.task = task
        self.model = model.to("cuda" if torch.cuda.is_available() and not cpu else "cpu")
        self.output_dir = Path(output_dir, analysis_name)
        self.progress = False if disable_tqdm else None
        self._dataloader_kwargs: Any = None
        self._own(None)  # a model that cannot be tracked is refused at once

    def set_dataloader_kwargs(self, dataloader_kwargs: Any) -> None:
        self._dataloader_kwargs = dataloader_kwargs

    # --- factors ------------------------------------------------------------------------------------------------

    def fit_all_factors(
        self,
        factors_name: str,
        dataset: Dataset[Any],
        per_device_batch_size: int | None = None,
        initial_per_device_batch_size_attempt: int = 4096,
        dataloader_kwargs: Any = None,
        factor_args: Any = None,
        overwrite_output_dir: bool = False,
    ) -> None:
        """All that the strategy needs."""
        sizes = (per_device_batch_size, initial_per_device_batch_size_attempt, dataloader_kwargs, factor_args)
        self.fit_covariance_matrices(factors_name, dataset, *sizes, overwrite_output_dir)
        self.fit_lambda_matrices(factors_name, dataset, *sizes, overwrite_output_dir)

    def fit_covariance_matrices(
        self,
        factors_name: str,
        dataset: Dataset[Any],
        per_device_batch_size: int | None = None,
        initial_per_device_batch_size_attempt: int = 4096,
        dataloader_kwargs: Any = None,
        factor_args: Any = None,
        overwrite_output_dir: bool = False,
    ) -> None:
        """A and G of every layer, with their eigendecomposition."""
        arguments = factor_arguments(factor_args)
        path, own = self._factors(factors_name, "covariance"), described(arguments, FactorArguments)
        if arguments.strategy not in ("kfac", "ekfac") or made(path, own, overwrite_output_dir):
            return
        curvature = ihvp.KFACIHVP(self._own(arguments.amp_dtype), split="none", fisher=fisher_of(arguments))
        sizes = (per_device_batch_size, initial_per_device_batch_size_attempt, dataloader_kwargs)
        self._fit(curvature.fit, dataset, arguments.covariance_max_examples, *sizes)
        note(path, own)
        curvature.save(path)

    def perform_eigendecomposition(
        self, factors_name: str, factor_args: Any = None, overwrite_output_dir: bool = False
    ) -> None:
        """Covariances are fitted with it; raises ValueError when they are not."""
        if factor_arguments(factor_args).strategy in ("kfac", "ekfac"):
            self._existing(factors_name, "covariance")

    def fit_lambda_matrices(
        self,
        factors_name: str,
        dataset: Dataset[Any],
        per_device_batch_size: int | None = None,
        initial_per_device_batch_size_attempt: int = 4096,
        dataloader_kwargs: Any = None,
        factor_args: Any = None,
        overwrite_output_dir: bool = False,
    ) -> None:
        """EKFAC's Lambda in the eigenbasis of the covariances; the diagonal of the strategy "diagonal"."""
        arguments = factor_arguments(factor_args)
        model, fisher = self._own(arguments.amp_dtype), fisher_of(arguments)
        path, own = self._factors(factors_name, "lambda"), described(arguments, FactorArguments)
        if made(path, own, overwrite_output_dir):
            return
        curvature: ihvp.IHVP
        if arguments.strategy == "identity":
            curvature = ihvp.IdentityIHVP(model)
        elif arguments.strategy == "kfac":
            curvature = with_moments_of_positions(ihvp.load(self._existing(factors_name, "covariance"), model))
        else:
            fit: Callable[[Iterable[Any]], Any]
            if arguments.strategy == "diagonal":
                curvature = ihvp.DiagonalIHVP(model, fisher=fisher)
                fit = curvature.fit
            else:
                basis = ihvp.load(self._existing(factors_name, "covariance"), model)
                assert isinstance(basis, ihvp.KroneckerIHVP)
                curvature = ihvp.EKFACIHVP(model, fisher=fisher)
                fit = partial(curvature.fit, basis=basis)
            sizes = (per_device_batch_size, initial_per_device_batch_size_attempt, dataloader_kwargs)
            self._fit(fit, dataset, arguments.lambda_max_examples, *sizes)
        note(path, own)
        curvature.save(path)

    def load_covariance_matrices(self, factors_name: str) -> dict[str, dict[str, Tensor]]:
        """Sums and their counts by module: "activation_covariance", "gradient_covariance", "num_..._processed"."""
        state = load_file(self._existing(factors_name, "covariance"))
        positions = {name: x[0] for name, x in by_module(state, "counts").items()}
        return {
            "activation_covariance": by_module(state, "sum_A"),
            "gradient_covariance": by_module(state, "sum_G"),
            "num_activation_covariance_processed": positions,
            "num_gradient_covariance_processed": positions,
        }

    def load_eigendecomposition(self, factors_name: str) -> dict[str, dict[str, Tensor]]:
        """Eigenvectors in columns and eigenvalues of both factors, by module."""
        state = load_file(self._existing(factors_name, "covariance"))
        counts = by_module(state, "counts")
        values = by_module(state, "values_G")
        return {
            "activation_eigenvectors": by_module(state, "U_A"),
            "activation_eigenvalues": by_module(state, "values_A"),
            "gradient_eigenvectors": by_module(state, "U_G"),
            "gradient_eigenvalues": {name: x * counts[name][1] / counts[name][0] for name, x in values.items()},
        }

    def load_lambda_matrices(self, factors_name: str) -> dict[str, dict[str, Tensor]]:
        """Sums of squares and their counts by module: "lambda_matrix", "num_lambda_processed"."""
        state = load_file(self._existing(factors_name, "lambda"))
        sums = by_module(state, "sum_Lambda") or by_module(state, "sum")
        if not sums:
            raise ValueError(f"factors {factors_name!r} have no Lambda; only EKFAC and the diagonal do")
        return {"lambda_matrix": sums, "num_lambda_processed": {name: state["examples"] for name in sums}}

    # --- scores -------------------------------------------------------------------------------------------------

    def compute_pairwise_scores(
        self,
        scores_name: str,
        factors_name: str,
        query_dataset: Dataset[Any],
        train_dataset: Dataset[Any],
        per_device_query_batch_size: int,
        per_device_train_batch_size: int | None = None,
        initial_per_device_train_batch_size_attempt: int = 4096,
        query_indices: Sequence[int] | None = None,
        train_indices: Sequence[int] | None = None,
        dataloader_kwargs: Any = None,
        score_args: Any = None,
        target_data_partitions: Sequence[int] | None = None,
        target_module_partitions: Sequence[int] | None = None,
        overwrite_output_dir: bool = False,
    ) -> dict[str, Tensor]:
        """{"all_modules": (Q,N)}, or (Q,N,T), or a matrix for each module; an aggregated dimension is 1."""
        check_whole(target_data_partitions, target_module_partitions)
        arguments = ScoreArguments() if score_args is None else score_args
        by_module, by_token = arguments.compute_per_module_scores, arguments.compute_per_token_scores
        if by_token and (by_module or arguments.aggregate_train_gradients):
            raise NotImplementedError("compute_per_token_scores goes with neither modules apart nor summed gradients")
        path, own = self._scores(scores_name, "pairwise"), described(arguments, ScoreArguments, factors=factors_name)
        if made(path, own, overwrite_output_dir):
            return load_file(path)
        calculator = self._calculator(factors_name, arguments, measurement=True)
        queries = self._loader(query_dataset, query_indices, per_device_query_batch_size, dataloader_kwargs)

        def compute(train: Iterable[Any]) -> dict[str, Tensor]:
            if by_module:
                return {name.removeprefix(PREFIX): x for name, x in calculator.scores_by_layer(queries, train).items()}
            if by_token:
                parts = [scores for _, scores in calculator.scores_by_token(queries, train)]
                longest = max(x.shape[2] for x in parts)
                padded = [nn.functional.pad(x, (0, longest - x.shape[2])) for x in parts]
                return {ALL_MODULES: torch.cat(padded, dim=1)}
            return {ALL_MODULES: calculator.scores(queries, train)}

        def loader(size: int) -> Iterable[Any]:
            return self._loader(train_dataset, train_indices, size, dataloader_kwargs)

        sizes = per_device_train_batch_size, initial_per_device_train_batch_size_attempt
        found = fitting(*sizes, calculator.model.device, loader, compute)
        for dim, aggregated in enumerate((arguments.aggregate_query_gradients, arguments.aggregate_train_gradients)):
            if aggregated:
                found = {name: x.sum(dim, keepdim=True) for name, x in found.items()}
        return saved(found, path, own)

    def compute_self_scores(
        self,
        scores_name: str,
        factors_name: str,
        train_dataset: Dataset[Any],
        per_device_train_batch_size: int | None = None,
        initial_per_device_train_batch_size_attempt: int = 4096,
        train_indices: Sequence[int] | None = None,
        dataloader_kwargs: Any = None,
        score_args: Any = None,
        target_data_partitions: Sequence[int] | None = None,
        target_module_partitions: Sequence[int] | None = None,
        overwrite_output_dir: bool = False,
    ) -> dict[str, Tensor]:
        """{"all_modules": (N,)}: the score of each example for itself."""
        check_whole(target_data_partitions, target_module_partitions)
        arguments = ScoreArguments() if score_args is None else score_args
        if arguments.compute_per_module_scores or arguments.compute_per_token_scores:
            raise NotImplementedError("self scores are of all modules and tokens together")
        path, own = self._scores(scores_name, "self"), described(arguments, ScoreArguments, factors=factors_name)
        if made(path, own, overwrite_output_dir):
            return load_file(path)
        measured = arguments.use_measurement_for_self_influence
        calculator = self._calculator(factors_name, arguments, measurement=measured)

        def compute(train: Iterable[Any]) -> Tensor:
            if measured:  # each example's measurement, as a query, against its loss
                return torch.cat([calculator.scores([batch], [batch]).diagonal() for batch in train])
            return calculator.self_scores(train)

        def loader(size: int) -> Iterable[Any]:
            return self._loader(train_dataset, train_indices, size, dataloader_kwargs)

        sizes = per_device_train_batch_size, initial_per_device_train_batch_size_attempt
        return saved({ALL_MODULES: fitting(*sizes, calculator.model.device, loader, compute)}, path, own)

    def load_pairwise_scores(self, scores_name: str) -> dict[str, Tensor]:
        return self._load_scores(scores_name, "pairwise")

    def load_self_scores(self, scores_name: str) -> dict[str, Tensor]:
        return self._load_scores(scores_name, "self")

    # --- parts --------------------------------------------------------------------------------------------------

    def _own(self, amp_dtype: torch.dtype | None) -> ihvp.InfluenceModel:
        return influence_model(self.model, self.task, self.progress, amp_dtype)

    def _calculator(self, factors_name: str, arguments: Any, measurement: bool) -> ihvp.FirstOrderInfluenceCalculator:
        model = self._own(arguments.amp_dtype)
        damping = "auto" if arguments.damping_factor is None else float(arguments.damping_factor)
        curvature = ihvp.load(self._existing(factors_name, "lambda"), model)
        if isinstance(curvature, ihvp.IdentityIHVP):
            damping = 0.0
        return ihvp.FirstOrderInfluenceCalculator(
            model,
            None,
            curvature.with_damping(damping),
            measurement=measurement_of(model) if measurement else None,
            query_rank=arguments.query_gradient_low_rank,
        )

    def _factors(self, factors_name: str, step: str) -> Path:
        return self.output_dir / f"factors_{factors_name}" / f"{step}.safetensors"

    def _scores(self, scores_name: str, kind: str) -> Path:
        return self.output_dir / f"scores_{scores_name}" / f"{kind}_scores.safetensors"

    def _existing(self, factors_name: str, step: str) -> Path:
        path = self._factors(factors_name, step)
        if not path.exists():
            raise ValueError(f"factors {factors_name!r} are not there: fit them, {step} is missing in {path.parent}")
        return path

    def _load_scores(self, scores_name: str, kind: str) -> dict[str, Tensor]:
        path = self._scores(scores_name, kind)
        if not path.exists():
            raise ValueError(f"scores {scores_name!r} are not there: compute them, {path} is missing")
        return load_file(path)

    def _fit(
        self,
        fit: Callable[[Iterable[Any]], Any],
        dataset: Any,
        most: int | None,
        size: int | None,
        attempt: int,
        dataloader_kwargs: Any,
    ) -> None:
        first = range(len(dataset) if most is None else min(most, len(dataset)))
        device = next(self.model.parameters()).device
        fitting(size, attempt, device, lambda size: self._loader(dataset, first, size, dataloader_kwargs), fit)

    def _loader(self, dataset: Any, indices: Sequence[int] | None, size: int, dataloader_kwargs: Any) -> Iterable[Any]:
        chosen = dataset if indices is None else Subset(dataset, indices)
        options = self._dataloader_kwargs if dataloader_kwargs is None else dataloader_kwargs
        return DataLoader(chosen, size, **({} if options is None else options.to_dict()))
