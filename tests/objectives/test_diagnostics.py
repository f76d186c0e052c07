"""The figures of a batch against loops over plain floats."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nearfield.objectives import InfoNCEConfig, diagnostics, infonce
from nearfield.objectives.diagnostics import effective_rank, geometry, similarities, watch, watched_rows
from nearfield.objectives.infonce import InfoNCE
from tests.objectives.options import SOURCES, random_batch

MASKS: dict[str, Any] = {
    "mask_known_positives": True,
    "mask_same_label": True,
    "score_mask": {"rule": "absolute", "margin": 0.1},
    "guide_mask": {"rule": "absolute", "margin": 0.0},
}


def objective(**settings: Any) -> InfoNCE:
    return InfoNCEConfig.model_validate({"temperature": 0.2, **settings}).build(SOURCES).double()


class Cells:
    """The cells of a batch that a mask leaves out, one by one."""

    def __init__(self, batch: Any, config: InfoNCEConfig) -> None:
        self.batch, self.config = batch, config
        unit = torch.nn.functional.normalize
        self.cosine = (unit(batch.queries) @ unit(batch.documents).T).detach().tolist()
        self.guide = (unit(batch.guide_queries) @ unit(batch.guide_documents).T).tolist()
        self.owner, self.positive = batch.owner.tolist(), batch.is_positive.tolist()
        self.labels = batch.labels.tolist()

    def candidates(self, row: int) -> list[int]:
        """Without masks: documents of others, own explicit negatives."""
        config = self.config
        found = []
        for c, owner in enumerate(self.owner):
            if owner == row:
                keep = not self.positive[c]
            else:
                keep = config.in_batch_negatives and (config.shared_negatives or self.positive[c])
            found += [c] if keep else []
        return found

    def masked(self, why: str, row: int, c: int) -> bool:
        known = [i for i in self.batch.known_positives[row].tolist() if i >= 0]
        if why == "known_positive":
            return int(self.batch.document_ids[c]) in known
        if why == "same_label":
            label = self.labels[self.owner[c]] if self.positive[c] else -1
            return self.labels[row] == label and label >= 0
        scores, margin = (self.cosine, 0.1) if why == "score" else (self.guide, 0.0)
        best = max(scores[row][d] for d in range(len(self.owner)) if self.owner[d] == row and self.positive[d])
        return bool(scores[row][c] > best + margin + 1e-9)

    def reasons(self) -> list[str]:
        return [why for why, name in infonce.REASONS.items() if getattr(self.config, name)]

    def kept(self, row: int) -> list[int]:
        return [c for c in self.candidates(row) if not any(self.masked(why, row, c) for why in self.reasons())]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        MASKS,
        {**MASKS, "several_positives": "log_sum", "focal": {"gamma": 0.5}, "source_weights": {"a": 0.5, "b": 3.0}},
        {"hardness": {"alpha": 2.0, "on": "all"}, "focal": {"gamma": 2.0}, "shared_negatives": False},
        {"in_batch_negatives": False, "hardness": {"alpha": 1.0, "on": "explicit"}},
        {"both_directions": True, "matryoshka": {"dimensions": [4, 12]}},
    ],
)
def test_the_softmax_is_that_of_plain_loops(settings: dict[str, Any], seed: int) -> None:
    batch = random_batch(seed, 9)
    built = objective(**settings)
    found = built.watch(batch)
    cells = Cells(batch, built.config)
    rows = range(9)
    every = sum(len(cells.candidates(row)) for row in rows)
    kept = sum(len(cells.kept(row)) for row in rows)
    assert found["masked_share"] == pytest.approx(1 - kept / every)
    assert found["negatives"] == pytest.approx(kept / 9)
    for why in cells.reasons():
        masked = sum(cells.masked(why, row, c) for row in rows for c in cells.candidates(row))
        assert found[f"masked_{why}"] == pytest.approx(masked / every)
    config = built.config
    assert batch.sources is not None
    numbers, gradients, weights = [], [], []
    for row in rows:

        def logit(c: int, row: int = row) -> float:
            own = cells.owner[c] == row
            on = {"in_batch": not own, "explicit": own, "all": True}
            extra = config.hardness.alpha * cells.cosine[row][c] if config.hardness and on[config.hardness.on] else 0
            return float(cells.cosine[row][c] / 0.2 + extra)

        weight = 1.0 if batch.weights is None else float(batch.weights[row])
        weight *= config.source_weights.get(SOURCES[int(batch.sources[row])], 1.0)
        negative = [math.exp(logit(c)) for c in cells.kept(row)]
        positive = [
            math.exp(cells.cosine[row][c] / 0.2)
            for c in range(len(cells.owner))
            if cells.owner[c] == row and cells.positive[c]
        ]
        if config.several_positives == "log_sum":
            positive = [sum(positive)]
        focal = [1.0 if config.focal is None else (1 - p / (p + sum(negative))) ** config.focal.gamma for p in positive]
        for e in negative:
            shares = [f * e / (p + sum(negative)) for f, p in zip(focal, positive, strict=True)]
            gradients.append(weight * sum(shares) / len(shares))
        if negative:
            numbers.append(sum(negative) ** 2 / sum(e * e for e in negative))
        weights.append(weight * sum(focal) / len(focal))
    assert found["effective_negatives"] == pytest.approx(sum(numbers) / len(numbers))
    top = sorted(gradients, reverse=True)[: math.ceil(len(gradients) / 100)]
    assert found["hardest_gradient_share"] == pytest.approx(sum(top) / sum(gradients))
    assert found["effective_examples"] == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / 9)
    assert found["temperature"] == 0.2


def test_the_gradient_of_the_hardest_is_that_of_autograd() -> None:
    """The share that the figure tells is of the gradient that autograd gives to the negatives' similarities."""
    batch = random_batch(3, 12, positives=1, negatives=0, repeats=False)
    batch = replace(batch, weights=None)
    cosine = (
        (torch.nn.functional.normalize(batch.queries) @ torch.nn.functional.normalize(batch.documents).T)
        .detach()
        .requires_grad_()
    )
    order = torch.argsort(batch.owner)
    loss = torch.nn.functional.cross_entropy(cosine[:, order] / 0.2, torch.arange(12))
    (gradient,) = torch.autograd.grad(loss, cosine)
    negatives = gradient[gradient > 0]
    share = float(negatives.topk(2).values.sum() / negatives.sum())  # 1 % of 132 cells, rounded up
    assert objective().watch(batch)["hardest_gradient_share"] == pytest.approx(share)


