"""Graded pairs, triplets, distillation, labels, decisions: against sentence-transformers' classes and plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from sentence_transformers.sentence_transformer import losses
from torch import Tensor
from torch.nn.functional import normalize

from nearfield.errors import BadInputError
from nearfield.methods.unicom import Unicom
from nearfield.objectives import ContrastiveBatch, Objective, ObjectiveConfig
from nearfield.objectives import batch as batch_module
from nearfield.objectives.config import Surroundings

DIM, GUIDE = 8, 5
NOTHING: Any = None
"""The model of sentence-transformers' losses, of which only the function of embeddings is called."""


def build(around: Surroundings | None = None, **settings: Any) -> Objective:
    built: Objective = TypeAdapter(ObjectiveConfig).validate_python(settings).build((), around).double()
    return built


def make(queries: int = 6, negatives: int = 2, seed: int = 0) -> ContrastiveBatch:
    """Each query brings a positive and so many negatives, with all that an objective may ask for; nothing occurs twice."""
    draw = torch.Generator().manual_seed(seed)

    def floats(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    count = queries * (1 + negatives)
    return ContrastiveBatch(
        queries=floats(queries, DIM).requires_grad_(),
        documents=floats(count, DIM).requires_grad_(),
        owner=torch.arange(queries).repeat_interleave(1 + negatives),
        is_positive=torch.arange(count) % (1 + negatives) == 0,
        document_ids=torch.arange(count) + 100,
        known_positives=torch.arange(0, count, 1 + negatives)[:, None] + 100,
        query_ids=torch.arange(queries),
        labels=torch.arange(queries) % 3,
        scores=torch.rand(queries, generator=draw, dtype=torch.float64).mul(5).round() / 5,
        teacher_scores=floats(count),
        guide_queries=normalize(floats(queries, GUIDE), dim=1),
        guide_documents=normalize(floats(count, GUIDE), dim=1),
        query_tokens=torch.randint(-1, 7, (queries, 3), generator=draw),
        draw=seed,
    )


def columns(batch: ContrastiveBatch) -> list[Tensor]:
    """As sentence-transformers has them: queries, positives, negatives ..."""
    width = len(batch.documents) // len(batch.queries)
    return [batch.queries, *batch.documents.view(len(batch.queries), width, -1).unbind(1)]


def table(values: Tensor, batch: ContrastiveBatch) -> Tensor:
    return values.view(len(batch.queries), -1)


def mean(objective: Objective, batch: ContrastiveBatch) -> Tensor:
    found = objective(batch)
    assert found.rows.shape == (len(batch.local_rows()),)
    loss: Tensor = found.total / found.denominator
    return loss


def gradients(loss: Tensor, batch: ContrastiveBatch) -> tuple[Tensor, ...]:
    found = torch.autograd.grad(loss, [batch.queries, batch.documents], allow_unused=True, retain_graph=True)
    sides = (batch.queries, batch.documents)
    return tuple(torch.zeros_like(side) if g is None else g for g, side in zip(found, sides, strict=True))


def assert_same(ours: Tensor, theirs: Tensor, batch: ContrastiveBatch, tolerance: float = 1e-12) -> None:
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=tolerance)
    for a, b in zip(gradients(ours, batch), gradients(theirs, batch), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max())))


