"""Scores of training examples for queries, by first-order influence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ihvp.batch import Batch
from ihvp.calculators.base import SIGNS, InfluenceCalculator
from ihvp.calculators.groups import Groups, gradient_sum, paired
from ihvp.calculators.perturbation import input_gradients
from ihvp.calculators.token_losses import token_loss_scores
from ihvp.capture import capture
from ihvp.methods.base import IHVP, Vectors, concatenate, gradients
from ihvp.methods.queries import DenseQueries, LayerQueries, Queries, concatenate_queries, low_rank
from ihvp.methods.scoring import BatchScores
from ihvp.model import InfluenceModel, Layer, LossFn

NORMALIZATIONS = ("theta", "loss")
TOKEN_PARTS = ("position", "loss")

K = TypeVar("K")
OneDamping = TypeVar("OneDamping", bound=float | str)


class FirstOrderInfluenceCalculator(InfluenceCalculator[Queries]):
    """First-order influence: the score of training example n for query q is + g_q^T (F + damping I)^-1 g_n.

    With sign="proponent" (default) a positive score means that training on the example lowered the query's loss. With
    sign="loss_change" every result is the negative: the derivative of the query's loss with respect to the example's
    weight; with the mean Hessian as curvature that is the base influence function. No factor 1/N is hidden. A loss
    whose l2 term strength/2 ||theta||^2 stands beside the mean over the examples has the curvature F + strength I:
    there the damping is the strength.

    Args:
        model: the InfluenceModel.
        train_loader: training data, where a method is not given any; also fits the curvature if it is not fitted.
        curvature: an IHVP object of the same model.
        normalize: RelatIF. True or "theta" divides by ||(F + damping I)^-1 g_n||, "loss" by
            sqrt(g_n^T (F + damping I)^-1 g_n). An example whose gradient is zero keeps the score zero.
        sign: "proponent" or "loss_change".
        measurement: (outputs, targets) -> (N,) or (N,T), what the influence on is asked for: g_q is then its gradient.
            None: the loss. A proponent raises minus the measurement, as it lowers the loss. The self-influence is
            always that on the loss.
        query_rank: keeps each layer of a preconditioned query as factors of this rank, r (O + I') numbers instead of
            O I', so that many queries fit into memory; a pass over the training data serves them all. None: whole.

    Source: Koh and Liang 2017 (arXiv:1703.04730), eq. 2; Barshan et al. 2020 (arXiv:2003.11630), eq. 4 and 7 (RelatIF);
    Grosse et al. 2023 (arXiv:2308.03296), section 2.1 (measurements) and 3.2.2 (low rank).
    """

    def __init__(
        self,
        model: InfluenceModel,
        train_loader: Iterable[Any] | None,
        curvature: IHVP,
        normalize: bool | str = False,
        sign: str = "proponent",
        *,
        measurement: LossFn | None = None,
        query_rank: int | None = None,
    ) -> None:
        if not isinstance(curvature, IHVP):
            raise TypeError(f"curvature must be an IHVP object, got {type(curvature).__name__}")
        if curvature.model is not model:
            raise ValueError("curvature must be an IHVP object of this model, got one of another InfluenceModel")
        if not isinstance(normalize, bool) and normalize not in NORMALIZATIONS:
            raise ValueError(
                f"normalize must be False, True, {' or '.join(map(repr, NORMALIZATIONS))}, got {normalize!r}"
            )
        if measurement is not None and not callable(measurement):
            raise TypeError(f"measurement must be callable, got {type(measurement).__name__}")
        if query_rank is not None and (
            isinstance(query_rank, bool) or not isinstance(query_rank, int) or query_rank < 1
        ):
            raise ValueError(f"query_rank must be None or a whole number > 0, got {query_rank!r}")
        super().__init__(model, train_loader, sign)
        self.curvature = curvature
        self.query_rank = query_rank
        self.normalize = "theta" if normalize is True else normalize
        self.measurement = measurement
        if not curvature.is_fitted:
            curvature.fit(self._data(None))

    # --- one batch ----------------------------------------------------------------------------------------------

    def _ready(self, batch: Batch, index: int) -> Queries:
        return self.curvature.queries(batch, index=index, measurement=self.measurement, rank=self.query_rank)

    def _to_first_stage(self, V: Vectors) -> Vectors:
        """Gradients at the queries' weights as the curvature takes them."""
        return V

    def _to_last_stage(self, P: Vectors) -> Vectors:
        """What the curvature made of gradients, at the queries' weights."""
        return P

    def _joined(self, parts: Sequence[Queries]) -> Queries:
        return concatenate_queries(parts)

    def _scored(self, queries: Queries, batch: Batch, index: int) -> Tensor:
        return self._scored_parts({"": queries}, batch, index)[""]

    def _scored_parts(self, parts: Mapping[K, Queries], batch: Batch, index: int) -> dict[K, Tensor]:
        """The (Q,B) scores of several queries at once; each may hold some layers only."""
        scores = BatchScores(self.model, parts, batch, index)
        capture(self.model, batch, scores, index=index)
        squares = self._squares(batch, index)
        return {key: _divide(total, squares) for key, total in scores.totals().items()}

    def _self_values(self, batch: Batch, index: int) -> Tensor:
        return _divide(self._quadratic(batch, 1, index), self._squares(batch, index))

    def _squares(self, batch: Batch, index: int) -> Tensor | None:
        """The squares of what RelatIF divides by."""
        if self.normalize is False:
            return None
        return self._quadratic(batch, 2 if self.normalize == "theta" else 1, index)

    def _quadratic(self, batch: Batch, power: int, index: int) -> Tensor:
        """The self-influence; for power 2 the square of the norm of what the example changes in the weights."""
        return self.curvature.quadratic(batch, power, index=index)

    # --- by layer, by block, by token, by damping ---------------------------------------------------------------

    def scores_by_layer(
        self, test_loader: Iterable[Any], train_loader: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Layer name -> (Q,N), its part of the scores; they sum to `scores`."""
        queries = self._joined([own for _, own in self._queries(test_loader)])
        return self._scores_of_parts({name: {name: own} for name, own in queries.items()}, train_loader)

    def scores_by_block(
        self, test_loader: Iterable[Any], train_loader: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Block of the curvature -> (Q,N), its part of the scores; they sum to `scores`."""
        queries = self._joined([own for _, own in self._queries(test_loader)])
        return self._scores_of_parts(self._by_block(queries), train_loader)

    def scores_by_token(
        self, test_loader: Iterable[Any], train_loader: Iterable[Any] | None = None, *, of: str = "position"
    ) -> Iterator[tuple[Any, Tensor]]:
        """For each training batch (batch, (Q,B,T)): what its tokens have of the scores, which they sum to.

        of="position" takes g_n apart by where the layers read it, g_n = sum_t delta[n,t] a[n,t]^T: what a token brings
        to its own and to all later losses. It costs what `scores` does. The tracked layers must have the same
        positions. of="loss" takes it apart by the loss's terms, g_n = sum_t gradient of loss[n,t]: what it is to be
        trained to predict this token after those before it. loss_fn must return (N,T).

        A batch's scores are computed as it is asked for.

        Source: Grosse et al. 2023 (arXiv:2308.03296), section 3.3, for positions.
        """
        if of not in TOKEN_PARTS:
            raise ValueError(f"of must be one of {', '.join(TOKEN_PARTS)}, got {of!r}")
        queries = self._joined([own for _, own in self._queries(test_loader)])
        return self._token_scores(queries, train_loader, of)

    def _token_scores(
        self, queries: Queries, train_loader: Iterable[Any] | None, of: str
    ) -> Iterator[tuple[Any, Tensor]]:
        for index, (raw, batch) in enumerate(self.model.passes(self._data(train_loader), "scores by token")):
            if of == "loss":
                scores = token_loss_scores(self.model, queries, batch, index=index)
            else:
                sink = BatchScores(self.model, {"": queries}, batch, index, per_token=True)
                capture(self.model, batch, sink, index=index)
                scores = sink.totals()[""]
            squares = self._squares(batch, index)
            yield raw, SIGNS[self.sign] * _divide(scores, None if squares is None else squares.unsqueeze(1))

    def explore_damping(
        self,
        test_loader: Iterable[Any],
        train_loader: Iterable[Any] | None,
        dampings: Sequence[OneDamping],
    ) -> dict[OneDamping, dict[str, Tensor]]:
        """Damping -> block of the curvature -> (Q,N): what `scores_by_block` is with each damping.

        The gradients, the factorisation and the pass over the training data are shared; (D Q,N) scores exist at once.
        Raises ValueError with a normalisation, whose norms are those of one damping.
        """
        if self.normalize is not False:
            raise ValueError(f"explore_damping needs normalize=False, got {self.normalize!r}")
        if not dampings or not all(isinstance(damping, (int, float, str)) for damping in dampings):
            raise ValueError(f'dampings must list numbers or "auto", at least one, got {dampings!r}')
        g = concatenate(
            [
                gradients(self.query_model, batch, index=index, measurement=self.measurement)
                for index, (_, batch) in enumerate(self.query_model.passes(test_loader, "queries"))
            ]
        )
        solved = self.curvature.solve(self._to_first_stage(g), list(dampings))
        queries: Queries = {name: DenseQueries(P.flatten(0, 1)) for name, P in solved.items()}
        by_block = self._scores_of_parts(self._by_block(low_rank(queries, self.model, self.query_rank)), train_loader)
        chunks = {block: scores.chunk(len(dampings)) for block, scores in by_block.items()}
        return {damping: {block: own[i] for block, own in chunks.items()} for i, damping in enumerate(dampings)}

    def _by_block(self, queries: Queries) -> dict[str, Queries]:
        return {
            block: {name: _columns(queries[name], self.model.layers[name], columns) for name, columns in own.items()}
            for block, own in self.curvature.blocks.items()
        }

    def _scores_of_parts(self, parts: dict[str, Queries], train_loader: Iterable[Any] | None) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {key: [] for key in parts}
        for index, (_, batch) in enumerate(self.model.passes(self._data(train_loader), "scores")):
            for key, scores in self._scored_parts(parts, batch, index).items():
                found[key].append(SIGNS[self.sign] * scores)
        return {key: torch.cat(own, dim=1) for key, own in found.items()}

    # --- perturbation -------------------------------------------------------------------------------------------

    def perturbation(self, test_loader: Iterable[Any], train_loader: Iterable[Any] | None = None) -> Tensor:
        """(Q,N,*x): the derivative of each score with respect to the training input x_n, (N,*x).

        With sign="loss_change" it is that of the query's loss with respect to the input, times N. The input is the
        model's first argument.

        Raises:
            TypeError: the inputs are not floating-point tensors.
            ValueError: the batches' inputs differ in shape beyond their first dimension, or there is a normalisation.

        Source: Koh and Liang 2017 (arXiv:1703.04730), eq. 5.
        """
        if self.normalize is not False:
            raise ValueError(f"perturbation needs normalize=False, got {self.normalize!r}")
        queries = self._joined([own for _, own in self._queries(test_loader)])
        P = {name: own.dense() for name, own in queries.items()}
        parts: list[Tensor] = []
        for index, (_, batch) in enumerate(self.model.passes(self._data(train_loader), "perturbation")):
            parts.append(SIGNS[self.sign] * input_gradients(self.model, P, batch, index=index))
            first, last = (tuple(parts[i].shape[2:]) for i in (0, -1))
            if first != last:
                raise ValueError(f"training inputs must be of one shape, got {first} in batch 0, {last} in {index}")
        return torch.cat(parts, dim=1)

    # --- groups -------------------------------------------------------------------------------------------------

    def estimate_influence_values_group(
        self, train_groups: Groups, test_groups: Groups | None = None
    ) -> Iterator[Tensor]:
        """(1,1) for each pair of groups: the sum of the scores of all pairs of their examples.

        A group is a loader. Without `test_groups` each training group is scored for itself. Normalisation divides by
        the norm of the group's summed gradient.

        Raises ValueError when there are not as many test groups as training groups.
        """
        for train, test in paired(train_groups, test_groups):
            g, _ = gradient_sum(self.model, train)
            P = self.curvature.solve(g)
            own = test is train and self.measurement is None and self.query_model is self.model
            query = g if own else gradient_sum(self.query_model, test, measurement=self.measurement)[0]
            moved = self._to_last_stage(P)
            squares = {"theta": (moved, moved), "loss": (g, P)}.get(str(self.normalize))
            value = _divide(dot(query, moved), None if squares is None else dot(*squares))
            yield SIGNS[self.sign] * value.view(1, 1)


def dot(V: Vectors, W: Vectors) -> Tensor:
    return torch.stack([(V[name] * W[name]).sum() for name in V]).sum()


def _columns(queries: LayerQueries, layer: Layer, columns: slice) -> LayerQueries:
    """The queries with all other columns of P zero."""
    _, I = layer.shape
    if columns.indices(I) == (0, I, 1):
        return queries
    P = queries.dense()
    kept = torch.zeros_like(P)
    kept[..., columns] = P[..., columns]
    return DenseQueries(kept)


def _divide(values: Tensor, squares: Tensor | None) -> Tensor:
    """values / sqrt(squares), zero where that is zero; values as they are without squares."""
    if squares is None:
        return values
    if bool((squares < 0).any()):
        raise torch.linalg.LinAlgError(
            f"normalize needs a positive curvature, got g^T (F + damping I)^-1 g = {float(squares.min()):.3g}; "
            "a larger damping helps"
        )
    norms = squares.sqrt()
    return torch.where(norms > 0, values / norms.clamp_min(torch.finfo(norms.dtype).tiny), values.new_zeros(()))
