"""Several objectives at once: weights, schedules, sources."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nearfield.errors import BadInputError
from nearfield.objectives import CombinedConfig
from nearfield.objectives.config import PartConfig, Reading, Surroundings
from nearfield.objectives.losses import Combined
from tests.objectives.test_losses import assert_same, build, gradients, make, mean

SOURCES = {0: "search", 1: "pairs"}
KINDS = {"search": "retrieval", "pairs": "graded"}


def combined(*parts: dict[str, Any], kinds: dict[str, str] | None = None) -> Combined:
    config = CombinedConfig.model_validate({"parts": parts})
    built: Combined = config.build(SOURCES, Surroundings(kinds=KINDS if kinds is None else kinds)).double()
    return built


INFONCE: dict[str, Any] = {"objective": {"kind": "infonce", "temperature": 0.1}}
COSENT: dict[str, Any] = {"objective": {"kind": "cosent"}, "weight": 0.8}


def test_one_part_of_weight_one_is_the_objective_itself() -> None:
    batch = make()
    alone = build(**INFONCE["objective"])
    assert_same(mean(combined(INFONCE, kinds={}), batch), mean(alone, batch), batch)


def test_a_weighted_sum() -> None:
    batch = make()
    found = combined(INFONCE, COSENT, kinds={})(batch)
    expected = mean(build(**INFONCE["objective"]), batch) + 0.8 * mean(build(kind="cosent"), batch)
    assert_same(found.total / found.denominator, expected, batch)
    assert float(found.rows.sum()) == pytest.approx(float(found.total.detach()))


def mixed() -> tuple[Any, torch.Tensor]:
    """Retrieval and graded examples in one batch."""
    batch = make(7)
    sources = torch.tensor([0, 1, 0, 0, 1, 1, 0])
    assert batch.scores is not None
    return replace(batch, sources=sources, scores=torch.where(sources == 1, batch.scores, torch.nan)), sources == 1


def test_each_part_takes_the_examples_of_its_kind() -> None:
    """Conan's joint loss: retrieval and beta times CoSENT, each the mean of its own examples."""
    batch, graded = mixed()
    found = mean(combined(INFONCE, COSENT), batch)
    search = mean(build(**INFONCE["objective"]), batch.select(~graded))
    pairs = mean(build(kind="cosent"), batch.select(graded))
    assert_same(found, search + 0.8 * pairs, batch)


def test_shares_of_rows_with_parts_that_some_ranks_have_none_of() -> None:
    batch, _ = mixed()
    objective = combined({**INFONCE, "objective": {**INFONCE["objective"], "learn_temperature": True}}, COSENT)
    parts = [mean(objective, replace(batch, rows=torch.arange(*ends))) for ends in ((0, 1), (1, 2), (2, 7))]
    assert_same(torch.stack(parts).sum(), mean(objective, batch), batch)


def test_a_weight_of_zero_leaves_no_trace() -> None:
    batch, graded = mixed()
    found = mean(combined(INFONCE, {**COSENT, "weight": 0.0}), batch)
    assert_same(found, mean(build(**INFONCE["objective"]), batch.select(~graded)), batch)
    queries, _ = gradients(found, batch)
    assert not queries[graded].any()


def test_in_batch_negatives_by_source() -> None:
    """NV-Embed's switch: without them, another row of the batch changes neither a row's loss nor its gradient."""
    batch, other = mixed()
    off: dict[str, Any] = {"objective": {**INFONCE["objective"], "in_batch_negatives": False}, "sources": ["pairs"]}
    objective = combined({**INFONCE, "sources": ["search"]}, off)
    documents = batch.documents.detach().clone()
    documents[batch.owner == 0] += 1.0  # a row of "search"
    moved = replace(batch, documents=documents.requires_grad_())
    before, after = objective(batch), objective(moved)
    assert torch.equal(before.rows[other], after.rows[other])
    assert not torch.equal(before.rows[~other], after.rows[~other])
    for a, b in zip(gradients(before.total, batch), gradients(after.total, moved), strict=True):
        mine = other if len(a) == len(other) else other[batch.owner]
        assert torch.equal(a[mine], b[mine])


def test_each_source_is_contrasted_by_itself() -> None:
    """SAIL's patterns: the losses of all sources are added, each the mean of its own examples, with one temperature to learn."""
    batch, other = mixed()
    learnt: dict[str, Any] = {"objective": {**INFONCE["objective"], "learn_temperature": True}, "each_source": True}
    objective = combined(learnt, kinds={})
    alone = build(**learnt["objective"])
    assert_same(mean(objective, batch), mean(alone, batch.select(~other)) + mean(alone, batch.select(other)), batch)
    assert len(list(objective.parameters())) == 1
    parts = [mean(objective, replace(batch, rows=torch.arange(*ends))) for ends in ((0, 1), (1, 2), (2, 7))]
    assert_same(torch.stack(parts).sum(), mean(objective, batch), batch)
    assert_same(mean(combined({**learnt, "sources": ["pairs"]}), batch), mean(alone, batch.select(other)), batch)
    one = replace(batch, sources=torch.zeros(7, dtype=torch.long))
    assert_same(mean(objective, one), mean(alone, one), one)
    found = objective.watch(batch)
    assert {"loss/infonce/search", "loss/infonce/pairs"} <= found.keys()


