"""Negatives that change while a model trains: schedule, Conan's two rules, pools mined anew; resumed as uninterrupted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nearfield.arrays import Ragged, Rows
from nearfield.batching.plan import Batch
from nearfield.encoders import load_encoder
from nearfield.errors import BadInputError, StoppedError
from nearfield.files import read_metrics
from nearfield.mining.config import MiningConfig, NaiveRule
from nearfield.mining.negatives import Pool
from nearfield.objectives import InfoNCEConfig
from nearfield.training import TrainingConfig, changing_negatives
from nearfield.training import step as step_module
from nearfield.training.changing_negatives import (
    BlockAtATime,
    MinedCandidates,
    NegativeInputs,
    OneAtATime,
    Remine,
    Scheduled,
    fit,
    negative_scores,
)
from nearfield.training.checkpoint import newest_checkpoint, read_tensors
from nearfield.training.config import DynamicNegatives, RefreshedNegatives, ScheduledNegatives
from nearfield.training.step import StepMade
from nearfield.training.trainer import TrainingInputs, TrainingResult, train

SETTINGS = {"trackers": [], "device": "cpu", "packing": "never", "micro_batch_tokens": 512, "graph_tokens": 65_536}


def rows(*numbers: int) -> Rows:
    return np.asarray(numbers, dtype=np.int64)


def batch_of(queries: list[int], positives: list[list[int]], examples: list[int] | None = None) -> Batch:
    zeros = np.zeros(len(queries), dtype=np.int64)
    return Batch(
        example=rows(*(examples or range(len(queries)))),
        query=rows(*queries),
        positives=[rows(*items) for items in positives],
        negatives=[rows() for _ in queries],
        query_prompt=zeros,
        document_prompt=zeros,
        source=0,
    )


def candidates(lists: list[list[int]], examples: list[int] | None = None) -> MinedCandidates:
    counts = rows(*map(len, lists))
    return MinedCandidates(
        rows(*(examples or range(len(lists)))),
        Ragged.from_lengths(counts, rows(*(item for part in lists for item in part))),
    )


def none_known(query: int) -> Rows:
    return rows()


def test_candidates_are_found_by_example() -> None:
    found = candidates([[5], [6, 7]], [10, 30]).of(rows(30, 20, 10, 99))
    assert [part.tolist() for part in found] == [[6, 7], [], [5], []]
    assert [part.tolist() for part in candidates([]).of(rows(1))] == [[]]


# The candidates that fit into a batch.


@given(st.data())
def test_what_is_chosen_clashes_with_nothing(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    wanted = data.draw(st.integers(0, 3))
    queries = list(range(count))
    positives = [[10 + n] for n in range(count)]
    orders = [data.draw(st.lists(st.integers(0, 25), unique=True, max_size=8)) for _ in range(count)]
    known = {n: rows(10 + n, *data.draw(st.lists(st.integers(16, 19), max_size=2))) for n in range(count)}
    batch = batch_of(queries, positives)
    inputs = NegativeInputs(ScheduledNegatives(), candidates([]), wanted)
    chosen, clashes = fit(batch, [rows(*order) for order in orders], inputs, known.__getitem__, wanted)

    # The plain reference: go through all candidates one by one.
    forbidden = {*queries, *(item for part in positives for item in part), *np.concatenate([*known.values()]).tolist()}
    passed = 0
    for order, found in zip(orders, chosen, strict=True):
        expected: list[int] = []
        for item in order:
            if len(expected) == wanted:
                break
            if item in forbidden:
                passed += 1
            else:
                expected.append(item)
        assert found.tolist() == expected
        forbidden.update(expected)
    assert clashes == passed


def test_clashes_may_be_allowed() -> None:
    batch = batch_of([0, 1], [[10], [11]])
    orders = [rows(11, 20), rows(20, 10)]
    known = {0: rows(10), 1: rows(11)}.__getitem__
    plain = NegativeInputs(ScheduledNegatives(), candidates([]), 1)
    assert [c.tolist() for c in fit(batch, orders, plain, known, 1)[0]] == [[20], []]
    loose = dataclasses.replace(plain, distinct=False, avoid_positives=False)
    chosen, clashes = fit(batch, orders, loose, known, 1)
    assert ([c.tolist() for c in chosen], clashes) == ([[11], [20]], 0)
    distinct = dataclasses.replace(plain, avoid_positives=False)
    assert [c.tolist() for c in fit(batch, orders, distinct, known, 1)[0]] == [[20], []], "11 is in the batch"
    known_only = dataclasses.replace(plain, distinct=False)
    assert [c.tolist() for c in fit(batch, orders, known_only, known, 1)[0]] == [[20], [20]]


# The schedule.


def test_a_schedule_goes_from_easy_to_hard() -> None:
    inputs = NegativeInputs(ScheduledNegatives(start=6, end=0), candidates([list(range(100, 110))]), 2)
    scheduled = Scheduled(inputs, ScheduledNegatives(start=6, end=0), none_known, 0, steps=4)
    batch = batch_of([0], [[1]])
    found = [scheduled.batch(batch, step)[0].negatives[0].tolist() for step in range(4)]
    assert found == [[106, 107], [104, 105], [102, 103], [100, 101]]
    half = Scheduled(inputs, ScheduledNegatives(start=6, end=0, over=0.5), none_known, 0, steps=5)
    assert [half.first_rank(step) for step in range(5)] == [6, 3, 0, 0, 0]
    assert [Scheduled(inputs, ScheduledNegatives(start=6), none_known, 0, steps=1).first_rank(0)] == [6]


def test_a_schedule_makes_do_with_short_lists() -> None:
    lists = [[100, 101, 102], [200], []]
    inputs = NegativeInputs(ScheduledNegatives(start=9), candidates(lists), 2)
    scheduled = Scheduled(inputs, ScheduledNegatives(start=9), none_known, 0, steps=10)
    batch, figures = scheduled.batch(batch_of([0, 1, 2], [[10], [11], [12]]), 0)
    assert [part.tolist() for part in batch.negatives] == [[101, 102], [200], []]
    assert figures == {"negatives_clashing": 0, "negatives_missing": 3}


# Conan's rules.


def seen(negatives: list[list[int]], scores: list[list[float]]) -> Any:
    """The result of a step whose explicit negatives have these cosines with their queries."""
    queries, documents, owner, positive = [], [], [], []
    for number, (_, own) in enumerate(zip(negatives, scores, strict=True)):
        queries.append([1.0, 0.0])
        documents.append([1.0, 0.0])
        owner.append(number)
        positive.append(True)
        for score in own:
            documents.append([3 * score, 3 * (1 - score**2) ** 0.5])
            owner.append(number)
            positive.append(False)
    batch = SimpleNamespace(
        queries=torch.tensor(queries),
        documents=torch.tensor(documents),
        owner=torch.tensor(owner),
        is_positive=torch.tensor(positive),
    )
    return SimpleNamespace(batch=batch)


def test_scores_are_cosines_in_the_order_of_the_batch() -> None:
    found = negative_scores(seen([[1, 2], [], [3]], [[0.5, -0.25], [], [0.75]]))
    assert found == pytest.approx([0.5, -0.25, 0.75], abs=1e-6)


def made(batch: Batch, step: int, result: Any) -> StepMade:
    return StepMade(step + 1, batch, result, 1.0, None)


def dynamic(lists: list[list[int]], wanted: int, **settings: Any) -> Any:
    config = DynamicNegatives(**settings)
    inputs = NegativeInputs(config, candidates(lists), wanted)
    return (BlockAtATime if config.rule == "conan_v1" else OneAtATime)(inputs, config, none_known, 0)


def play(negatives: Any, scores: list[float], first: int = 0, wanted: int = 2) -> list[list[int]]:
    """One example, a step a score; the negatives that each step had."""
    batch, used = batch_of([0], [[1]]), []
    for step, score in enumerate(scores, first):
        planned = negatives.batch(batch, step)[0]
        used.append(planned.negatives[0].tolist())
        negatives.after_step(made(planned, step, seen([used[-1]], [[score] * len(used[-1])])))
    return used


LONG = [list(range(100, 130))]


def test_a_block_is_replaced_at_the_first_check_that_finds_it_easy() -> None:
    """A scripted trajectory: 0.7 at first; 0.62 is above 0.7 / 1.15 = 0.6087, 0.60 is below."""
    used = play(dynamic(LONG, 2, check_every=1), [0.7, 0.62, 0.60, 0.5, 0.5, 0.4, 0.1])
    assert used == [
        [100, 101],
        [100, 101],
        [100, 101],
        [110, 111],  # ranks 10 to n + 9
        [110, 111],
        [110, 111],  # 1.15 * 0.4 < 0.5
        [112, 113],  # ranks n + 10 to 2 n + 9
    ]


def test_a_block_is_looked_at_only_at_checks() -> None:
    used = play(dynamic(LONG, 2, check_every=3), [0.7, 0.1, 0.7, 0.1, 0.7, 0.1, 0.3])
    assert used == [[100, 101]] * 6 + [[110, 111]], "what counts is the score at the check"


@pytest.mark.parametrize(
    ("first", "second", "replaced"), [(0.95, 0.81, False), (0.95, 0.79, True), (0.7, 0.609, False)]
)
def test_both_conditions_must_hold(first: float, second: float, replaced: bool) -> None:
    used = play(dynamic(LONG, 2, check_every=1), [first, second, second])
    assert (used[-1] == [110, 111]) == replaced


def test_a_used_up_list_keeps_its_last_whole_block() -> None:
    used = play(dynamic([list(range(100, 113))], 2, check_every=1), [0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.1])
    assert used == [[100, 101]] * 2 + [[110, 111]] * 5, "rank 12 alone is no block"


def test_single_negatives_are_exchanged_when_their_example_comes_next() -> None:
    negatives = dynamic([[100, 101, 102, 103]], 2, rule="conan_v2")
    batch, used = batch_of([0], [[1]]), []
    for scores in ([0.5, 0.39], [0.4, 0.1], [0.1, 0.1], [0.9, 0.9]):
        planned = negatives.batch(batch, 0)[0]
        used.append(planned.negatives[0].tolist())
        negatives.after_step(made(planned, 0, seen([used[-1]], [scores])))
    assert used == [[100, 101], [100, 102], [100, 103], [100, 103]], "below 0.4, and as long as there are candidates"


@pytest.mark.parametrize("rule", ["conan_v1", "conan_v2"])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_state_goes_on_where_it_was_saved(rule: str, at: int) -> None:
    scores = [0.7, 0.62, 0.3, 0.5, 0.39, 0.2, 0.1, 0.1]
    whole = play(dynamic(LONG, 2, rule=rule, check_every=2), scores)
    before, after = (dynamic(LONG, 2, rule=rule, check_every=2) for _ in range(2))
    first = play(before, scores[:at])
    after.load(before.state(), {name: tensor.clone() for name, tensor in before.tensors()})
    assert first + play(after, scores[at:], first=at) == whole
    assert len({tuple(part) for part in whole}) > 1


# In the loop.


def changing(inputs: TrainingInputs, config: Any, **more: Any) -> TrainingInputs:
    """The training of the fixture with six candidates an example, drawn from the documents."""
    examples = np.unique(np.concatenate([plan.column("example") for plan in inputs.plans]))
    random = np.random.default_rng(0)
    documents = np.unique(np.concatenate([plan.lists("positives").values for plan in inputs.plans]))
    lists = [random.choice(documents, 6, replace=False).tolist() for _ in examples]
    found = MinedCandidates(
        examples, Ragged.from_lengths(np.full(len(lists), 6), rows(*(item for part in lists for item in part)))
    )
    return dataclasses.replace(inputs, negatives=NegativeInputs(config, found, 2, **more))


def remine(inputs: TrainingInputs, depth: int = 3) -> Remine:
    """All examples of the plans as one pool, their documents as the corpus."""
    examples, first = np.unique(np.concatenate([plan.column("example") for plan in inputs.plans]), return_index=True)
    queries = np.concatenate([plan.column("query") for plan in inputs.plans])[first]
    documents = np.unique(np.concatenate([plan.lists("positives").values for plan in inputs.plans]))
    own = Ragged.from_lists([np.searchsorted(documents, inputs.data.known_positives(int(q))) for q in queries])
    pool = Pool(
        0,
        "pairs",
        examples,
        queries,
        documents,
        own,
        np.arange(len(own.values)),
        Ragged.from_lists([[] for _ in queries]),
    )
    prompts = (int(inputs.plans[0].column("query_prompt")[0]), int(inputs.plans[0].column("document_prompt")[0]))
    return Remine([pool], {0: prompts}, MiningConfig(rules=(NaiveRule(),), negatives=depth, depth=depth))


def go(inputs: TrainingInputs, model: Path, run: Path, **settings: Any) -> TrainingResult:
    config = TrainingConfig.model_validate({**SETTINGS, "learning_rate": 1e-2, **settings})
    fresh = load_encoder(str(model), device="cpu").model
    return train(config, InfoNCEConfig(temperature=0.1).build(), fresh, inputs, run, seed=5, fingerprint="f")


KINDS: list[Any] = [
    ScheduledNegatives(start=4),
    DynamicNegatives(check_every=1, ratio=1.0, ceiling=2.0, skip=2),
    DynamicNegatives(rule="conan_v2", below=1.0),
    RefreshedNegatives(every_steps=2),
    RefreshedNegatives(every_epochs=1),
]


def watched(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[tuple[int, list[list[int]]]]:
    """The negatives of each step from here on; a signal comes in the step ``stop_after``."""
    found: list[tuple[int, list[list[int]]]] = []
    run_step = step_module.run_step

    def spy(engine, work, **keywords):  # type: ignore[no-untyped-def]
        pool = work.pool
        explicit = pool.items[pool.documents[~pool.is_positive]]
        owner = pool.owner[~pool.is_positive]
        found.append((keywords["step"], [explicit[owner == q].tolist() for q in range(len(pool.queries))]))
        if keywords["step"] == stop_after:
            keywords["stop"] = lambda: True
        return run_step(engine, work, **keywords)

    monkeypatch.setattr(step_module, "run_step", spy)
    return found


@pytest.mark.parametrize("config", KINDS, ids=lambda config: getattr(config, "rule", config.kind))
@pytest.mark.parametrize("at", [0, 1, 3])
def test_resumed_is_uninterrupted(
    inputs: TrainingInputs, tiny_model: Path, tmp_path: Path, config: Any, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"remine": remine(inputs)} if config.kind == "refresh" else {}
    inputs = changing(inputs, config, **more)
    with monkeypatch.context() as patch:
        whole = watched(patch)
        go(inputs, tiny_model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        first = watched(patch, stop_after=at)
        with pytest.raises(StoppedError):
            go(inputs, tiny_model, tmp_path / "run")
    with monkeypatch.context() as patch:
        second = watched(patch)
        assert go(inputs, tiny_model, tmp_path / "run").resumed_from == at + 1
    assert first + second == whole
    assert len(whole) == 6
    assert any(negatives for _, step in whole for negatives in step)
    ends = [newest_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "run")]
    assert ends[0] is not None and ends[1] is not None
    for ours, theirs in zip(read_tensors(ends[0]), read_tensors(ends[1]), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    figures = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "run")
    ]
    assert figures[0] == figures[1]
    assert {"negatives_clashing", "negatives_missing"} <= figures[0][0].keys()


def test_a_refreshed_pool_is_the_nearest_by_the_weights_in_training(
    inputs: TrainingInputs, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mining = remine(inputs, depth=4)
    inputs = changing(inputs, RefreshedNegatives(every_steps=2), remine=mining)
    used = watched(monkeypatch)
    model = load_encoder(str(tiny_model), device="cpu").model
    weights: dict[int, dict[str, torch.Tensor]] = {}

    mine_by_weights = changing_negatives.mine_by_weights

    def noted(engine: Any, *rest: Any, **keywords: Any) -> Any:
        weights[keywords["generation"]] = {k: v.clone() for k, v in model.state_dict().items()}
        assert not model.training, "no dropout while encoding"
        return mine_by_weights(engine, *rest, **keywords)

    monkeypatch.setattr(changing_negatives, "mine_by_weights", noted)
    config = TrainingConfig.model_validate(
        {**SETTINGS, "learning_rate": 1e-2, "checkpoints": {"every_steps": 1, "keep_last": 10}}
    )
    train(config, InfoNCEConfig(temperature=0.1).build(), model, inputs, tmp_path / "run", seed=5, fingerprint="f")
    assert sorted(weights) == [1, 2], "after steps 2 and 4, not after the last"

    pool = mining.pools[0]
    best: dict[int, list[set[int]]] = {}
    for generation, state in weights.items():
        model.load_state_dict(state)
        model.eval()
        tables = inputs.data.tokens.tables
        prompts = mining.prompts[0]

        def embed(prompt: int, items: Rows, tables: Any = tables) -> np.ndarray[Any, Any]:
            out = []
            for item in items.tolist():
                ids = torch.tensor(np.asarray(tables[prompt].of(item)).astype(np.int64))[None]
                with torch.no_grad():
                    made = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
                out.append(torch.nn.functional.normalize(made["sentence_embedding"].double(), dim=-1)[0].numpy())
            return np.stack(out)

        similarity = embed(prompts[0], pool.queries) @ embed(prompts[1], pool.documents).T
        best[generation] = []
        for number in range(len(pool.queries)):
            similarity[number, pool.positives[number]] = -np.inf
            best[generation].append(set(pool.documents[np.argsort(-similarity[number])[:4]].tolist()))
    for step, negatives in used:
        generation = step // 2
        plan = inputs.plans[step // 3]
        examples = plan.batch(step % 3).example
        for example, own in zip(examples.tolist(), negatives, strict=True):
            place = int(np.searchsorted(pool.examples, example))
            if generation:
                assert set(own) <= best[generation][place], "of one generation, and of the true nearest"
            else:
                assert set(own) <= set(inputs.negatives.candidates.of(rows(example))[0].tolist())  # type: ignore[union-attr]
    said = json.loads((tmp_path / "run" / "negatives" / "generation-00002" / "pool.json").read_text())
    assert (said["generation"], said["weights_of_step"]) == (2, 4)


def test_a_pool_that_is_gone_is_told(
    inputs: TrainingInputs, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = changing(inputs, RefreshedNegatives(every_steps=1), remine=remine(inputs))
    with monkeypatch.context() as patch:
        watched(patch, stop_after=3)
        with pytest.raises(StoppedError):
            go(inputs, tiny_model, tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "negatives").iterdir())
    file = tmp_path / "run" / "negatives" / kept[-1] / "pool.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(BadInputError, match=r"the negatives of generation \d are missing or were changed") as error:
        go(inputs, tiny_model, tmp_path / "run")
    assert error.value.where == str(file)


def test_pools_that_no_checkpoint_needs_are_dropped(inputs: TrainingInputs, tiny_model: Path, tmp_path: Path) -> None:
    inputs = changing(inputs, RefreshedNegatives(every_steps=1), remine=remine(inputs))
    go(inputs, tiny_model, tmp_path / "run", checkpoints={"every_steps": 1, "keep_last": 1, "background": False})
    kept = sorted(path.name for path in (tmp_path / "run" / "negatives").iterdir())
    assert kept == ["generation-00004", "generation-00005"]


def test_a_signal_during_the_mining_leaves_it_to_the_resumed_run(
    inputs: TrainingInputs, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = changing(inputs, RefreshedNegatives(every_steps=2), remine=remine(inputs))
    with monkeypatch.context() as patch:
        whole = watched(patch)
        go(inputs, tiny_model, tmp_path / "whole")
    from nearfield.training.evaluation import InterruptedEvaluationError

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        raise InterruptedEvaluationError

    with monkeypatch.context() as patch:
        first = watched(patch)
        patch.setattr(changing_negatives, "mine_by_weights", interrupted)
        with pytest.raises(StoppedError):
            go(inputs, tiny_model, tmp_path / "run")
    second = watched(monkeypatch)
    go(inputs, tiny_model, tmp_path / "run")
    assert first + second == whole


def test_dynamic_negatives_and_averaged_batches_do_not_go_together(
    inputs: TrainingInputs, tiny_model: Path, tmp_path: Path
) -> None:
    inputs = changing(inputs, DynamicNegatives())
    with pytest.raises(BadInputError, match="dynamic negatives need the scores of the whole batch"):
        go(inputs, tiny_model, tmp_path / "run", averaged_batches=2)


def test_a_refresh_has_one_rhythm() -> None:
    for settings in ({}, {"every_steps": 1, "every_epochs": 1}):
        with pytest.raises(ValueError, match="one of the two"):
            RefreshedNegatives.model_validate({"kind": "refresh", **settings})
