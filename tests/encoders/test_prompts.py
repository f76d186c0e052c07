"""The prompt contract."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nearfield.data.config import Prompts
from nearfield.encoders.base_prompts import BasePrompts, base_prompts
from nearfield.encoders.config import PromptConfig, RolePrompts
from nearfield.encoders.prompts import add_examples, make_contract
from nearfield.errors import BadInputError
from nearfield.files import read_json, write_json


@dataclass
class Source:
    name: str
    task_type: str = "Retrieval"
    prompts: RolePrompts | Prompts = field(default_factory=RolePrompts)


def test_a_prompt_is_the_first_that_is_stated() -> None:
    sources = [Source("own", prompts=RolePrompts(query="own: ", document="")), Source("plain", "STS")]
    sources.append(Source("asked", "Reranking"))
    base = BasePrompts({"query": "base: ", "document": "passage: "})
    contract = make_contract(sources, PromptConfig(fallback=RolePrompts(query="fall: ")), base)
    assert contract.sources == {
        "own": {"query": "own: ", "document": ""},
        "plain": {"query": "fall: ", "document": "fall: "},
        "asked": {"query": "fall: ", "document": "passage: "},
    }
    assert contract.model_prompts == {
        "query": "fall: ",
        "document": "passage: ",
        "Retrieval-query": "own: ",
        "Retrieval-document": "",
        "Reranking-query": "fall: ",
        "Reranking-document": "passage: ",
        "STS": "fall: ",
    }
    assert contract.to_json()["prompts"] == {"query": ["fall: ", "own: "], "document": ["", "fall: ", "passage: "]}


def test_nothing_stated_is_no_prompt() -> None:
    contract = make_contract([Source("plain")], PromptConfig(), BasePrompts())
    assert contract.sources == {"plain": {"query": "", "document": ""}}
    assert set(contract.model_prompts.values()) == {""}


def test_sources_of_a_type_must_agree_or_the_recipe_decides() -> None:
    sources = [Source("a", prompts=RolePrompts(query="a: ")), Source("b", prompts=RolePrompts(query="b: "))]
    with pytest.raises(BadInputError, match="different query prompts"):
        make_contract(sources, PromptConfig(), BasePrompts())
    config = PromptConfig(types={"Retrieval": RolePrompts(query="a: ")})
    assert make_contract(sources, config, BasePrompts()).model_prompts["Retrieval-query"] == "a: "


def test_contract_file_and_base_prompts(tmp_path: Path) -> None:
    contract = make_contract([Source("a", prompts=RolePrompts(query="a: "))], PromptConfig(), BasePrompts())
    contract.save(tmp_path)
    assert read_json(tmp_path / "prompt_contract.json")["tasks"]["a"] == {
        "task_type": "Retrieval",
        "query": "a: ",
        "document": "",
    }
    assert base_prompts(str(tmp_path)) == BasePrompts()
    settings = {"prompts": contract.model_prompts, "default_prompt_name": None}
    write_json(tmp_path / "config_sentence_transformers.json", settings)
    assert base_prompts(str(tmp_path)) == contract.as_base()


def test_a_stated_fallback_is_listed_and_silence_is_not() -> None:
    sources = [Source("a", prompts=RolePrompts(query="a: ", document="d: "))]
    silent = make_contract(sources, PromptConfig(), BasePrompts())
    assert silent.to_json()["prompts"] == {"query": ["a: "], "document": ["d: "]}
    assert silent.model_prompts["query"] == "a: "
    stated = make_contract(sources, PromptConfig(fallback=RolePrompts(query="")), BasePrompts())
    assert stated.to_json()["prompts"] == {"query": ["", "a: "], "document": ["d: "]}


def test_the_model_keeps_the_first_phrasing_and_the_contract_lists_all() -> None:
    sources = [Source("a", prompts=Prompts(query=("ask: ", "", "question: "), document="d: ")), Source("b", "STS")]
    contract = make_contract(sources, PromptConfig(), BasePrompts())
    assert contract.sources["a"] == {"query": "ask: ", "document": "d: "}
    assert contract.model_prompts["Retrieval-query"] == "ask: "
    assert contract.of("a", "query") == ("ask: ", "", "question: ")
    assert contract.of("a", "document") == ("d: ",)
    assert contract.of("b", "query") == ("",)
    listed = contract.to_json()
    assert listed["prompts"] == {"query": ["", "ask: ", "question: "], "document": ["", "d: "]}
    assert listed["tasks"]["a"]["phrasings"] == {"query": ["ask: ", "", "question: "]}
    assert "phrasings" not in listed["tasks"]["b"]
    one = make_contract([Source("a", prompts=Prompts(query=("ask: ",)))], PromptConfig(), BasePrompts())
    plain = make_contract([Source("a", prompts=Prompts(query="ask: "))], PromptConfig(), BasePrompts())
    assert one == plain and one.inputs() == plain.sources and contract.inputs() != contract.sources
    with pytest.raises(ValueError, match="stands twice"):
        Prompts(query=("a", "a"))


def test_examples_are_more_prompts_of_queries() -> None:
    sources = [Source("a", prompts=RolePrompts(query="ask: ")), Source("b", "STS")]
    contract = make_contract(sources, PromptConfig(), BasePrompts())
    plain = add_examples(contract, {"a": ["E1 ", "E2 "]}, evaluated=False)
    assert plain.of("a", "query") == ("ask: ", "E1 ask: ", "E2 ask: ")
    assert plain.of("a", "document") == ("",) and plain.of("b", "query") == ("",)
    assert plain.model_prompts == contract.model_prompts
    kept = add_examples(contract, {"a": ["E1 ", "E2 "]}, evaluated=True)
    assert kept.model_prompts["Retrieval-query"] == kept.of("a", "query")[0] == "E1 ask: "
    assert set(kept.to_json()["prompts"]["query"]) == {"", "ask: ", "E1 ask: ", "E2 ask: "}
    assert add_examples(contract, {}, evaluated=True) == contract
    twins = make_contract([Source("a"), Source("b")], PromptConfig(), BasePrompts())
    with pytest.raises(BadInputError, match="two sources of type Retrieval"):
        add_examples(twins, {"a": ["E "], "b": ["F "]}, evaluated=True)
