"""Phrasings and in-context examples in a run: what is tokenised, what the plan draws, what the model keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from nearfield.batching.plan import Plan
from nearfield.data import Store
from nearfield.data.tokens import TokenCache
from nearfield.errors import BadInputError
from nearfield.pipeline import Run, open_run, run_stages


def recipe(folder: Path, model: Path, prompts: dict[str, object], run_prompts: dict[str, object] | None = None) -> Run:
    rows = [{"query": f"word{i} q{i}", "positives": [f"word{i} d{i}"]} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "name": "pairs",
        "task_type": "Retrieval",
        "prompts": prompts,
        "reader": {"kind": "jsonl", "path": "rows.jsonl"},
        "examples": {"kind": "retrieval", "query": "query", "positives": "positives"},
        "split": {"kind": "all"},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump({"name": "data", "sources": [source]}))
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "run",
                "data": "data.yaml",
                "encoder": {"model": str(model)},
                "prompts": run_prompts or {},
                "batches": {"kind": "single_source", "batch_size": 8},
                "training": {"epochs": 2, "max_steps": 6, "trackers": []},
            }
        )
    )
    return open_run(folder / "recipe.yaml", (), folder / "runs" / "run")


def planned(run: Run) -> tuple[Store, TokenCache, Sequence[Plan]]:
    run_stages(run, "plan")
    store = Store.open(run.record("data")["path"])
    plans = [Plan(path) for path in sorted((run.folder / "plan").glob("epoch-*.parquet"))]
    return store, TokenCache(Path(run.record("tokens")["path"])), plans


def test_each_row_draws_its_phrasing(tmp_path: Path, tiny_model: Path) -> None:
    run = recipe(tmp_path, tiny_model, {"query": ["ask word1 ", "word2 "], "document": None})
    _, tokens, plans = planned(run)
    numbers = {tokens.number(text): text for text in ("ask word1 ", "word2 ", "")}
    drawn = [
        dict(zip(plan.column("example").tolist(), plan.column("query_prompt").tolist(), strict=True)) for plan in plans
    ]
    assert {numbers[number] for epoch in drawn for number in epoch.values()} == {"ask word1 ", "word2 "}
    assert drawn[0] != drawn[1]
    assert {numbers[n] for plan in plans for n in plan.column("document_prompt").tolist()} == {""}
    for plan in plans:
        triples = zip(*(plan.column(name).tolist() for name in ("query", "query_prompt", "query_tokens")), strict=True)
        assert all(len(tokens.tables[prompt].of(query)) == count for query, prompt, count in triples)
    model = run_stages(run, "train").model
    assert model is not None
    contract = json.loads((model / "prompt_contract.json").read_text())
    assert contract["prompts"]["query"] == ["ask word1 ", "word2 "]
    kept = json.loads((model / "config_sentence_transformers.json").read_text())["prompts"]
    assert kept["Retrieval-query"] == "ask word1 "


def test_examples_before_queries(tmp_path: Path, tiny_model: Path) -> None:
    settings = {"draws": 4, "most": 2, "head": "word3 ", "example": "{query} word4 {document} ", "query_tokens": 4}
    run = recipe(tmp_path, tiny_model, {"query": "ask "}, {"in_context": {**settings, "evaluated": "examples"}})
    store, tokens, plans = planned(run)
    texts = {number: table.prompt for number, table in enumerate(tokens.tables)}
    seen = set()
    for plan in plans:
        for query, number in zip(plan.column("query").tolist(), plan.column("query_prompt").tolist(), strict=True):
            prompt = texts[number]
            seen.add(prompt)
            assert prompt.endswith("ask ")
            own = [*store.texts([query]), *store.texts(store.known_positives()[query])]
            if prompt != "ask ":
                assert not any(f" {text} " in prompt.replace("ask ", "") for text in own)
        # Documents never carry examples.
        assert {texts[number] for number in plan.column("document_prompt").tolist()} == {""}
    assert "ask " in seen and len(seen) > 2
    # The query and the end token are whole behind the longest set.
    plain = tokens.tables[tokens.number("ask ")]
    for number in set(texts) - {tokens.number(""), tokens.number("ask ")}:
        for query in plain.rows.tolist():
            end = plain.of(query)[1:]
            assert tokens.tables[number].of(query)[-len(end) :].tolist() == end.tolist()
    model = run_stages(run, "train").model
    assert model is not None
    kept = json.loads((model / "config_sentence_transformers.json").read_text())["prompts"]["Retrieval-query"]
    assert kept.startswith("word3 ") and kept.endswith("ask ")
    assert kept in json.loads((model / "prompt_contract.json").read_text())["prompts"]["query"]


def test_examples_that_leave_no_room_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    run = recipe(tmp_path, tiny_model, {}, {"in_context": {"most": 64, "query_tokens": 100_000}})
    with pytest.raises(BadInputError, match="examples before queries of 'pairs'"):
        run_stages(run, "plan")
