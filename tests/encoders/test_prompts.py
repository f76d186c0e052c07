"""The prompt contract."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nearfield.data.config import Prompts
from nearfield.encoders import PromptConfig
from nearfield.encoders.config import RolePrompts
from nearfield.encoders.prompts import BasePrompts, PromptContract, add_examples, base_prompts, make_contract
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
    assert base_prompts(str(tmp_path)).prompts == {}
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
    with pytest.raises(ValueError, match="is given twice"):
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


def made(
    sources: dict[str, tuple[str, RolePrompts | Prompts]], base: BasePrompts | None = None, **config: Any
) -> PromptContract:
    found = [Source(name, task_type, prompts) for name, (task_type, prompts) in sources.items()]
    return make_contract(found, PromptConfig(**config), base or BasePrompts())


INSTRUCTION = "Instruct: classify\nQuery: "


@pytest.mark.parametrize(
    ("prompts", "config", "base", "text"),
    [
        (Prompts(query="c: "), {}, {}, "c: "),
        (Prompts(query="c: ", document="c: "), {}, {}, "c: "),
        (Prompts(document="c: "), {}, {}, "c: "),
        (Prompts(template="e5"), {}, {}, "query: "),
        (Prompts(template="e5-instruct", instruction="classify"), {}, {}, INSTRUCTION),
        (Prompts(), {}, {}, ""),
        (Prompts(), {"query": "q: ", "document": "d: "}, {}, "q: "),
        (Prompts(), {"query": "q: ", "text": "t: "}, {}, "t: "),
        (Prompts(), {}, {"query": "q: ", "document": "d: "}, ""),
        (Prompts(), {}, {"query": "q: ", "STS": "base: "}, "base: "),
        (Prompts(), {"text": ""}, {"STS": "base: "}, ""),
    ],
)
def test_both_sides_of_a_type_without_roles_get_one_prompt(
    prompts: Prompts, config: dict[str, str], base: dict[str, str], text: str
) -> None:
    contract = made({"a": ("STS", prompts)}, BasePrompts(base), fallback=RolePrompts(**config))
    assert contract.sources == {"a": {"query": text, "document": text}}
    assert contract.model_prompts["STS"] == text
    assert not {"STS-query", "STS-document"} & set(contract.model_prompts)
    assert contract.default_prompt_name in (None, *contract.model_prompts)


def test_two_prompts_for_texts_without_a_role_are_said() -> None:
    prompts = Prompts(query="a: ", document="b: ")
    contract = made({"a": ("STS", prompts)})
    assert contract.sources == {"a": {"query": "a: ", "document": "b: "}}
    assert {key: contract.model_prompts[key] for key in ("STS", "STS-document")} == {
        "STS": "a: ",
        "STS-document": "b: ",
    }
    assert [notice.code for notice in contract.notices()] == ["text-prompts-differ"]
    other = made({"a": ("STS", prompts)}, types={"STS": RolePrompts(text="b: ")})
    assert {key: text for key, text in other.model_prompts.items() if "STS" in key} == {
        "STS": "b: ",
        "STS-query": "a: ",
    }
    # An untrained side of a template is no statement.
    assert made({"a": ("STS", Prompts(template="e5"))}).notices() == []


def test_query_and_document_carry_what_was_trained() -> None:
    one = made(
        {
            "a": ("Retrieval", Prompts(template="e5-instruct", instruction="classify")),
            "b": ("STS", Prompts(query="s: ")),
        }
    )
    assert (one.model_prompts["query"], one.model_prompts["document"]) == (INSTRUCTION, "")
    alone = made({"b": ("Classification", Prompts(query="s: "))})
    assert (alone.model_prompts["query"], alone.model_prompts["document"]) == ("s: ", "s: ")
    kept = made({"b": ("STS", Prompts(query="s: "))}, BasePrompts({"query": "q: ", "document": "d: "}))
    assert (kept.model_prompts["query"], kept.model_prompts["document"]) == ("q: ", "d: ")
    several = {"a": ("Retrieval", Prompts(query="a: ")), "b": ("Reranking", Prompts(query="b: "))}
    with pytest.raises(BadInputError, match="query prompts of the task types differ") as caught:
        made(several)
    assert "prompts.fallback.query" in str(caught.value)
    stated = made(several, fallback=RolePrompts(query="b: "))
    assert (stated.model_prompts["query"], stated.model_prompts["Retrieval-query"]) == ("b: ", "a: ")
    assert stated.notices() == []
    untrained = made(several, fallback=RolePrompts(query="c: "))
    assert [notice.code for notice in untrained.notices()] == ["fallback-prompt-not-trained"]
    # A source that says nothing gets the base's own prompt, which is the natural one for what is not said.
    base = BasePrompts({"query": "base: "})
    mixed = made({"a": ("Retrieval", Prompts()), "b": ("Reranking", Prompts(query="b: "))}, base)
    assert mixed.model_prompts["query"] == "base: "


def test_what_a_recipe_states_for_a_type_must_be_trained_or_have_no_source() -> None:
    source = {"a": ("Classification", Prompts(query=("c: ", "d: ")))}
    for role in ("text", "query"):
        chosen = made(source, types={"Classification": RolePrompts(**{role: "d: "})})
        assert chosen.model_prompts["Classification"] == "d: "
    with pytest.raises(BadInputError, match="no source of type Classification is trained with it") as caught:
        made(source, types={"Classification": RolePrompts(text="e: ")})
    assert "prompts.types.Classification" in str(caught.value)
    two = {**source, "b": ("Classification", Prompts(query="e: "))}
    with pytest.raises(BadInputError, match="different prompts") as caught:
        made(two)
    assert "prompts.types.Classification.text" in str(caught.value)
    unseen = made(source, types={"STS": RolePrompts(query="s: "), "Reranking": RolePrompts(query="r: ")})
    assert (unseen.model_prompts["STS"], unseen.model_prompts["Reranking-query"]) == ("s: ", "r: ")
    assert "Reranking-document" not in unseen.model_prompts
    assert unseen.to_json()["types"]["STS"]["text"] == ["s: "]
    with pytest.raises(BadInputError, match="mteb knows no task type and no task 'MyOwnTask'"):
        made(source, types={"MyOwnTask": RolePrompts(text="s: ")})
    # A task that mteb has may be named; those of its type's sources bind it.
    task = made(source, types={"Banking77Classification": RolePrompts(text="d: "), "SciFact": RolePrompts(query="f: ")})
    assert (task.model_prompts["Banking77Classification"], task.model_prompts["SciFact-query"]) == ("d: ", "f: ")
    with pytest.raises(BadInputError, match="no source of type Classification is trained with it"):
        made(source, types={"Banking77Classification": RolePrompts(text="f: ")})


def test_texts_without_a_role_of_other_types_get_the_fallback() -> None:
    source = {"a": ("Retrieval", Prompts(query="query: ", document="passage: "))}
    silent = made(source)
    assert (silent.default_prompt, silent.default_prompt_name) == ("", None)
    same = made(source, fallback=RolePrompts(text="query: "))
    assert same.default_prompt_name == "query" and set(same.model_prompts) == set(silent.model_prompts)
    other = made(source, fallback=RolePrompts(text="t: "))
    assert other.model_prompts[str(other.default_prompt_name)] == "t: "
    base = BasePrompts(
        {"query": "base: ", "STS": "s: ", "Retrieval": "r: ", "Reranking": "k: ", "mine": "m: "}, "base: "
    )
    kept = made(source, base)
    assert kept.default_prompt == "base: " and kept.model_prompts[str(kept.default_prompt_name)] == "base: "
    assert kept.model_prompts["query"] == "query: "
    left = {key: kept.model_prompts[key] for key in ("STS", "Reranking-query", "Reranking-document", "mine")}
    assert left == {"STS": "s: ", "Reranking-query": "k: ", "Reranking-document": "k: ", "mine": "m: "}
    assert "Retrieval" not in kept.model_prompts
    stated = made(source, base, fallback=RolePrompts(query="query: ", text=""))
    assert stated.default_prompt_name is None and "STS" not in stated.model_prompts
    assert "Reranking-query" not in stated.model_prompts and stated.model_prompts["Reranking-document"] == "k: "


def test_a_prompt_of_the_base_for_one_task_gives_way_to_what_its_type_is_trained_with() -> None:
    base = BasePrompts({"Banking77Classification": "bank: ", "SciFact-query": "fact: "})
    contract = made({"a": ("Classification", Prompts(query="c: "))}, base)
    assert "Banking77Classification" not in contract.model_prompts
    assert contract.model_prompts["SciFact-query"] == "fact: "
    notice = contract.notices()[0]
    assert notice.code == "base-prompts-replaced" and "Banking77Classification" in notice.what


def test_a_training_after_another_keeps_what_that_trained() -> None:
    first = made({"a": ("Classification", Prompts(query="c: ")), "b": ("Retrieval", Prompts(query="q: "))})
    second = made({"d": ("STS", Prompts(query="s: "))}, first.as_base(), fallback=RolePrompts(query="q: ", text="t: "))
    wanted = {"Classification": "c: ", "Retrieval-query": "q: ", "query": "q: ", "STS": "s: "}
    assert {key: second.model_prompts[key] for key in wanted} == wanted
    assert set(second.to_json()["tasks"]) == {"a", "b", "d"}
    again = made({"a": ("Classification", Prompts(query="other: "))}, first.as_base())
    assert again.model_prompts["Classification"] == "other: "
    # A model of an earlier version lacks the key of texts without a role; what it was trained with is in its contract.
    old = BasePrompts({"Classification-query": "c: "}, None, {"a": {"task_type": "Classification", "query": "c: "}})
    assert made({"b": ("Retrieval", Prompts())}, old).model_prompts["Classification"] == "c: "


def test_examples_before_texts_without_a_role() -> None:
    contract = made({"a": ("Classification", Prompts(query="c: "))})
    kept = add_examples(contract, {"a": ["E1 ", "E2 "]}, evaluated=True)
    assert kept.model_prompts["Classification"] == kept.model_prompts["query"] == "E1 c: "
    assert set(kept.to_json()["prompts"]["query"]) == {"c: ", "E1 c: ", "E2 c: "}
    plain = add_examples(contract, {"a": ["E1 "]}, evaluated=False)
    assert plain.model_prompts == contract.model_prompts
    asked = add_examples(made({"a": ("Retrieval", Prompts(query="c: "))}), {"a": ["E1 "]}, evaluated=True)
    assert asked.model_prompts["query"] == asked.model_prompts["Retrieval-query"] == "E1 c: "


def test_base_prompts_of_a_folder(tmp_path: Path) -> None:
    settings = {"prompts": {"query": "q: ", "document": None, "s2s": "x: "}, "default_prompt_name": "s2s"}
    write_json(tmp_path / "config_sentence_transformers.json", settings)
    base = base_prompts(str(tmp_path))
    assert base == BasePrompts({"query": "q: ", "document": "", "s2s": "x: "}, "x: ")
    assert base.of("Retrieval", "query") == "q: " and base.of("STS", None) == "x: "
    assert base_prompts(str(tmp_path / "nothing")) == base_prompts("no/such-model-here") == BasePrompts()
    write_json(tmp_path / "prompt_contract.json", {"version": 1, "prompts": {}, "tasks": {"a": {"task_type": 3}}})
    with pytest.raises(BadInputError, match="damaged"):
        base_prompts(str(tmp_path))