SETTINGS: dict[str, dict[str, Any]] = {
    "cosent": {"kind": "cosent"},
    "angle": {"kind": "angle"},
    "cosine_regression": {"kind": "cosine_regression"},
    "triplet": {"kind": "triplet", "margin": 0.5},
    "triplet, euclidean": {"kind": "triplet", "distance": "euclidean", "margin": 1.0},
    "kl of own": {"kind": "distil_scores", "temperature": 0.5, "teacher_temperature": 2.0},
    "kl in batch": {"kind": "distil_scores", "teacher": "vectors", "candidates": "in_batch", "temperature": 0.1},
    "margin mse": {"kind": "distil_scores", "loss": "margin_mse"},
    "margin mse of vectors": {"kind": "distil_scores", "loss": "margin_mse", "teacher": "vectors"},
    "embeddings": {"kind": "distil_embeddings", "distance": "l2"},
    "supcon": {"kind": "supcon"},
    "supcon, inverse": {"kind": "supcon", "class_weights": "inverse"},
    "siglip": {"kind": "siglip"},
    "unicom": {"kind": "unicom", "classes": 0.5, "features": 0.6},
    "sbcl": {"kind": "sbcl", "class_temperatures": False},  # which are constants for the gradient
    "hiprbert": {"kind": "hiprbert"},
    "simlap": {"kind": "simlap", "partner": "identical", "probe_detached": False, "label_width": 4, "hidden": 4, "project": 5, "project_hidden": 3},
    "carol": {"kind": "carol", "inner": 4},
    "cmim": {"kind": "cmim", "inner": 4},
    "mcse": {"kind": "mcse", "weight": 0.5, "projection": 4},
    "combined": {
        "kind": "combined",
        "parts": [{"objective": {"kind": "infonce", "learn_temperature": True}}, {"objective": {"kind": "cosent"}, "weight": 0.8}],
    },
}  # fmt: skip
NAMES = [("s", f"{n % 2}/{n}") for n in range(9)]
WIDTHS = Surroundings(width=DIM, guide_width=GUIDE, labels=9, label_names=NAMES, vocabulary=7)


@pytest.mark.parametrize("name", SETTINGS)
def test_shares_of_the_rows_add_up_to_the_whole(name: str) -> None:
    """Ranks each take their rows against all columns; the sums of losses and gradients are those of one process."""
    objective, batch = build(WIDTHS, **SETTINGS[name]), make(7)
    whole = mean(objective, batch)
    parts = [mean(objective, replace(batch, rows=torch.arange(*ends))) for ends in ((0, 3), (3, 3), (3, 7))]
    assert_same(torch.stack(parts).sum(), whole, batch)
    learnt = list(objective.parameters())
    if learnt:
        ours = torch.autograd.grad(torch.stack(parts).sum(), learnt)
        for a, b in zip(ours, torch.autograd.grad(whole, learnt), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "cmim"])  # whose noise is drawn by row
