"""Mining in a run: the stages, what makes them stale, what the plan and the tokens get from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nearfield
from nearfield.batching.plan import Plan
from nearfield.data.vectors import ItemVectors
from nearfield.errors import BadInputError
from nearfield.mining.config import SentenceTransformerTeacher
from nearfield.mining.negatives import Negatives
from nearfield.pipeline import open_run, run_stages, status
from nearfield.pipeline.planning import read_examples
from nearfield.pipeline.stages import Stages
from tests.mining import reference
from tests.pipeline.fingerprints import fingerprints

MINING = "mining={rules: [{kind: percent_of_positive, share: 0.999}], negatives: 2, depth: 20}"


def planned(recipe: Path, *overrides: str) -> Stages:
    run = open_run(recipe, list(overrides), recipe.parent / "runs" / "toy")
    run_stages(run, "plan")
    return Stages.of(run)


def test_a_recipe_without_mining_has_no_stages_of_it(toy_recipe: Path) -> None:
    names = [stage.name for stage in status(open_run(toy_recipe))]
    assert "mine" not in names and "vectors" not in names


def test_mined_negatives_are_those_of_brute_force_and_the_plan_uses_them(toy_recipe: Path) -> None:
    stages = planned(toy_recipe, MINING, "mining.explicit=replace", "batches.negatives=2")
    names = [stage.name for stage in status(stages.job.run) if stage.state == "done"]
    assert names[:5] == ["data", "vectors", "mine", "tokens", "plan"]
    store, negatives = stages.data.open(), Negatives(stages.mine.output)
    vectors = ItemVectors.open(stages.vectors.path(SentenceTransformerTeacher()))
    examples = store.select("pairs", "train")
    part = store.examples.take(examples).to_pylist()
    documents = np.unique([row for example in part for row in [*example["positives"], *example["negatives"]]])
    queries = vectors.of("query", np.array([example["query"] for example in part]))
    scores = reference.all_scores(queries, vectors.of("document", documents))
    known, mined = store.known_positives(), dict(zip(examples.tolist(), negatives.of(examples), strict=True))
    for line, example, row in zip(scores, part, examples.tolist(), strict=True):
        place = {item: number for number, item in enumerate(documents.tolist())}
        a = min(float(line[place[item]]) for item in example["positives"])
        hidden = {*known[example["query"]].tolist(), example["query"]}
        order = [item for item in sorted(place, key=lambda i: (-line[place[i]], i)) if item not in hidden][:20]
        bar = a - abs(a) * (1 - 0.999)
        assert mined[row].tolist() == [item for item in order if float(line[place[item]]) < bar][:2]
    plan = Plan(stages.job.run.folder / "plan" / "epoch-000.parquet")
    for step in range(len(plan)):
        batch = plan.batch(step)
        for row, items in zip(batch.example.tolist(), batch.negatives, strict=True):
            assert set(items.tolist()) <= set(mined[row].tolist())
    assert {"mine", "vectors"} <= plan.metadata.keys()


def test_what_changes_makes_only_its_own_stages_stale(toy_recipe: Path) -> None:
    once = fingerprints(toy_recipe, [MINING])

    def changed(*overrides: str) -> set[str]:
        now = fingerprints(toy_recipe, [MINING, *overrides])
        return {stage for stage in ("data", "vectors", "mine", "tokens", "plan") if now[stage] != once[stage]}

    assert changed("mining.negatives=3") == {"mine", "plan"}
    assert changed("mining.explicit=replace") == {"plan"}
    assert changed("mining.memory_mib=64") == set()
    assert changed("mining.corpus=sources") == {"mine", "tokens", "plan"}
    assert changed("teacher={kind: bm25}", "mining.teacher={kind: sentence_transformer}") == set()
    assert changed("teacher={kind: sentence_transformer, prompts: {query: 'q: '}}") == {"vectors", "mine", "plan"}
    assert changed("seed=1") == {"mine", "plan"}


def test_explicit_negatives_stay_before_the_mined_ones(toy_recipe: Path) -> None:
    stages = planned(toy_recipe, MINING)
    store = stages.data.open()
    found = stages.plan.negatives(store)
    assert found is not None
    examples = store.select("pairs", "train")
    own = [row.as_py() for row in store.examples.take(examples)["negatives"]]
    negatives = Negatives(stages.mine.output)
    lists = found["pairs"].items
    scores, positive_scores = found["pairs"].scores, found["pairs"].positive_scores
    assert scores is not None and positive_scores is not None
    for number, mined in enumerate(negatives.of(examples)):
        expected = [*own[number], *[item for item in mined.tolist() if item not in own[number]]]
        assert lists[number].tolist() == expected
        known = np.isfinite(scores[lists.offsets[number] : lists.offsets[number + 1]])
        assert known.tolist() == [item in mined.tolist() for item in expected]
    np.testing.assert_array_equal(positive_scores, negatives.positive_scores)


def test_examples_that_the_consistency_filter_drops_are_not_planned(toy_recipe: Path) -> None:
    mining = "mining={rules: [{kind: consistency, top: 1}, {kind: percent_of_positive}], depth: 20}"
    stages = planned(toy_recipe, mining, "batches.batch_size=8", "batches.drop_last=false", "training.max_steps=null")
    store, negatives = stages.data.open(), Negatives(stages.mine.output)
    examples = store.select("pairs", "train")
    kept = negatives.kept(examples)
    assert 0 < kept.sum() < len(kept)
    plan = Plan(stages.job.run.folder / "plan" / "epoch-000.parquet")
    rows = np.concatenate([plan.batch(step).example for step in range(len(plan))])
    assert set(rows.tolist()) <= set(examples[kept].tolist())
    sources, _ = read_examples(store, ["pairs"], "train", stages.plan.negatives(store))
    assert sources[0].negative_scores is not None and sources[0].positive_scores is not None
    assert len(sources[0].negative_scores) == len(sources[0].negatives.values)
    assert len(sources[0].positive_scores) == len(sources[0].positives.values)
    assert len(sources[0]) == len(sources[0].negatives) == kept.sum()


def two_sources(folder: Path, model: Path) -> Path:
    """A recipe with two sources whose prompts differ."""
    for name in ("one", "two"):
        rows = [
            {"query": f"word{i} word{i + 1}", "positive": f"word{(i + 3) % 40} word{i + 50} {name}"} for i in range(40)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.yaml").write_text(
        "name: both\nsources:\n"
        + "".join(
            f"""\
  - name: {name}
    task_type: {kind}
    reader: {{kind: jsonl, path: {name}.jsonl}}
    examples: {{kind: retrieval, query: query, positives: positive}}
    prompts: {{query: "", document: "{name}: "}}
    split: {{kind: all, name: train}}
