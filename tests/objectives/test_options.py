"""Every option: against loops, at its neutral value, and by the tests that its paper suggests."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss
from torch import Tensor

from nearfield.errors import BadInputError
from nearfield.objectives import ContrastiveBatch, InfoNCEConfig
from nearfield.objectives.config import FocalConfig, ScoreMaskConfig, SpreadConfig
from nearfield.objectives.infonce import InfoNCE, limits, spread
from nearfield.objectives.statistics import focal_weight
from tests.objectives.loops import row_losses
from tests.objectives.options import DIM, SOURCES, configs, random_batch

BOTH = pytest.mark.parametrize("implementation", ["dense", "blockwise"])


def build(implementation: str = "dense", **options: Any) -> InfoNCE:
    objective = InfoNCEConfig.model_validate({**options, "implementation": implementation}).build(SOURCES).double()
    objective.tile = 4
    return objective


def gradients(objective: InfoNCE, batch: ContrastiveBatch) -> tuple[Tensor, list[Tensor]]:
    result = objective(batch)
    mean = result.total / result.denominator
    return mean.detach(), list(torch.autograd.grad(mean, [batch.queries, batch.documents]))


def unit_batch(scores: Tensor, negatives: Tensor | None = None) -> ContrastiveBatch:
    """A batch whose queries are axes, so that similarities are the entries of documents: (Q, Q), (Q, n) scores."""
    size = len(scores)
    parts, owner, positive = [scores.T], list(range(size)), [True] * size
    if negatives is not None:
        parts.append(negatives.T)
        owner += [row % size for row in range(negatives.shape[1])]
        positive += [False] * negatives.shape[1]
    documents = torch.cat(parts).clone()
    ids = torch.arange(len(documents))
    return ContrastiveBatch(
        torch.eye(size, dtype=torch.float64).requires_grad_(),
        documents.requires_grad_(),
        torch.tensor(owner),
        torch.tensor(positive),
        ids,
        ids[:size, None],
        draw=1,
    )


@given(config=configs(), seed=st.integers(0, 2**32), size=st.integers(1, 5), negatives=st.integers(0, 2))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_equals_loops(config: InfoNCEConfig, seed: int, size: int, negatives: int) -> None:
    config = config.model_copy(
        update={"mixing": None, "spread": None, "learn_temperature": False, "tasks": {}, "implementation": "dense"}
    )
    batch = random_batch(seed, size, negatives=negatives)
    result = config.build(SOURCES)(batch)
    expected = row_losses(config, batch)
    torch.testing.assert_close(result.rows, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-11)
    assert result.denominator == pytest.approx(size if batch.weights is None else float(batch.weights.sum()))


NEUTRAL: list[dict[str, Any]] = [
    {"score_mask": {"margin": 1e9}},
    {"guide_mask": {"margin": 1e9}},
    {"score_mask": {"rule": "cut", "margin": 2.0}},
    {"hardness": {"alpha": 0.0}},
    {"hardness": {"alpha": 0.0, "detach": False}},
    {"focal": {"gamma": 0.0}},
    {"focal": {"gamma": 0.0, "detach": False}},
    {"matryoshka": {"dimensions": [DIM]}},
    {"label_smoothing": 0.0},
    {"spread": {"mean": 0.0, "second_moment": 0.0}},
    {"source_weights": {"a": 1.0}},
]


@BOTH
@pytest.mark.parametrize("options", NEUTRAL, ids=str)
def test_neutral_values_are_plain(options: dict[str, Any], implementation: str) -> None:
    batch = replace(random_batch(7, 9), weights=None)
    plain, expected = gradients(build(implementation), batch)
    mean, found = gradients(build(implementation, **options), batch)
    torch.testing.assert_close(mean, plain, rtol=1e-14, atol=0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@BOTH
def test_gradient_is_that_of_finite_differences(implementation: str) -> None:
    """B = 5, two explicit negatives, d = 8, float64, with all that is not piecewise constant."""
    objective = build(
        implementation,
        temperature=0.5,
        directions=["query_document", "query_query", "document_query", "document_document"],
        hardness={"alpha": 2.0, "detach": False},
        focal={"gamma": 1.5, "detach": False},
        label_smoothing=0.1,
        matryoshka={"dimensions": [3, 8], "weights": [0.5, 1.0]},
        spread={},
    )
    batch = random_batch(0, 5, dim=8, positives=1, negatives=2)

    def loss(q: Tensor, d: Tensor) -> Tensor:
        total: Tensor = objective(replace(batch, queries=q, documents=d)).total
        return total

    assert torch.autograd.gradcheck(loss, (batch.queries, batch.documents), fast_mode=True, eps=1e-6, atol=1e-6)


# Hardness (LLaVE)


@BOTH
def test_hardness_gradient_is_the_weighted_softmax(implementation: str) -> None:
    """dL/ds_ij = (P_ij - [i = j]) / (tau B), P the softmax of the weighted logits."""
    torch.manual_seed(0)
    scores = torch.rand(6, 6, dtype=torch.float64) * 2 - 1
    batch = unit_batch(scores)
    _, (_, found) = gradients(build(implementation, temperature=0.05, similarity="dot", hardness={"alpha": 2.0}), batch)
    eye = torch.eye(6, dtype=torch.float64)
    weighted = scores / 0.05 + 2.0 * scores * (1 - eye)
    torch.testing.assert_close(found.T, (weighted.softmax(1) - eye) / (0.05 * 6), rtol=1e-8, atol=1e-12)


@BOTH
def test_hardness_without_stop_gradient_is_off_by_the_known_factor(implementation: str) -> None:
    torch.manual_seed(1)
    batch = unit_batch(torch.rand(6, 6, dtype=torch.float64))
    found = [
        gradients(
            build(implementation, temperature=0.05, similarity="dot", hardness={"alpha": 2.0, "detach": detach}), batch
        )[1][1]
        for detach in (True, False)
    ]
    ratio = (found[1] / found[0])[~torch.eye(6, dtype=torch.bool)]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.1), rtol=1e-9, atol=0)


def test_loss_increases_with_alpha() -> None:
    batch = unit_batch(torch.rand(6, 6, dtype=torch.float64) + 0.01)
    values = [float(gradients(build(similarity="dot", hardness={"alpha": a}), batch)[0]) for a in (0.0, 1.0, 5.0, 9.0)]
    assert values == sorted(values) and values[0] < values[-1]


# Masks


@pytest.mark.parametrize(
    ("rule", "margin", "kept"),
    [("relative", -0.05, [0.56]), ("cut", 0.95, [0.58, 0.56]), ("absolute", 0.1, [0.58, 0.56])],
)
def test_rules_of_the_score_mask(rule: str, margin: float, kept: list[float]) -> None:
    """RzenEmbed's: at a positive of 0.6 the relative rule of 95 % drops 0.58 and keeps 0.56; the absolute keeps both."""
    scores = torch.full((3, 3), -0.2, dtype=torch.float64)
    scores[0] = torch.tensor([0.6, 0.58, 0.56], dtype=torch.float64)
    batch = unit_batch(scores)
    for implementation in ("dense", "blockwise"):
        objective = build(implementation, similarity="dot", score_mask={"rule": rule, "margin": margin})
        rows = objective(batch).rows
        expected = math.log1p(sum(math.exp((s - 0.6) / 0.05) for s in kept))
        assert float(rows[0]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule", ["absolute", "relative"])
def test_a_negative_score_of_the_positive_moves_the_limit_the_same_way(rule: str) -> None:
    """0.95 x -0.4 is above -0.4: the naive relative rule would keep what scores better than the positive."""
    positive = torch.tensor([[0.6, -0.4, 0.0]], dtype=torch.float64)
    for margin in (-0.05, 0.05):
        moved = limits(positive, ScoreMaskConfig.model_validate({"rule": rule, "margin": margin})) - positive
        assert bool((moved[0, :2].sign() == math.copysign(1, margin)).all())


def test_a_masked_candidate_has_no_gradient() -> None:
    torch.manual_seed(3)
    scores = torch.full((3, 3), 0.1, dtype=torch.float64) + torch.eye(3, dtype=torch.float64) * 0.4
    scores[0, 1] = 0.9
    scores[2, 1] = -0.3
    batch = unit_batch(scores)
    only = replace(batch, rows=torch.tensor([0]))
    for implementation in ("dense", "blockwise"):
        objective = build(implementation, similarity="dot", score_mask={"margin": 0.1})
        query, document = torch.autograd.grad(objective(only).total, [batch.queries, batch.documents])
        assert bool((document[1] == 0).all())
        assert bool((query[1:] == 0).all())
        moved = replace(only, documents=batch.documents.detach().clone())
        moved.documents[1, 0] = 0.95  # still above the limit: the loss does not see it
        assert float(objective(moved).total.detach()) == pytest.approx(float(objective(only).total.detach()), rel=1e-14)


@BOTH
def test_ties_are_kept_in_float32(implementation: str) -> None:
    """A copy of the positive scores as the positive; however its product is summed it stays a candidate."""
    torch.manual_seed(0)
    queries, documents = torch.randn(40, 384), torch.randn(40, 384)
    documents[20:] = documents[:20]
    queries[20:] = queries[:20]
    ids = torch.arange(40)
    batch = ContrastiveBatch(queries, documents, ids, torch.ones(40, dtype=torch.bool), ids, ids[:, None])
    objective = build(implementation, score_mask={"margin": 0.0}).float()
    # Each query has itself twice among the documents, and nothing else above it: ln 2 and a little.
    rows = objective(batch).rows
    assert bool((rows >= math.log(2) - 1e-4).all())


def test_guide_mask_as_the_student_keeps_what_is_below_the_positive() -> None:
    batch = replace(random_batch(5, 7, repeats=False), weights=None)
    same = replace(batch, guide_queries=batch.queries.detach(), guide_documents=batch.documents.detach())
    by_guide, a = gradients(build(guide_mask={}), same)
    by_score, b = gradients(build(score_mask={}), same)
    torch.testing.assert_close(by_guide, by_score, rtol=1e-12, atol=0)
    for ours, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_identical_rows_are_masked_whatever_the_guide_says() -> None:
    """The guide gives a copy of a pair the score 1 of the pair itself: diagonals must not depend on it."""
    base = random_batch(2, 4, positives=1, negatives=0, repeats=False)
    order = torch.tensor([0, 1, 2, 0])
    copied = base.queries.detach()[order]
    same = ContrastiveBatch(
        copied.clone().requires_grad_(),
        copied.clone().requires_grad_(),
        torch.arange(4),
        torch.ones(4, dtype=torch.bool),
        order,
        order[:, None],
        query_ids=order,
        guide_queries=copied,
        guide_documents=copied,
    )
    directions = ["query_document", "query_query", "document_query", "document_document"]
    for implementation in ("dense", "blockwise"):
        mean, found = gradients(build(implementation, directions=directions, guide_mask={}), same)
        assert bool(torch.isfinite(mean)) and float(mean) < 1e-3
        assert all(bool(torch.isfinite(g).all()) for g in found)
        assert found[0].shape == copied.shape


def test_masks_that_lack_their_input_are_refused() -> None:
    batch = random_batch(1, 3)
    for options, missing in (
        ({"guide_mask": {}}, {"guide_queries": None}),
        ({"mask_same_label": True}, {"labels": None}),
        ({"source_weights": {"a": 2.0}}, {"sources": None}),
        ({"mixing": {}}, {"draw": None}),
        ({"matryoshka": {"dimensions": [DIM + 1]}}, {}),
    ):
        with pytest.raises(BadInputError):
            build(**options)(replace(batch, **missing))  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="there is no source 'd'"):
        build(source_weights={"d": 1.0})


