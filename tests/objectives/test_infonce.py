"""InfoNCE against double loops in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.objectives import ContrastiveBatch, InfoNCEConfig
from nearfield.objectives.infonce import InfoNCE


def make_batch(
    seed: int, queries: int = 5, dim: int = 8, positives: int = 2, negatives: int = 2, items: int = 1000
) -> ContrastiveBatch:
    random = np.random.default_rng(seed)
    owner, is_positive = [], []
    for row in range(queries):
        p, n = int(random.integers(1, positives + 1)), int(random.integers(0, negatives + 1))
        owner += [row] * (p + n)
        is_positive += [True] * p + [False] * n
    ids = random.choice(items, size=len(owner), replace=items < len(owner))
    known = [[int(ids[c]) for c in range(len(owner)) if owner[c] == row and is_positive[c]] for row in range(queries)]
    extra = [[*row, int(random.choice(ids))] for row in known]
    width = max(map(len, extra))
    return ContrastiveBatch(
        queries=torch.from_numpy(random.standard_normal((queries, dim))).requires_grad_(),
        documents=torch.from_numpy(random.standard_normal((len(owner), dim))).requires_grad_(),
        owner=torch.tensor(owner),
        is_positive=torch.tensor(is_positive),
        document_ids=torch.tensor(ids, dtype=torch.int64),
        known_positives=torch.tensor([row + [-1] * (width - len(row)) for row in extra]),
    )


def reference(batch: ContrastiveBatch, config: InfoNCEConfig) -> float:
    """The loss by loops over plain floats."""
    q, d = batch.queries.detach().numpy(), batch.documents.detach().numpy()
    if config.similarity == "cosine":
        q = q / np.linalg.norm(q, axis=1, keepdims=True)
        d = d / np.linalg.norm(d, axis=1, keepdims=True)
    logit = (q @ d.T) / config.temperature
    owner, positive, ids = batch.owner.tolist(), batch.is_positive.tolist(), batch.document_ids.tolist()
    known = [set(row) - {-1} for row in batch.known_positives.tolist()]

    def is_own_positive(row: int, column: int) -> bool:
        return owner[column] == row and positive[column]

    def is_negative(row: int, column: int) -> bool:
        if is_own_positive(row, column):
            return False
        return not (config.mask_known_positives and ids[column] in known[row])

    total = 0.0
    for row in range(len(q)):
        mine = [c for c in range(len(d)) if is_own_positive(row, c)]
        others = [c for c in range(len(d)) if is_negative(row, c) and (config.in_batch_negatives or owner[c] == row)]
        z = sum(math.exp(logit[row, c]) for c in others)
        if config.several_positives == "mean_log":
            forward = sum(-math.log(math.exp(logit[row, p]) / (math.exp(logit[row, p]) + z)) for p in mine) / len(mine)
        else:
            summed = sum(math.exp(logit[row, p]) for p in mine)
            forward = -math.log(summed / (summed + z))
        if not config.both_directions:
            total += forward
            continue
        backward = 0.0
        for p in mine:
            zq = sum(math.exp(logit[r, p]) for r in range(len(q)) if is_negative(r, p))
            backward += -math.log(math.exp(logit[row, p]) / (math.exp(logit[row, p]) + zq)) / len(mine)
        total += (forward + backward) / 2
    return total


CONFIGS = [
    InfoNCEConfig(
        temperature=t,
        similarity=s,
        in_batch_negatives=b,
        several_positives=p,
        both_directions=d,
        mask_known_positives=m,
    )
    for t, s, b, p, d, m in product(
        (0.05, 1.0), ("cosine", "dot"), (True, False), ("mean_log", "log_sum"), (True, False), (True, False)
    )
]


@pytest.mark.parametrize(
    "config",
    CONFIGS,
    ids=lambda c: (
        f"{c.temperature}-{c.similarity}-{c.in_batch_negatives}-{c.several_positives}-{c.both_directions}-{c.mask_known_positives}"
    ),
)
def test_equals_the_loops(config: InfoNCEConfig) -> None:
    for seed in range(3):
        batch = make_batch(seed, items=12)
        result = config.build()(batch)
        assert float(result.total.detach()) == pytest.approx(reference(batch, config), rel=1e-10)
        assert result.denominator == 5
        assert float(result.rows.sum()) == pytest.approx(float(result.total.detach()), rel=1e-12)


@given(seed=st.integers(0, 10**6), both=st.booleans(), kind=st.sampled_from(["mean_log", "log_sum"]))
@settings(max_examples=8, deadline=None)
def test_gradient_is_that_of_finite_differences(seed: int, both: bool, kind: str) -> None:
    objective = InfoNCEConfig(temperature=0.5, both_directions=both, several_positives=kind).build()
    batch = make_batch(seed, queries=4, dim=5, items=12)

    def loss(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return objective(
            ContrastiveBatch(q, d, batch.owner, batch.is_positive, batch.document_ids, batch.known_positives)
        ).total

    assert torch.autograd.gradcheck(loss, (batch.queries, batch.documents), fast_mode=True, eps=1e-6, atol=1e-6)


def test_gradient_identity_of_plain_infonce() -> None:
    """dL/ds_ic = (P_ic - 1[c = p_i]) / (tau B): each row sums to zero."""
    batch = make_batch(1, queries=6, dim=6, positives=1, negatives=1)
    identity = torch.eye(6, dtype=torch.float64)
    # With unit vectors as queries and dot products, the gradient of the documents is the gradient of the logits.
    plain = ContrastiveBatch(
        identity, batch.documents, batch.owner, batch.is_positive, batch.document_ids, torch.full((6, 1), -1)
    )
    result = InfoNCEConfig(temperature=0.3, similarity="dot").build()(plain)
    (gradient,) = torch.autograd.grad(result.total / result.denominator, batch.documents)
    logits = (identity @ batch.documents.detach().T) / 0.3
    target = torch.zeros_like(logits)
    for column, (row, positive) in enumerate(zip(batch.owner.tolist(), batch.is_positive.tolist(), strict=True)):
        target[row, column] = float(positive)
    expected = (torch.softmax(logits, dim=1) - target) / (0.3 * 6)
    torch.testing.assert_close(gradient.T, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient.sum(dim=0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-14)


def with_gradient(objective: InfoNCE, batch: ContrastiveBatch) -> tuple[float, list[torch.Tensor]]:
    """The summed loss over the batch's rows, and its gradient for queries, documents and what is learnt."""
    result = objective(batch)
    learnt = list(objective.parameters())
    gradients = torch.autograd.grad(result.total, [batch.queries, batch.documents, *learnt])
    return float(result.total.detach()), list(gradients)


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize(
    "config",
    [config for config in CONFIGS if config.temperature == 1.0],
    ids=lambda c: (
        f"{c.similarity}-{c.in_batch_negatives}-{c.several_positives}-{c.both_directions}-{c.mask_known_positives}"
    ),
)
def test_shares_of_the_rows_add_up_to_the_whole(config: InfoNCEConfig, learnt: bool) -> None:
    """Each process computes the loss of its rows against all documents; shares may be empty."""
    objective = config.model_copy(update={"learn_temperature": learnt, "temperature": 0.4}).build().double()
    batch = make_batch(11, items=12)
    total, gradients = with_gradient(objective, batch)
    whole_rows = objective(batch).rows
    for cuts in ((0, 5), (0, 2, 5), (0, 1, 3, 5), (0, 0, 4, 4, 5)):
        shares = [replace(batch, rows=torch.arange(start, stop)) for start, stop in pairwise(cuts)]
        parts = [with_gradient(objective, share) for share in shares]
        assert sum(part for part, _ in parts) == pytest.approx(total, rel=1e-12, abs=1e-12)
        for number, whole in enumerate(gradients):
            summed = torch.stack([part[number] for _, part in parts]).sum(dim=0)
            torch.testing.assert_close(summed, whole, rtol=1e-12, atol=1e-12)
        for share, (start, stop) in zip(shares, pairwise(cuts), strict=True):
            result = objective(share)
            assert result.denominator == 5, "the denominator is the whole batch's"
            torch.testing.assert_close(result.rows, whole_rows[start:stop], rtol=1e-12, atol=1e-12)


