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
    result = evaluate(str(prompted), tasks.retrieval(), tmp_path / "results")
    assert result.failures == {} and "TinyRetrieval" in result.scores


def test_an_unlisted_prompt_stops_the_run_and_names_everything(prompted: Path, tasks: Any, tmp_path: Path) -> None:
    contract(prompted, ["search: ", "ask: "], [""])
    with pytest.raises(BadInputError) as caught:
        evaluate(str(prompted), tasks.retrieval(), tmp_path / "results")
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
        evaluate(str(folder), tasks.retrieval(), tmp_path / "results")


def write(folder: Path, source: dict[str, Any], version: int = 2, **more: Any) -> None:
    """The contract of one source: its task type, query and document."""
    listed = {role: [source[role]] for role in ("query", "document")}
    data = {"version": version, "prompts": listed, "fallback": {}, "tasks": {"a": source}, **more}
    (folder / "prompt_contract.json").write_text(json.dumps(data))


def test_texts_without_a_role_get_what_such_texts_were_trained_with(
    make_model: Callable[..., Path], tasks: Any, tmp_path: Path
) -> None:
    out, suite = tmp_path / "results", tasks.sts()
    source = {"task_type": "STS", "query": "same: ", "document": "same: "}
    right = make_model(tmp_path / "right", {"STS": "same: ", "query": "query: "})
    write(right, source)
    assert evaluate(str(right), suite, out).failures == {}
    # A trained instruction that mteb does not find is dropped, and no prompt was trained on one side alone.
    dropped = make_model(tmp_path / "dropped", {"STS-query": "same: ", "query": "query: "})
    for version in (1, 2):
        write(dropped, {**source, "document": "" if version == 1 else "same: "}, version)
        with pytest.raises(BadInputError, match="no prompt before each text without a role") as caught:
            evaluate(str(dropped), suite, out)
        assert "'same: '" in str(caught.value) and "(STS)" in str(caught.value)
    # The default prompt counts.
    default = make_model(tmp_path / "default", {"query": "same: "}, default="query")
    write(default, source)
    assert evaluate(str(default), suite, out).failures == {}
    write(default, {**source, "query": "", "document": ""})
    with pytest.raises(BadInputError, match="would put 'same: ' before each text without a role"):
        evaluate(str(default), suite, out)


def test_a_type_that_no_source_had_is_said(prompted: Path, tasks: Any, tmp_path: Path) -> None:
    """A model for retrieval alone is scored all the same, with the prompt that its tasks without roles resolve to."""
    suite, out = tasks.every_type(), tmp_path / "results"
    write(prompted, {"task_type": "Retrieval", "query": "query: ", "document": ""}, fallback={"text": ""})
    result = evaluate(str(prompted), suite, out)
    said = {name: [one for one in of if one.code == "type-not-trained"] for name, of in result.notices.items()}
    assert result.failures == {} and "TinyRetrieval" in result.scores
    assert {name for name, of in said.items() if of} == set(result.scores) - {"TinyRetrieval"}
    assert (
        "no source of the training was of type STS; TinySTS puts no prompt before its texts" in said["TinySTS"][0].what
    )
    assert "'query: ' before each query and no prompt before each document" in said["TinyReranking"][0].what
    filed = json.loads((result.results_dir / "TinySTS.json").read_text())["notices"]
    assert "type not trained" in json.dumps(filed)
    # Whoever wants the query's prompt before such texts says so in the model, as E5 has it.
    settings = json.loads((prompted / "config_sentence_transformers.json").read_text())
    settings["prompts"]["STS"] = "query: "
    (prompted / "config_sentence_transformers.json").write_text(json.dumps(settings))
    again = evaluate(str(prompted), tasks.root / "TinySTS", out)
    assert "TinySTS puts 'query: ' before its texts" in again.notices["TinySTS"][0].what
    settings["prompts"]["STS"] = "other: "
    (prompted / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(BadInputError, match="would put 'other: ' before each text without a role"):
        evaluate(str(prompted), tasks.root / "TinySTS", out)


def test_as_is_scores_the_model_as_mteb_would(prompted: Path, tasks: Any, tmp_path: Path) -> None:
    contract(prompted, ["search: "], [""])
    result = evaluate(str(prompted), tasks.retrieval(), tmp_path / "results", prompts="as-is")
    assert result.failures == {}
    assert [notice.code for notice in result.notices[""]] == ["prompts-as-is"]
    assert "it does not allow those of TinyRetrieval ('query: ')" in result.notices[""][0].what
    filed = json.loads((result.results_dir / "TinyRetrieval.json").read_text())["notices"]
    assert "the prompt contract was not checked" in json.dumps(filed)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 3}',
        '{"version": 2, "prompts": {}, "tasks": {"a": 1}}',
        '{"version": 2}',
        '{"version": 1}',
        '{"version": 1, "prompts": {"query": "x"}}',
    ],
)
def test_a_damaged_contract_is_bad_input(prompted: Path, tasks: Any, tmp_path: Path, text: str) -> None:
    (prompted / "prompt_contract.json").write_text(text)
    with pytest.raises(BadInputError, match=r"prompt_contract\.json"):
        evaluate(str(prompted), tasks.retrieval(), tmp_path / "results")