def test_neutral_figures() -> None:
    """Equal negatives count each; without weights all examples count; without masks nothing is left out."""
    queries = torch.eye(4, dtype=torch.float64)
    batch = replace(
        random_batch(0, 4, positives=1, negatives=0, repeats=False),
        queries=queries,
        documents=queries.clone(),
        owner=torch.arange(4),
        is_positive=torch.ones(4, dtype=torch.bool),
        document_ids=torch.arange(4),
        known_positives=torch.arange(4)[:, None],
        query_ids=torch.arange(4),
        weights=None,
        labels=None,
        sources=None,
    )
    found = {**similarities(batch), **watch(objective(mask_known_positives=False), batch)}
    assert found == pytest.approx(
        {
            "positive_similarity": 1.0,
            "hardest_negative_similarity": 0.0,
            "alignment": 0.0,
            "uniformity": -4.0,
            "effective_rank": 4.0,
            "rank_limit": 4.0,
            "masked_share": 0.0,
            "negatives": 3.0,
            "effective_negatives": 3.0,
            "hardest_gradient_share": 1 / 12,
            "effective_examples": 1.0,
            "temperature": 0.2,
        },
        abs=1e-12,
    )


def test_temperatures_of_tasks() -> None:
    built = objective(learn_temperature=True, tasks={"a": "search", "b": "sts"})
    with torch.no_grad():
        built.log_temperature.copy_(torch.tensor([0.1, 0.3, 0.5]).log())
    found = built.watch(random_batch(1, 5))
    assert found["temperature"] == pytest.approx(0.3)
    assert [found[f"temperature/{name}"] for name in ("other", "search", "sts")] == pytest.approx([0.1, 0.3, 0.5])