"""
            for name, kind in (("one", "Retrieval"), ("two", "Reranking"))
        )
    )
    recipe = folder / "both.yaml"
    recipe.write_text(
        f"""\
name: both
data: data.yaml
encoder: {{model: {model}}}
batches: {{kind: single_source, batch_size: 8, negatives: 3}}
teacher: {{kind: bm25, language: null}}
mining: {{rules: [{{kind: naive}}], negatives: 3, corpus: sources}}
"""
    )
    return recipe


def test_documents_of_other_sources_are_tokenised_with_this_sources_prompt(tmp_path: Path, tiny_model: Path) -> None:
    stages = planned(two_sources(tmp_path, tiny_model), 'prompts.fallback.document="one: "')
    store, negatives = stages.data.open(), Negatives(stages.mine.output)
    names = [stage.name for stage in status(stages.job.run)]
    assert "vectors" not in names and "mine" in names
    tokens = stages.tokens.open()
    table = tokens.tables[tokens.number("one: ")]
    rows = np.concatenate([np.empty(0, np.int64), *negatives.of(store.select("one", "train"))])
    texts = store.texts(rows)
    assert any(text.endswith("two") for text in texts)
    assert (table.lengths(rows) > 0).all()


def test_the_planner_gets_the_teachers_vectors(toy_recipe: Path, tiny_model: Path) -> None:
    batches = "batches={kind: kmeans_strata, batch_size: 16, clusters: 3}"
    stages = planned(toy_recipe, batches, f"teacher={{kind: sentence_transformer, model: {tiny_model}}}")
    assert [stage.name for stage in status(stages.job.run)][:4] == ["data", "vectors", "tokens", "plan"]
    given = stages.vectors.planned()
    assert given is not None
    store = stages.data.open()
    queries = store.examples.take(store.select("pairs", "train"))["query"].to_numpy()
    assert given("query", queries).shape == (len(queries), 32)


def test_vectors_are_built_once_and_found_by_other_runs(toy_recipe: Path) -> None:
    first = planned(toy_recipe, MINING)
    other = open_run(toy_recipe, [MINING, "mining.negatives=3"], toy_recipe.parent / "runs" / "other")
    assert {stage.name: stage.state for stage in status(other)}["vectors"] == "done"
    assert run_stages(other, "plan").ran == ("mine", "plan")
    assert first.job.run.record("vectors")["vectors"]["sentence_transformer"]["query"] > 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher={kind: bm25}", "batches.kind=communities", "batches.community_size=8"], "teacher 'bm25' has none"),
        (["mining={rules: [{kind: percent}]}"], "unknown kind 'percent'"),
        (["mining.teacher={kind: vectors, documents: none.npy}"], "does not exist"),
        (["teacher={kind: sentence_transformer, model: ./nowhere}", "mining={}"], "no folder"),
    ],
)
def test_bad_recipes(toy_recipe: Path, overrides: Any, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        run_stages(open_run(toy_recipe, overrides), "mine")


def test_mining_from_python(toy_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "python"
    negatives = nearfield.mine(toy_recipe, [MINING], run)
    stages = Stages.of(open_run(toy_recipe, [MINING], run))
    assert negatives.path == stages.mine.output
    assert negatives.examples.tolist() == stages.data.open().select("pairs", "train").tolist()
    assert negatives.lists.values.size