def test_what_no_part_uses_has_a_gradient_of_zero() -> None:
    """A batch of a source that no part names, and a learnt temperature: no process is left without a gradient."""
    batch = replace(make(), sources=torch.full((6,), 1))
    learnt = {"objective": {**INFONCE["objective"], "learn_temperature": True}, "sources": ["search"]}
    objective = combined(learnt)
    loss = mean(objective, batch)
    assert float(loss) == 0.0
    found = torch.autograd.grad(loss, [batch.queries, batch.documents, *objective.parameters()])
    assert not any(bool(g.any()) for g in found)


def test_weights_over_the_run() -> None:
    def at(progress: float, **settings: Any) -> float:
        return PartConfig.model_validate({"objective": {"kind": "cosent"}, **settings}).weight_at(progress)

    assert [at(p, weight=2.0) for p in (0.0, 0.5, 1.0)] == [2.0, 2.0, 2.0]
    assert [at(p, weight=1.0, final_weight=0.0) for p in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    late = {"weight": 0.0, "final_weight": 1.0, "begin": 0.5, "end": 0.5}
    assert [at(p, **late) for p in (0.0, 0.49, 0.5, 0.9)] == [0.0, 0.0, 1.0, 1.0]
    middle = {"weight": 0.0, "final_weight": 1.0, "begin": 0.2, "end": 0.6}
    assert [at(p, **middle) for p in (0.1, 0.4, 0.7)] == pytest.approx([0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match=r"begin 0\.6 is after end 0\.2"):
        at(0.0, begin=0.6, end=0.2)


def test_the_batch_says_how_far_the_run_is() -> None:
    batch = make()
    objective = combined({**INFONCE, "final_weight": 0.0}, {**COSENT, "weight": 0.0, "final_weight": 1.0}, kinds={})
    half = mean(objective, replace(batch, progress=0.5))
    expected = (mean(build(**INFONCE["objective"]), batch) + mean(build(kind="cosent"), batch)) / 2
    assert_same(half, expected, batch)


def test_figures_of_the_parts() -> None:
    batch, graded = mixed()
    second = {**INFONCE, "objective": {**INFONCE["objective"], "temperature": 0.5}}
    found = combined(INFONCE, COSENT, second).watch(batch)
    assert found["loss/infonce"] == pytest.approx(float(mean(build(**INFONCE["objective"]), batch.select(~graded))))
    assert found["loss/cosent"] == pytest.approx(float(mean(build(kind="cosent"), batch.select(graded))))
    assert (found["weight/infonce"], found["weight/cosent"]) == (1.0, 0.8)
    assert (found["temperature"], found["temperature/infonce-2"]) == (0.1, 0.5)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(BadInputError, match="there is no source 'nowhere'"):
        combined({**INFONCE, "sources": ["nowhere"]})
    with pytest.raises(BadInputError, match="want the source of each example"):
        combined(INFONCE)(make())


def test_what_it_learns_from() -> None:
    config = CombinedConfig.model_validate({"parts": [INFONCE, COSENT]})
    assert config.learns_from == ("retrieval", "graded")
    assert not config.needs_guide
    assert config.summary == "infonce, temperature 0.1; cosent, temperature 0.05"
    teacher = {"objective": {"kind": "distil_scores"}}
    assert CombinedConfig.model_validate({"parts": [teacher]}).needs_teacher_scores


def parts(*found: dict[str, Any]) -> CombinedConfig:
    return CombinedConfig.model_validate({"parts": found})


def test_each_source_is_read_as_its_parts_want() -> None:
    kinds = {"search": "retrieval", "pairs": "graded", "topics": "labelled", "plain": "text"}
    config = parts(
        {**INFONCE, "sources": ["search"]},
        COSENT,
        {"objective": {"kind": "carol", "delete": 0.4}},
        {"objective": {"kind": "simcse"}, "sources": ["plain"]},
        {"objective": {"kind": "masked_tokens"}, "sources": ["plain", "search"]},
    )
    expected = {"search": Reading(), "pairs": Reading(), "topics": Reading(deleted=0.4), "plain": Reading(views=2)}
    assert config.readings(kinds) == expected
    assert parts({"objective": {"kind": "masked_tokens"}}, COSENT).readings(kinds)["plain"] == Reading(views=1)
    with pytest.raises(BadInputError, match="infonce and simcse do not read the texts of the source 'search' alike"):
        parts(INFONCE, {"objective": {"kind": "simcse"}}).readings(kinds)


def test_a_part_that_decodes_texts() -> None:
    """CAROL of the labelled examples beside InfoNCE of the others: the batch must bring tokens, each part has its rows."""
    around = Surroundings(kinds=KINDS, width=8, vocabulary=30)
    carol = {"kind": "carol", "delete": 0.0, "inner": 6, "reconstruction": 0.4}
    config = parts({**INFONCE, "sources": ["search"]}, {"objective": carol, "sources": ["pairs"]})
    objective = config.build(SOURCES, around).double()
    assert objective.wants_tokens and not combined(INFONCE).wants_tokens
    batch, other = mixed()
    tokens = torch.randint(0, 30, (len(other), 5), generator=torch.Generator().manual_seed(0))
    batch = replace(batch, query_tokens=tokens, labels=torch.arange(len(other)) % 2)
    alone = build(**carol, around=around)
    alone.load_state_dict(objective.objectives[1].state_dict())
    search = mean(build(**INFONCE["objective"]), batch.select(~other))
    assert_same(mean(objective, batch), search + mean(alone, batch.select(other)), batch)