LEARNT = InfoNCEConfig(temperature=0.3, learn_temperature=True, temperature_bounds=(0.1, 0.9))


@pytest.mark.parametrize("both", [False, True])
def test_a_learnt_temperature_is_neutral_at_first(both: bool) -> None:
    fixed = InfoNCEConfig(temperature=0.3, both_directions=both).build()
    objective = LEARNT.model_copy(update={"both_directions": both}).build().double()
    assert [name for name, _ in objective.named_parameters()] == ["log_temperature"]
    assert objective.log_temperature.shape == (1,)
    objective.log_temperature.data.fill_(math.log(0.3))  # to the last bit of float64
    assert list(fixed.parameters()) == []
    batch = make_batch(4, items=12)
    total, gradients = with_gradient(objective, batch)
    expected, plain = with_gradient(fixed, batch)
    assert total == pytest.approx(expected, rel=1e-14)
    for ours, theirs in zip(gradients[:2], plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("both", "several"), list(product((False, True), ("mean_log", "log_sum"))))
def test_the_gradient_of_a_learnt_temperature(both: bool, several: str) -> None:
    objective = LEARNT.model_copy(update={"both_directions": both, "several_positives": several}).build().double()
    batch = make_batch(6, items=12)
    slope = with_gradient(objective, batch)[1][2]
    start, step = float(objective.log_temperature.detach()), 1e-6
    totals = []
    for moved in (start + step, start - step):
        objective.log_temperature.data.fill_(moved)
        totals.append(float(objective(batch).total.detach()))
    assert slope.item() == pytest.approx((totals[0] - totals[1]) / (2 * step), rel=1e-7)
    assert abs(slope.item()) > 0.1


