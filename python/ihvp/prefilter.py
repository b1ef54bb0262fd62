"""Which training examples are worth a gradient, for a given query."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Document = str | Sequence[int] | Tensor
"""A text, or its tokens' numbers (T,)."""


def tfidf_candidates(
    queries: Iterable[Document], documents: Iterable[Document], k: int = 10_000
) -> tuple[Tensor, Tensor]:
    """The k documents nearest to each query by TF-IDF: those that share words with it which few documents have.

    Influence is then asked of these alone, for a query or for a batch of them:

        values, indices = ihvp.tfidf_candidates(query_texts, training_texts)
        kept = indices[values > 0].unique()
        loader = torch.utils.data.DataLoader(torch.utils.data.Subset(training_set, kept.tolist()), batch_size=64)
        for batch, values, found in calculator.top_k(test_loader, loader):
            found = kept[found]  # indices in the training set

    A document is a vector of counts of its words, times log((1 + N) / (1 + documents with the word)) + 1, divided by
    its norm; a query too, of the documents' words. Nearness is their dot product, the cosine. Words are what
    scikit-learn's TfidfVectorizer takes for them, or the numbers of tokens.

    Args:
        queries, documents: texts, or sequences or one-dimensional tensors of whole numbers; of one kind. Documents may
            come from a generator: what is kept of them is sparse.
        k: documents a query; all of them where there are fewer.

    Returns:
        (values (Q,k) float32, indices (Q,k) int64), nearest first, of equally near ones the earlier. A value of zero is
        a document that has no word of the query.

    Raises:
        ImportError: scikit-learn is missing. ValueError: no documents, no word in any of them, or k below 1.
        TypeError: something else than texts or whole numbers, named.

    Source: Grosse et al. 2023 (arXiv:2308.03296), section 3.2.1.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError("tfidf_candidates needs scikit-learn: pip install 'ihvp[text]'") from error
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a whole number > 0, got {k!r}")
    words = _Words(TfidfVectorizer().build_analyzer())
    vectorizer = TfidfVectorizer(analyzer=lambda found: found, dtype=np.float32)
    try:
        rows = vectorizer.fit_transform(words.of("documents", documents))
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        raise ValueError("documents must hold one with a word, got none") from error
    inverted = rows.T.tocsr()  # word by word the documents that have it: a query meets those of its own words
    own = list(words.of("queries", queries))
    k = min(k, inverted.shape[1])
    values, indices = torch.empty(len(own), k), torch.empty(len(own), k, dtype=torch.long)
    for q, query in enumerate(own):
        cosines = torch.from_numpy((vectorizer.transform([query]) @ inverted).toarray()[0])
        near, order = cosines.sort(descending=True, stable=True)
        values[q], indices[q] = near[:k], order[:k]
    return values, indices


class _Words:
    """The words of documents that are all of one kind."""

    def __init__(self, split: Callable[[str], list[str]]) -> None:
        self.split = split
        self.kind = ""

    def of(self, who: str, documents: Iterable[Document]) -> Iterator[list[Any]]:
        for i, document in enumerate(documents):
            kind = "a text" if isinstance(document, str) else "numbers of tokens"
            self.kind = self.kind or kind
            if kind != self.kind:
                raise TypeError(f"{who}[{i}] must be {self.kind} as the first of the documents, got {kind}")
            if isinstance(document, str):
                yield self.split(document)
                continue
            numbers = document.tolist() if isinstance(document, Tensor) else document
            if not isinstance(numbers, Sequence) or not all(isinstance(number, int) for number in numbers):
                got = f"{document.dtype} {tuple(document.shape)}" if isinstance(document, Tensor) else repr(document)
                raise TypeError(f"{who}[{i}] must be a text, or whole numbers (T,), got {got}")
            yield list(numbers)
