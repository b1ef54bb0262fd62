"""Influence for a language model, the whole way: candidates by their words, queries of low rank, scores by token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ihvp
import pytest
import torch
import torch.nn.functional as F
from ihvp import (
    EKFACIHVP,
    Batch,
    FirstOrderInfluenceCalculator,
    IdentityIHVP,
    InfluenceModel,
    tfidf_candidates,
)
from nets import assert_near, cross_entropy
from torch import Tensor, nn

CAPITALS = {
    "france": "paris", "spain": "madrid", "italy": "rome", "norway": "oslo", "peru": "lima", "egypt": "cairo",
    "cuba": "havana", "kenya": "nairobi", "japan": "tokyo", "greece": "athens",
}  # fmt: skip
FORMS = (
    "the capital of {} is {}",
    "{} has its seat of government in {}",
    "travel to {} and visit {}",
    "we say that {} is led from {}",
)
PAD = 0
README = Path(__file__).parent.parent / "README.md"


class Transformer(nn.Module):
    """One causal block of one head."""

    def __init__(self, words: int, width: int = 32, positions: int = 10) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1]))
        own = F.layer_norm(h, h.shape[-1:])
        q, k, v = self.q(own), self.k(own), self.v(own)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        h = h + self.o(((q @ k.mT) / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf).softmax(-1) @ v)
        h = h + self.down(F.gelu(self.up(F.layer_norm(h, h.shape[-1:]))))
        return self.head(F.layer_norm(h, h.shape[-1:]))


@dataclass
class Trained:
    texts: list[str]
    owners: list[str]  # the country that each text is about
    words: dict[str, int]
    model: InfluenceModel

    def batch(self, texts: list[str]) -> Batch:
        ids = [torch.tensor([self.words[word] for word in ("<s>", *text.split())]) for text in texts]
        whole = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
        return Batch(args=(whole[:, :-1],), targets=whole[:, 1:], mask=whole[:, 1:] != PAD)

    def batches(self, texts: list[str], size: int = 16) -> list[Batch]:
        return [self.batch(texts[i : i + size]) for i in range(0, len(texts), size)]


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    pairs = [(form.format(*pair), pair[0]) for pair in CAPITALS.items() for form in FORMS]
    texts, owners = map(list, zip(*pairs, strict=True))
    words = {word: i + 1 for i, word in enumerate(sorted({word for text in texts for word in text.split()} | {"<s>"}))}
    net = Transformer(len(words) + 1).double()  # what it learns is then the same on every processor
    own = Trained(texts, owners, words, InfluenceModel(net, cross_entropy, layers=[nn.Linear], progress=False))
    data = own.batch(texts)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (cross_entropy(net(*data.args), data.targets) * data.mask).sum(1).mean().backward()
        optimizer.step()
    net.eval()
    net.zero_grad(set_to_none=True)
    return own


def answer(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of the last word alone."""
    losses = cross_entropy(outputs, targets)
    return torch.cat([torch.zeros_like(losses[:, :-1]), losses[:, -1:]], dim=1)


def calculator(trained: Trained, **options: Any) -> FirstOrderInfluenceCalculator:
    data = trained.batches(trained.texts)
    curvature = EKFACIHVP(trained.model, data, damping="auto")
    return FirstOrderInfluenceCalculator(trained.model, data, curvature, measurement=answer, **options)


QUERIES = [FORMS[0].format(*pair) for pair in CAPITALS.items()]


@pytest.mark.parametrize("rank", [None, 16, 1])
def test_a_fact_leads_to_the_sentences_that_tell_it(trained: Trained, rank: int | None) -> None:
    """Four of forty do; by chance one of ten found ones would. A query of rank one still knows."""
    own = calculator(trained, query_rank=rank, normalize=True)
    [(_, _, indices)] = own.top_k([trained.batch(QUERIES)], k=4)
    right = [
        [trained.owners[i] == country for i in row] for row, country in zip(indices.tolist(), CAPITALS, strict=True)
    ]
    assert sum(map(sum, right)) >= 32
    assert sum(row[0] for row in right) == len(CAPITALS)


@pytest.mark.parametrize("of", ["position", "loss"])
def test_the_word_that_tells_it_has_the_score(trained: Trained, of: str) -> None:
    """In the sentence that is the query itself, and in another that ends in the same word."""
    own = calculator(trained)
    apart = torch.cat([padded(x, 10) for _, x in own.scores_by_token([trained.batch(QUERIES)], of=of)], dim=1)
    for q in range(len(QUERIES)):
        for form in (0, 1):
            text = trained.texts[4 * q + form]
            assert int(apart[q, 4 * q + form].argmax()) == len(text.split()) - 1, text


def padded(x: Tensor, T: int) -> Tensor:
    return F.pad(x, (0, T - x.shape[2]))


def test_candidates_by_words_keep_what_matters(trained: Trained) -> None:
    """Less than half of the gradients, and the best examples of three queries are the same."""
    own, queries = calculator(trained), trained.batch(QUERIES[:3])
    values, indices = tfidf_candidates(QUERIES[:3], trained.texts, 6)
    kept = indices[values > 0].unique()
    assert len(kept) < len(trained.texts) / 2
    some = own.scores([queries], trained.batches([trained.texts[i] for i in kept.tolist()]))
    assert torch.equal(kept[some.topk(3).indices], own.scores([queries]).topk(3).indices)


# --- as the README says -------------------------------------------------------------------------------------------


class HuggingFace(nn.Module):
    """The arguments and the result of a model of that library."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.inner(input_ids))


def test_the_batches_of_a_tokenizer(trained: Trained) -> None:
    """The README's code, over the whole sequences; the last position has no target and no share."""
    code = re.search(r"```python\n(def next_tokens.*?\n)\nmodel = ", README.read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"torch": torch, "ihvp": ihvp}
    exec(code[1], names)
    loss_fn, next_tokens = names["loss_fn"], names["next_tokens"]

    def tokenized(texts: list[str]) -> dict[str, Tensor]:
        own = trained.batch(texts)
        ids = torch.cat([own.args[0], own.targets[:, -1:]], dim=1)
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}

    net = HuggingFace(trained.model.net)
    model = InfluenceModel(net, loss_fn, layers=[nn.Linear], process_batch=next_tokens, progress=False)
    data, queries = [tokenized(trained.texts[i : i + 16]) for i in (0, 16, 32)], [tokenized(QUERIES)]
    outer, inner = (
        FirstOrderInfluenceCalculator(own, loader, IdentityIHVP(own), query_rank=40)
        for own, loader in ((model, data), (trained.model, trained.batches(trained.texts)))
    )
    assert_near(outer.scores(queries), inner.scores([trained.batch(QUERIES)]).double(), 1e-4)
    found = [scores for _, scores in outer.scores_by_token(queries, of="loss")]
    want = [scores for _, scores in inner.scores_by_token([trained.batch(QUERIES)], of="loss")]
    for got, own in zip(found, want, strict=True):
        assert_near(got[..., :-1], own.double(), 1e-4)
        assert not got[..., -1].any()
    sampled = EKFACIHVP(model, data, damping="auto", fisher="sampled")
    assert FirstOrderInfluenceCalculator(model, data, sampled).scores(queries).shape == (10, 40)