# Focal weights (KaLM)


def test_focal_weights() -> None:
    loss = -torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    weights = focal_weight(loss, FocalConfig(gamma=0.5))
    torch.testing.assert_close(weights, torch.tensor([0.1**0.5, 0.9**0.5], dtype=torch.float64))
    assert [round(float(w), 3) for w in weights] == [0.316, 0.949]


@pytest.mark.parametrize("detach", [True, False])
def test_focal_weights_of_solved_and_hopeless_rows(detach: bool) -> None:
    scores = torch.zeros(3, 3, dtype=torch.float64) + torch.diag(
        torch.tensor([500.0, -500.0, 0.0], dtype=torch.float64)
    )
    batch = unit_batch(scores)
    objective = build(similarity="dot", temperature=1.0, focal={"gamma": 0.5, "detach": detach})
    mean, found = gradients(objective, batch)
    assert bool(torch.isfinite(mean)) and all(bool(torch.isfinite(g).all()) for g in found)
    rows = objective(batch).rows
    assert float(rows[0]) == 0 and 500 < float(rows[1]) < 502


# Temperatures of tasks (RzenEmbed)


@BOTH
def test_a_batch_of_one_task_leaves_other_temperatures_alone(implementation: str) -> None:
    objective = build(implementation, learn_temperature=True, tasks={"a": "one", "b": "two"})
    assert objective.tasks == ["", "one", "two"]
    batch = replace(random_batch(1, 5), sources=torch.full((5,), 1))
    (slope,) = torch.autograd.grad(objective(batch).total, list(objective.parameters()))
    assert slope[2] != 0 and slope[0] == slope[1] == 0