@pytest.mark.parametrize(("asked", "used"), [(0.01, 0.1), (5.0, 0.9), (0.1, 0.1), (0.9, 0.9), (0.5, 0.5)])
def test_a_learnt_temperature_stays_within_its_bounds_and_can_come_back(asked: float, used: float) -> None:
    objective = LEARNT.build().double()
    objective.log_temperature.data.fill_(math.log(asked))
    assert float(objective.temperature.detach()) == pytest.approx(used, rel=1e-14)  # type: ignore[union-attr]
    batch = make_batch(8, items=12)
    total, (_, _, slope) = with_gradient(objective, batch)
    inside = InfoNCEConfig(temperature=used).build()
    assert total == pytest.approx(float(inside(batch).total.detach()), rel=1e-12)
    at_bound = LEARNT.build().double()
    at_bound.log_temperature.data.fill_(math.log(used))
    assert slope.item() == pytest.approx(with_gradient(at_bound, batch)[1][2].item(), rel=1e-10)
    assert slope.item() != 0


def test_order_of_the_rows_does_not_matter() -> None:
    batch = make_batch(3)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = ContrastiveBatch(
        batch.queries[order],
        batch.documents,
        torch.argsort(order)[batch.owner],
        batch.is_positive,
        batch.document_ids,
        batch.known_positives[order],
    )
    objective = InfoNCEConfig(both_directions=True).build()
    assert float(objective(permuted).total.detach()) == pytest.approx(float(objective(batch).total.detach()), rel=1e-12)


def test_a_row_without_negatives_has_no_loss_and_a_finite_gradient() -> None:
    queries = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    documents = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    same = torch.tensor([7, 7])
    batch = ContrastiveBatch(
        queries, documents, torch.tensor([0, 1]), torch.tensor([True, True]), same, torch.tensor([[7], [7]])
    )
    for config in (InfoNCEConfig(both_directions=True), InfoNCEConfig(several_positives="log_sum")):
        result = config.build()(batch)
        assert float(result.total.detach()) == 0
        gradients = torch.autograd.grad(result.total, (queries, documents))
        assert all(bool((g == 0).all()) for g in gradients)


def test_known_positives_are_never_negatives() -> None:
    """A duplicate of the positive, and another known positive, change nothing; without the mask they do."""
    base = make_batch(5, queries=3, positives=1, negatives=0)
    ids = base.document_ids.clone()
    known = torch.stack([ids, torch.full_like(ids, -1)], dim=1)
    known[0, 1] = ids[1]
    plain = ContrastiveBatch(base.queries, base.documents, base.owner, base.is_positive, ids, known)
    config = InfoNCEConfig(temperature=1.0, similarity="dot")
    logits = base.queries.detach() @ base.documents.detach().T
    expected = -torch.log_softmax(logits[0, [0, 2]], dim=0)[0]
    assert float(config.build()(plain).rows[0]) == pytest.approx(float(expected), rel=1e-12)
    unmasked = config.model_copy(update={"mask_known_positives": False})
    assert float(unmasked.build()(plain).rows[0]) == pytest.approx(
        float(-torch.log_softmax(logits[0], dim=0)[0]), rel=1e-12
    )


def test_half_precision_inputs_are_computed_in_float32() -> None:
    batch = make_batch(2)
    half = ContrastiveBatch(
        batch.queries.detach().bfloat16(),
        batch.documents.detach().bfloat16(),
        batch.owner,
        batch.is_positive,
        batch.document_ids,
        batch.known_positives,
    )
    assert InfoNCEConfig().build()(half).total.dtype == torch.float32