def test_geometry_is_that_of_plain_loops() -> None:
    batch = random_batch(5, 8)
    found = {**similarities(batch), **geometry(batch)}
    unit = [[v / np.linalg.norm(v) for v in side.detach().numpy()] for side in (batch.queries, batch.documents)]
    pairs = [(int(o), c) for c, o in enumerate(batch.owner) if batch.is_positive[c]]
    assert found["alignment"] == pytest.approx(np.mean([((unit[0][r] - unit[1][c]) ** 2).sum() for r, c in pairs]))
    assert found["positive_similarity"] == pytest.approx(np.mean([unit[0][r] @ unit[1][c] for r, c in pairs]))
    hardest = []
    for row in range(8):
        known = set(batch.known_positives[row].tolist())
        own = {c for r, c in pairs if r == row}
        scores = [
            unit[0][row] @ v for c, v in enumerate(unit[1]) if c not in own and int(batch.document_ids[c]) not in known
        ]
        hardest += [max(scores)] if scores else []
    assert found["hardest_negative_similarity"] == pytest.approx(np.mean(hardest))
    assert batch.query_ids is not None
    spreads, kept = [], []
    for vectors, ids in zip(unit, (batch.query_ids.tolist(), batch.document_ids.tolist()), strict=True):
        first = [v for i, v in enumerate(vectors) if ids.index(ids[i]) == i]
        energies = [math.exp(-2 * ((a - b) ** 2).sum()) for i, a in enumerate(first) for b in first[i + 1 :]]
        spreads.append(math.log(sum(energies) / len(energies)))
        kept += first
    assert found["uniformity"] == pytest.approx(np.mean(spreads))
    values = np.linalg.svd(np.stack(kept), compute_uv=False)
    shares = values / values.sum()
    assert found["effective_rank"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert found["rank_limit"] == min(len(kept), 12)


def test_rank_of_collapsed_and_of_random_vectors() -> None:
    """Vectors of two classes, each alike, have rank at most 2; random ones have nearly the dimension."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    assert float(effective_rank(classes[torch.arange(100) % 2])) <= 2 + 1e-9
    random = torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    assert float(effective_rank(random)) == pytest.approx(16, abs=0.05)


def test_a_large_batch_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, drawn by the step's seed, all documents; the figures are those of the drawn rows."""
    batch = random_batch(7, 60)
    everything = watched_rows(batch)
    assert everything.tolist() == list(range(60))
    monkeypatch.setattr(diagnostics, "CELLS", 20 * len(batch.documents))
    rows = watched_rows(batch)
    assert len(rows) == 20
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert rows.tolist() == watched_rows(batch).tolist()
    assert rows.tolist() != watched_rows(replace(batch, draw=8)).tolist()
    found = objective(**MASKS).watch(batch)
    cells = Cells(batch, objective(**MASKS).config)
    every = sum(len(cells.candidates(row)) for row in rows.tolist())
    kept = sum(len(cells.kept(row)) for row in rows.tolist())
    assert found["masked_share"] == pytest.approx(1 - kept / every)


def test_never_a_whole_matrix_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that a look makes does not grow with the square of the batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        cells = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
            out = function(*arguments, **(keywords or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.cells = max(self.cells, tensor.numel())
            return out

    monkeypatch.setattr(diagnostics, "CELLS", 2**14)
    batch = random_batch(2, 3000, negatives=1, dtype=torch.float32)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        similarities(batch)
        watch(objective(**MASKS).float(), batch)
    assert largest.cells <= max(16 * len(batch.documents), diagnostics.ROWS**2) < 3000**2 / 10


def test_a_row_without_negatives_and_a_batch_without_any() -> None:
    batch = random_batch(4, 3, negatives=0)
    found = objective(in_batch_negatives=False).watch(batch)
    assert found == pytest.approx(
        {"negatives": 0.0, "effective_examples": found["effective_examples"], "temperature": 0.2}
    )
    alone = random_batch(4, 1, positives=1, negatives=0)
    assert "hardest_negative_similarity" not in similarities(alone)
    assert all(math.isfinite(value) for value in watch(objective(**MASKS), alone).values())
