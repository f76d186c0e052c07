"""A model is scored with the prompts that it was trained with, or the run stops before a task runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nearfield.errors import BadInputError
from nearfield.evaluation import evaluate


@pytest.fixture
def prompted(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    return make_model(tmp_path / "prompted", {"query": "query: ", "document": ""})


def contract(folder: Path, query: list[str | None], document: list[str | None]) -> None:
    data = {"version": 1, "prompts": {"query": query, "document": document}, "fallback": {}, "tasks": {}}
    (folder / "prompt_contract.json").write_text(json.dumps(data))


def test_listed_prompts_pass(prompted: Path, tasks: Any, tmp_path: Path) -> None:
    contract(prompted, ["query: "], [None])
    result = evaluate(str(prompted), tasks.retrieval(), tmp_path / "results", device="cpu")
    assert result.failures == {} and "TinyRetrieval" in result.scores


def test_an_unlisted_prompt_stops_the_run_and_names_everything(prompted: Path, tasks: Any, tmp_path: Path) -> None:
    contract(prompted, ["search: ", "ask: "], [""])
    with pytest.raises(BadInputError) as caught:
        evaluate(str(prompted), tasks.retrieval(), tmp_path / "results", device="cpu")
    message = str(caught.value)
    for word in ("TinyRetrieval", "query", "'query: '", "'search: '", "'ask: '", "prompt_contract.json", "as-is"):
        assert word in message
    assert not list((tmp_path).glob("results/*/*/*.json"))


def test_no_prompt_where_training_had_one_stops_the_run(
    make_model: Callable[..., Path], tasks: Any, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "bare")
    contract(folder, ["query: "], [""])
    with pytest.raises(BadInputError, match="no prompt before each query"):
        evaluate(str(folder), tasks.retrieval(), tmp_path / "results", device="cpu")


def test_texts_without_a_role_may_have_a_prompt_of_either(prompted: Path, tasks: Any, tmp_path: Path) -> None:
    contract(prompted, ["query: "], [""])
    assert evaluate(str(prompted), tasks.sts(), tmp_path / "results", device="cpu").failures == {}
    contract(prompted, ["query: "], ["passage: "])
    with pytest.raises(BadInputError, match="text without a role"):
        evaluate(str(prompted), tasks.sts(), tmp_path / "results", device="cpu")


def test_as_is_scores_the_model_as_mteb_would(prompted: Path, tasks: Any, tmp_path: Path) -> None:
    contract(prompted, ["search: "], [""])
    result = evaluate(str(prompted), tasks.retrieval(), tmp_path / "results", device="cpu", prompts="as-is")
    assert result.failures == {}
    assert any("not checked" in note for note in result.notes)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "prompts": {"query": "x"}}']
)
def test_a_damaged_contract_is_bad_input(prompted: Path, tasks: Any, tmp_path: Path, text: str) -> None:
    (prompted / "prompt_contract.json").write_text(text)
    with pytest.raises(BadInputError, match=r"prompt_contract\.json"):
        evaluate(str(prompted), tasks.retrieval(), tmp_path / "results", device="cpu")