def test_the_order_of_examples_does_not_count(name: str) -> None:
    objective, batch = build(WIDTHS, **SETTINGS[name]), make(5)
    order = torch.tensor([3, 0, 4, 2, 1])
    documents = torch.cat([(batch.owner == row).nonzero().squeeze(1) for row in order])
    documents = documents[torch.tensor([2, 0, 1]).repeat(5) + torch.arange(0, 15, 3).repeat_interleave(3)]
    where = torch.argsort(order)
    assert batch.scores is not None and batch.teacher_scores is not None and batch.labels is not None
    assert batch.guide_queries is not None and batch.guide_documents is not None and batch.query_ids is not None
    assert batch.query_tokens is not None
    moved = replace(
        batch,
        queries=batch.queries[order],
        documents=batch.documents[documents],
        owner=where[batch.owner[documents]],
        is_positive=batch.is_positive[documents],
        document_ids=batch.document_ids[documents],
        known_positives=batch.known_positives[order],
        query_ids=batch.query_ids[order],
        labels=batch.labels[order],
        scores=batch.scores[order],
        teacher_scores=batch.teacher_scores[documents],
        guide_queries=batch.guide_queries[order],
        guide_documents=batch.guide_documents[documents],
        query_tokens=batch.query_tokens[order],
    )
    assert float(mean(objective, moved)) == pytest.approx(float(mean(objective, batch)), rel=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_by_finite_differences(name: str) -> None:
    objective, batch = build(WIDTHS, **SETTINGS[name]), make(5)

    def loss(queries: Tensor, documents: Tensor) -> Tensor:
        return mean(objective, replace(batch, queries=queries, documents=documents))

    assert torch.autograd.gradcheck(loss, (batch.queries, batch.documents), fast_mode=True, atol=1e-6)


@pytest.mark.parametrize(("kind", "theirs"), [("cosent", losses.CoSENTLoss), ("angle", losses.AnglELoss)])
def test_rankings_are_those_of_sentence_transformers(kind: str, theirs: Any) -> None:
    batch = make(9, negatives=0)
    assert batch.scores is not None
    expected = theirs(NOTHING, scale=20.0).compute_loss_from_embeddings([batch.queries, batch.documents], batch.scores)
    assert_same(mean(build(kind=kind, temperature=0.05), batch), expected, batch)


def test_cosent_is_that_of_plain_loops() -> None:
    batch = make(7, negatives=0)
    assert batch.scores is not None
    cosine = torch.nn.functional.cosine_similarity(batch.queries, batch.documents).tolist()
    scores = batch.scores.tolist()
    terms = [math.exp((cosine[b] - cosine[a]) / 0.1) for a in range(7) for b in range(7) if scores[a] > scores[b]]
    assert len(set(scores)) < 7, "some scores are equal"
    assert float(mean(build(kind="cosent", temperature=0.1), batch)) == pytest.approx(math.log(1 + sum(terms)))


def test_cosine_regression_is_that_of_sentence_transformers() -> None:
    """It rounds the scores to float32: equal for scores that float32 holds."""
    batch = replace(make(8, negatives=0), scores=torch.arange(8, dtype=torch.float64) / 8)
    expected = losses.CosineSimilarityLoss(NOTHING).compute_loss_from_embeddings(
        [batch.queries, batch.documents], batch.scores
    )
    assert_same(mean(build(kind="cosine_regression"), batch), expected, batch)


def test_pairs_without_a_score_are_left_out() -> None:
    batch = make(6, negatives=0)
    assert batch.scores is not None
    some = replace(batch, scores=torch.where(torch.arange(6) < 4, batch.scores, torch.nan))
    for kind in ("cosent", "angle"):
        alone = batch.select(torch.arange(6) < 4)
        assert float(mean(build(kind=kind), some)) == pytest.approx(float(mean(build(kind=kind), alone)))
    rows = build(kind="cosine_regression")(some).rows
    assert rows[4:].tolist() == [0, 0]
    none = replace(batch, scores=torch.full((6,), torch.nan, dtype=torch.float64))
    assert float(mean(build(kind="cosent"), none)) == 0.0


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
def test_triplets_are_those_of_sentence_transformers(distance: str) -> None:
    batch = make(6, negatives=1)
    metric = getattr(losses.TripletDistanceMetric, distance.upper())
    expected = losses.TripletLoss(NOTHING, distance_metric=metric, triplet_margin=0.7)
    theirs = expected.compute_loss_from_embeddings(columns(batch), NOTHING)
    assert_same(mean(build(kind="triplet", distance=distance, margin=0.7), batch), theirs, batch)


def test_every_positive_of_a_row_meets_every_negative_of_it() -> None:
    """Two positives and one negative, two negatives in any order, no negative: the mean over a row's triplets, else 0."""
    draw = make(3, negatives=2)
    batch = replace(
        draw,
        owner=torch.tensor([1, 0, 0, 1, 0, 2, 2, 1, 1]),
        is_positive=torch.tensor([False, True, True, True, False, True, True, False, False]),
    )
    unit = normalize(batch.queries), normalize(batch.documents)
    cosine = (unit[0] @ unit[1].T).tolist()

    def row(i: int, triplets: list[tuple[int, int]]) -> float:
        return math.fsum(max(0.0, cosine[i][n] - cosine[i][p] + 0.5) for p, n in triplets) / len(triplets)

    expected = [row(0, [(1, 4), (2, 4)]), row(1, [(3, 0), (3, 7), (3, 8)]), 0.0]
    assert build(kind="triplet", margin=0.5)(batch).rows.tolist() == pytest.approx(expected)


def test_kl_is_that_of_sentence_transformers_without_its_factor() -> None:
    batch = make(6, negatives=3)
    assert batch.teacher_scores is not None
    theirs = losses.DistillKLDivLoss(NOTHING, student_temperature=0.5, teacher_temperature=2.0)
    expected = theirs.compute_loss_from_embeddings(columns(batch), table(batch.teacher_scores, batch)) / 0.5**2
    ours = build(kind="distil_scores", similarity="dot", temperature=0.5, teacher_temperature=2.0)
    assert_same(mean(ours, batch), expected, batch)


def test_margin_mse_is_that_of_sentence_transformers() -> None:
    for negatives in (1, 3):
        batch = make(6, negatives=negatives)
        assert batch.teacher_scores is not None
        expected = losses.MarginMSELoss(NOTHING).compute_loss_from_embeddings(
            columns(batch), table(batch.teacher_scores, batch)
        )
        assert_same(mean(build(kind="distil_scores", loss="margin_mse", similarity="dot"), batch), expected, batch)


@pytest.mark.parametrize("distance", ["mse", "l2", "cosine"])
@pytest.mark.parametrize("width", [DIM, GUIDE])
def test_embedding_distillation_is_that_of_sentence_transformers(distance: str, width: int) -> None:
    batch = make(5, negatives=2)
    if width == DIM:
        batch = replace(
            batch,
            guide_queries=normalize(torch.randn(5, DIM, dtype=torch.float64)),
            guide_documents=normalize(torch.randn(15, DIM, dtype=torch.float64)),
        )
    assert batch.guide_queries is not None and batch.guide_documents is not None
    ours = build(Surroundings(width=DIM, guide_width=width), kind="distil_embeddings", distance=distance)
    assert len(list(ours.parameters())) == (0 if width == DIM else 2)
    theirs = losses.EmbedDistillLoss(NOTHING, distance_metric=distance)
    if width != DIM:
        theirs.projection = ours.projection
    teacher = [batch.guide_queries, *batch.guide_documents.view(5, 3, -1).unbind(1)]
    assert_same(mean(ours, batch), theirs.compute_loss_from_embeddings(columns(batch), teacher), batch)


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    """KL, MarginMSE and the distance of embeddings are 0, and so are their gradients; a shift of all scores does not count."""
    batch = make(6, negatives=2)
    with torch.no_grad():
        unit = normalize(batch.queries), normalize(batch.documents)
        scores = (unit[0][batch.owner] * unit[1]).sum(dim=1)
    alike = replace(batch, teacher_scores=scores + 3.0, guide_queries=unit[0], guide_documents=unit[1])
    every: tuple[dict[str, Any], ...] = (
        {"kind": "distil_scores"},
        {"kind": "distil_scores", "loss": "margin_mse"},
        {"kind": "distil_scores", "teacher": "vectors", "candidates": "in_batch"},
        {"kind": "distil_scores", "teacher": "vectors"},
        {"kind": "distil_embeddings", "distance": "cosine"},
    )
    for settings in every:
        loss = mean(build(**settings), alike)
        assert abs(float(loss)) < 1e-14
        assert all(float(g.abs().max()) < 1e-12 for g in gradients(loss, alike))


def test_the_gradient_of_kl_is_the_difference_of_probabilities() -> None:
    batch = make(4, negatives=3)
    assert batch.teacher_scores is not None
    # Unit coordinates make the documents' first coordinate the student's score.
    queries = torch.zeros(4, DIM, dtype=torch.float64)
    queries[:, 0] = 1
    batch = replace(batch, queries=queries)
    assert batch.teacher_scores is not None
    loss = mean(build(kind="distil_scores", similarity="dot", temperature=0.5, teacher_temperature=2.0), batch) * 4
    (found,) = torch.autograd.grad(loss, batch.documents)
    student = (table(batch.documents[:, 0].detach(), batch) / 0.5).softmax(dim=1)
    teacher = (table(batch.teacher_scores, batch) / 2.0).softmax(dim=1)
    assert torch.allclose(table(found[:, 0], batch), (student - teacher) / 0.5, atol=1e-12)


def test_kl_in_batch_is_over_all_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain matrix; in pieces of two rows as well."""
    batch = make(7, negatives=1)
    assert batch.guide_queries is not None and batch.guide_documents is not None
    student = (normalize(batch.queries) @ normalize(batch.documents).T / 0.1).log_softmax(dim=1)
    teacher = (batch.guide_queries @ batch.guide_documents.T / 0.1).softmax(dim=1)
    expected = (teacher * (teacher.log() - student)).sum(dim=1).mean()
    ours = build(**SETTINGS["kl in batch"])
    assert_same(mean(ours, batch), expected, batch)
    monkeypatch.setattr(batch_module, "LOGITS_AT_ONCE", 2 * len(batch.documents))
    assert_same(mean(ours, batch), expected, batch)


def test_documents_without_a_score_are_no_candidates() -> None:
    batch = make(4, negatives=2)
    assert batch.teacher_scores is not None
    unknown = batch.teacher_scores.clone()
    unknown[2::3] = torch.nan  # the second negative of each
    fewer = make(4, negatives=2)
    keep = torch.arange(12) % 3 != 2
    fewer = replace(
        batch,
        documents=batch.documents[keep],
        owner=batch.owner[keep],
        is_positive=batch.is_positive[keep],
        document_ids=batch.document_ids[keep],
        teacher_scores=batch.teacher_scores[keep],
    )
    for loss in ("kl", "margin_mse"):
        ours = build(kind="distil_scores", loss=loss)
        found = mean(ours, replace(batch, teacher_scores=unknown))
        assert float(found) == pytest.approx(float(mean(ours, fewer)))
        nothing = mean(ours, replace(batch, teacher_scores=torch.full_like(unknown, torch.nan)))
        assert float(nothing) == 0.0
        assert all(bool(g.isfinite().all()) for g in gradients(found, batch))


def supcon(vectors: Tensor, labels: list[int], temperature: float) -> list[Tensor]:
    unit = normalize(vectors)
    logits = unit @ unit.T / temperature
    found = []
    for i, label in enumerate(labels):
        others = [j for j in range(len(labels)) if j != i]
        log = logits[i] - logits[i, others].logsumexp(0)
        positive = [j for j in others if labels[j] == label]
        found.append(-log[positive].mean() if positive else logits.new_zeros(()))
    return found


def test_supcon_is_that_of_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and their positives bear labels, explicit negatives none; a label of one text alone gives nothing."""
    batch = replace(make(6, negatives=1), labels=torch.tensor([0, 1, 0, 2, 1, -1]))
    texts = torch.cat([batch.queries[:5], batch.documents[[0, 2, 4, 6, 8]]])
    labels = [0, 1, 0, 2, 1, 0, 1, 0, 2, 1]
    expected = torch.stack(supcon(texts, labels, 0.1)).mean()
    assert_same(mean(build(kind="supcon"), batch), expected, batch)
    monkeypatch.setattr(batch_module, "LOGITS_AT_ONCE", 30)
    assert_same(mean(build(kind="supcon"), batch), expected, batch)
    counts = [labels.count(label) for label in labels]
    weights = [len(labels) / n / sum(1 / m for m in counts) for n in counts]
    weighed = torch.stack([w * loss for w, loss in zip(weights, supcon(texts, labels, 0.1), strict=True)]).mean()
    assert_same(mean(build(kind="supcon", class_weights="inverse"), batch), weighed, batch)


def test_a_text_that_stands_twice_is_one_text_to_supcon() -> None:
    """The planner takes queries of a batch as each other's positives."""
    batch = make(4, negatives=0)
    twice = replace(
        batch,
        documents=batch.queries[torch.tensor([2, 3, 0, 1])],
        document_ids=torch.tensor([2, 3, 0, 1]),
        query_ids=torch.arange(4),
        labels=torch.tensor([0, 1, 0, 1]),
    )
    expected = torch.stack(supcon(batch.queries, [0, 1, 0, 1], 0.1)).mean()
    assert float(mean(build(kind="supcon"), twice)) == pytest.approx(float(expected))


def test_equal_classes_make_inverse_weights_nothing() -> None:
    batch = replace(make(6, negatives=0), labels=torch.tensor([0, 1, 2, 0, 1, 2]))
    assert float(mean(build(kind="supcon", class_weights="inverse"), batch)) == pytest.approx(
        float(mean(build(kind="supcon"), batch)), rel=1e-14
    )


def prototypes(**settings: Any) -> Unicom:
    found = build(Surroundings(width=DIM, labels=9), kind="unicom", **settings)
    assert isinstance(found, Unicom)
    return found


def test_prototypes_without_margin_or_draws_are_a_normalised_softmax() -> None:
    batch = make(6, negatives=0)
    ours = prototypes(margin=0.0, scale=8.0)
    assert batch.labels is not None
    texts, labels = torch.cat([batch.queries, batch.documents]), torch.cat([batch.labels, batch.labels])
    logits = 8.0 * normalize(texts) @ normalize(ours.prototypes).T
    assert_same(mean(ours, batch), torch.nn.functional.cross_entropy(logits, labels), batch)


def test_the_margin_widens_the_angle_to_the_own_prototype() -> None:
    ours = prototypes(margin=0.5)
    angles = torch.linspace(0.01, math.pi - 0.01, 200, dtype=torch.float64)
    widened = ours._widened(angles.cos())
    inside = angles < math.pi - 0.5
    assert torch.allclose(widened[inside], (angles[inside] + 0.5).cos())
    assert bool((widened.diff() < 0).all()), "it falls with the angle, beyond a half turn too"
    assert bool(torch.isfinite(torch.autograd.functional.jacobian(ours._widened, torch.tensor([1.0, -1.0]))).all())


def test_the_batch_s_prototypes_are_always_taken_and_the_others_stay() -> None:
    ours, batch = prototypes(classes=0.5), make(6, negatives=0)
    assert batch.labels is not None
    seen = set()
    for seed in range(20):
        taken, _ = ours.draw(batch.labels, seed)
        assert {0, 1, 2} <= set(taken.tolist())
        assert len(taken) == 5
        seen |= set(taken.tolist())
    assert seen == set(range(9))
    taken, _ = ours.draw(batch.labels, batch.draw)
    (gradient,) = torch.autograd.grad(mean(ours, batch), [ours.prototypes])
    moved = gradient.abs().sum(dim=1) > 0
    assert moved.nonzero().squeeze(1).tolist() == taken.tolist()


def test_texts_and_prototypes_have_the_same_features() -> None:
    """The mean cosine of parts is near that of the whole; with other features a side it would be near 0."""
    ours = prototypes(features=0.5, margin=0.0, scale=1.0)
    with torch.no_grad():
        ours.prototypes.copy_(torch.randn(9, DIM, generator=torch.Generator().manual_seed(0)))
    vector = ours.prototypes[:1].detach() + 0.3
    whole = float(torch.nn.functional.cosine_similarity(vector, ours.prototypes[:1]))
    parts = []
    for seed in range(300):
        _, features = ours.draw(torch.zeros(1, dtype=torch.int64), seed)
        assert len(features) == DIM / 2
        parts.append(float(torch.nn.functional.cosine_similarity(vector[:, features], ours.prototypes[:1, features])))
    assert sum(parts) / len(parts) == pytest.approx(whole, abs=0.1)
    assert whole > 0.8


def test_siglip_is_that_of_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own positives pull, all other documents push; one that is known as a positive is left out."""
    batch = make(5, negatives=1)
    known = torch.cat([batch.known_positives, torch.tensor([[103], [-1], [-1], [-1], [-1]])], dim=1)
    batch = replace(batch, known_positives=known)
    objective = build(kind="siglip", temperature=0.5, bias=-1.0)
    cosine = normalize(batch.queries) @ normalize(batch.documents).T
    terms = []
    for row in range(5):
        for c in range(10):
            sign = 1 if c == 2 * row else -1
            if (row, c) != (0, 3):
                terms.append(-torch.nn.functional.logsigmoid(sign * (cosine[row, c] / 0.5 - 1.0)))
    expected = torch.stack(terms).sum() / 5
    assert_same(mean(objective, batch), expected, batch, 1e-7)  # parameters begin in float32
    monkeypatch.setattr(batch_module, "LOGITS_AT_ONCE", 20)
    assert_same(mean(objective, batch), expected, batch, 1e-7)
    assert objective.watch(batch) == pytest.approx({"temperature": 0.5, "bias": -1.0})


def test_a_document_s_part_of_siglip_does_not_depend_on_the_others() -> None:
    batch = make(4, negatives=1)
    objective = build(kind="siglip", mask_known_positives=False)
    whole = objective(batch)
    documents = batch.documents.detach().clone()
    documents[7] += 1.0
    moved = objective(replace(batch, documents=documents.requires_grad_()))
    (a,) = torch.autograd.grad(whole.total, batch.documents)
    (b,) = torch.autograd.grad(moved.total, documents)
    assert torch.equal(a[:7], b[:7])
    assert not torch.equal(a[7], b[7])


def test_weights_of_examples_count() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    for name in ("cosine_regression", "triplet", "kl of own", "margin mse", "embeddings", "siglip"):
        objective, batch = build(WIDTHS, **SETTINGS[name]), make(6)
        rows = objective(batch).rows
        found = objective(replace(batch, weights=weights))
        assert float(found.total / found.denominator) == pytest.approx(float((rows * weights).sum() / weights.sum()))
    with pytest.raises(BadInputError, match="no weights of examples"):
        build(kind="cosent")(replace(make(6), weights=weights))


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"kind": "cosent"}, "scores", "wants a score of each pair"),
        ({"kind": "distil_scores"}, "teacher_scores", "wants a teacher's scores"),
        ({"kind": "distil_scores", "teacher": "vectors"}, "guide_queries", "wants a teacher's vectors"),
        ({"kind": "distil_embeddings"}, "guide_documents", "wants a teacher's vectors"),
        ({"kind": "supcon"}, "labels", "wants a label of each example"),
    ],
)
def test_what_a_batch_lacks_is_said(settings: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        lacking: Any = {field: None}
        build(**settings)(replace(make(), **lacking))


def test_widths_that_differ_are_said() -> None:
    with pytest.raises(BadInputError, match="8 dimensions cannot be a teacher's of 5"):
        build(kind="distil_embeddings")(make())
    with pytest.raises(BadInputError, match="wants to know both widths"):
        build(kind="distil_embeddings", projection="always")
    with pytest.raises(ValueError, match="candidates in_batch are scored by vectors"):
        build(kind="distil_scores", candidates="in_batch")


def test_weights_of_another_source_leave_the_order_of_pairs_alone() -> None:
    """A store has weights for all examples once one source has some: 1 for the others."""
    batch = make(6, negatives=0)
    assert batch.scores is not None
    mixed = replace(batch, scores=torch.where(torch.arange(6) < 4, batch.scores, torch.nan))
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 0.5], dtype=torch.float64)
    for kind in ("cosent", "angle"):
        assert_same(mean(build(kind=kind), replace(mixed, weights=weights)), mean(build(kind=kind), mixed), mixed)