# Mixing (KaLM)


def repeated_batch(count: int) -> ContrastiveBatch:
    base = random_batch(4, 4, positives=1, negatives=0, repeats=False)
    negative = torch.randn(4, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    documents = torch.cat([base.documents.detach(), negative.repeat_interleave(count, dim=0)])
    owner = torch.cat([base.owner, torch.arange(4).repeat_interleave(count)])
    positive = torch.cat([base.is_positive, torch.zeros(4 * count, dtype=torch.bool)])
    ids = torch.arange(len(owner))
    known = ids[:4][torch.argsort(base.owner)][:, None]
    return ContrastiveBatch(base.queries, documents.requires_grad_(), owner, positive, ids, known, draw=5)


def test_mixtures_of_one_negative_are_that_negative() -> None:
    """With one negative a row, a pair and a list each repeat it."""
    mixed, _ = gradients(build(mixing={}, shared_negatives=False), repeated_batch(1))
    plain, _ = gradients(build(shared_negatives=False), repeated_batch(3))
    torch.testing.assert_close(mixed, plain, rtol=1e-12, atol=0)


def test_mixtures_are_drawn_again_the_same_and_belong_to_their_row() -> None:
    batch = random_batch(3, 6, negatives=3, repeats=False)
    objective = build(mixing={"pairs": 2}, shared_negatives=False)
    rows = objective(batch).rows
    torch.testing.assert_close(objective(batch).rows, rows, rtol=0, atol=0)
    assert bool((objective(replace(batch, draw=99)).rows != rows).any())
    part = objective(replace(batch, rows=torch.tensor([2, 3, 4]))).rows
    torch.testing.assert_close(part, rows[2:5], rtol=1e-12, atol=0)
    other = batch.documents.detach().clone()
    other[(batch.owner == 0) & ~batch.is_positive] *= torch.linspace(-1, 1, DIM, dtype=torch.float64)
    moved = objective(replace(batch, documents=other)).rows
    torch.testing.assert_close(moved[1:], rows[1:], rtol=1e-12, atol=0)
    assert moved[0] != rows[0] or not bool(((batch.owner == 0) & ~batch.is_positive).any())


def test_mixtures_have_unit_length_and_their_score_is_the_mean_of_the_parts() -> None:
    from nearfield.objectives.config import MixingConfig
    from nearfield.objectives.infonce import mixed_scores

    batch = random_batch(8, 5, negatives=3, repeats=False)
    negatives = (~batch.is_positive).nonzero().squeeze(1)
    rows, row = torch.arange(5), batch.owner[negatives]
    config = MixingConfig(pairs=0, lists=True)
    scores, has = mixed_scores(config, batch, rows, negatives, row, [DIM], True)
    assert scores.shape == (1, 5, 1)
    unit = torch.nn.functional.normalize(batch.documents.detach()[negatives], dim=1)
    query = torch.nn.functional.normalize(batch.queries.detach(), dim=1)
    for r in range(5):
        mine = unit[row == r]
        assert bool(has[r]) == bool(len(mine))
        if len(mine):
            share = torch.softmax(mine @ query[r] / 0.05, dim=0)
            mixture = share @ mine
            assert float(scores[0, r, 0]) * float(mixture.norm()) == pytest.approx(float(share @ (mine @ query[r])))


# Matryoshka


@BOTH
def test_prefixes(implementation: str) -> None:
    batch = random_batch(6, 9)
    full, expected = gradients(build(implementation), batch)
    twice, found = gradients(
        build(implementation, matryoshka={"dimensions": [DIM, DIM], "weights": [0.25, 0.5]}), batch
    )
    torch.testing.assert_close(twice, 0.75 * full, rtol=1e-12, atol=0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, 0.75 * theirs, rtol=1e-10, atol=1e-14)
    short = build(implementation, matryoshka={"dimensions": [3, 5]})
    mean, found = gradients(short, batch)
    assert all(bool((g[:, 5:] == 0).all()) and bool((g[:, :5] != 0).any()) for g in found)
    noisy = batch.documents.detach().clone()
    noisy[:, 5:] = torch.randn(len(noisy), DIM - 5, dtype=torch.float64)
    again, _ = gradients(short, replace(batch, documents=noisy.requires_grad_()))
    torch.testing.assert_close(again, mean, rtol=1e-14, atol=0)


# Spread


@pytest.mark.parametrize(("mean", "second"), [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_spread_equals_the_matrix_of_similarities(mean: float, second: float) -> None:
    vectors = torch.randn(30, 6, dtype=torch.float64) + 0.3
    theirs = GlobalOrthogonalRegularizationLoss(None, mean_weight=mean, second_moment_weight=second)  # type: ignore[arg-type]
    expected = sum(theirs.compute_loss_from_embeddings([vectors]).values())
    found = spread(SpreadConfig(mean=mean, second_moment=second), vectors)
    assert float(found) == pytest.approx(float(expected), rel=1e-10)
    assert float(spread(SpreadConfig(), vectors[:1])) == 0


@BOTH
def test_shares_of_the_rows_add_up_with_the_regulariser(implementation: str) -> None:
    batch = random_batch(9, 7)
    objective = build(implementation, spread={}, source_weights={"a": 2.0}, label_smoothing=0.1)
    whole = objective(batch)
    parts = [objective(replace(batch, rows=torch.arange(*edges))) for edges in ((0, 3), (3, 3), (3, 7))]
    assert sum(float(part.total.detach()) for part in parts) == pytest.approx(float(whole.total.detach()), rel=1e-12)
    assert {part.denominator for part in parts} == {whole.denominator}
