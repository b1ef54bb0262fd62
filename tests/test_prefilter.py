"""Candidates by TF-IDF, against the formula, and on the way to scores."""

from __future__ import annotations

import builtins
import math
from collections import Counter
from typing import Any

import hypothesis
import hypothesis.strategies as st
import ihvp
import pytest
import torch
from ihvp import EKFACIHVP, FirstOrderInfluenceCalculator, tfidf_candidates
from nets import F64, assert_near, batches, plain, rows
from torch import Tensor

TEXTS = ["water is made of hydrogen", "the cat is grey", "hydrogen and oxygen, oxygen", "the grey cat and the cat", ""]


def naive(queries: list[list[int]], documents: list[list[int]]) -> Tensor:
    """(Q,N): cosines, word by word."""
    N = len(documents)
    having = Counter(word for document in documents for word in set(document))
    rarity = {word: math.log((1 + N) / (1 + count)) + 1 for word, count in having.items()}

    def vector(document: list[int]) -> dict[int, float]:
        raw = {word: count * rarity[word] for word, count in Counter(document).items() if word in rarity}
        norm = math.sqrt(sum(x * x for x in raw.values()))
        return {word: x / norm for word, x in raw.items()}

    pairs = [[(vector(q), vector(d)) for d in documents] for q in queries]
    return torch.tensor([[sum((x * d.get(word, 0) for word, x in q.items()), 0.0) for q, d in own] for own in pairs])


documents_of = st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=8)


@hypothesis.given(queries=documents_of, documents=documents_of.filter(any), k=st.integers(1, 10))
def test_nearest_by_the_formula(queries: list[list[int]], documents: list[list[int]], k: int) -> None:
    values, indices = tfidf_candidates(queries, documents, k)
    near = naive(queries, documents)
    assert values.shape == indices.shape == (len(queries), min(k, len(documents)))
    assert torch.allclose(values, near.sort(1, descending=True).values[:, :k], atol=1e-6)
    assert torch.allclose(near.gather(1, indices), values, atol=1e-6)


def test_texts_and_the_order_of_equals() -> None:
    values, indices = tfidf_candidates(["Hydrogen?", "a grey cat", "nothing known"], TEXTS, 3)
    assert indices.tolist() == [[0, 2, 1], [1, 3, 0], [0, 1, 2]]
    assert values.dtype == torch.float32 and indices.dtype == torch.int64
    assert bool((values[0] > 0).tolist() == [True, True, False]) and not values[2].any()


def test_tensors_generators_and_no_queries() -> None:
    documents = [[1, 2, 3], [3, 4], [5]]
    want = tfidf_candidates([[3, 5]], documents)
    for kind in (torch.tensor, tuple):
        got = tfidf_candidates((kind(q) for q in [[3, 5]]), (kind(d) for d in documents))
        assert all(map(torch.equal, got, want))
    values, indices = tfidf_candidates([], documents, 2)
    assert values.shape == indices.shape == (0, 2)


def test_scores_of_candidates_are_those_of_all_data() -> None:
    data = plain(20)
    words = [[int(x.argmax()), 9] for x in data.train.args[0]]
    values, indices = tfidf_candidates([[1]], words, 20)
    kept = indices[values > 0].unique()
    assert kept.tolist() == [i for i, own in enumerate(words) if own[0] == 1] and 0 < len(kept) < 20
    model = data.model()
    calculator = FirstOrderInfluenceCalculator(model, None, EKFACIHVP(model, batches(data.train, 7)))
    some = calculator.scores([data.tests[0]], batches(rows(data.train, kept), 3))
    assert_near(some, calculator.scores([data.tests[0]], [data.train])[:, kept])
    assert some.dtype == F64


@pytest.mark.parametrize(
    ("queries", "documents", "k", "error", "match"),
    [
        (["a"], ["word"], 0, ValueError, "k must be a whole number > 0, got 0"),
        (["a"], ["word"], 2.0, ValueError, "k must be a whole number > 0, got 2.0"),
        (["a"], [], 2, ValueError, "documents must hold one with a word, got none"),
        (["a"], ["", "."], 2, ValueError, "documents must hold one with a word, got none"),
        ([[1]], ["word"], 2, TypeError, r"queries\[0\] must be a text as the first of the documents, got numbers"),
        (["a"], [[1], "word"], 2, TypeError, r"documents\[1\] must be numbers of tokens as the first"),
        ([[1]], [[1.5]], 2, TypeError, r"documents\[0\] must be a text, or whole numbers \(T,\), got \[1.5\]"),
        ([torch.ones(2)], [[1]], 2, TypeError, r"queries\[0\] must be .* got torch.float32 \(2,\)"),
        ([torch.ones(2, 1, dtype=torch.long)], [[1]], 2, TypeError, r"got torch.int64 \(2, 1\)"),
        ([3], [[1]], 2, TypeError, r"queries\[0\] must be a text, or whole numbers \(T,\), got 3"),
    ],
)
def test_wrong_calls_are_named(queries: Any, documents: Any, k: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        tfidf_candidates(queries, documents, k)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return found(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install 'ihvp\[text\]'"):
        ihvp.tfidf_candidates(["a"], TEXTS)
