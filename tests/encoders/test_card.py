"""Model cards: where the weights come from, for every way in which a recipe makes an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from nearfield.encoders import EncoderConfig, PromptConfig
from nearfield.encoders.card import model_card, origin_of, usage
from nearfield.encoders.config import RolePrompts
from nearfield.encoders.prompts import BasePrompts, PromptContract, make_contract

BASE = ("org/base", "abc")
USED = """\
queries = model.encode_query(["a query"])
documents = model.encode_document(["a document"])
similarities = model.similarity(queries, documents)"""
NAMED = "`org/base` (revision `abc`)"


@dataclass
class Source:
    name: str
    task_type: str
    prompts: RolePrompts


def contract_of(sources: dict[str, tuple[str, dict[str, str]]], **config: Any) -> PromptContract:
    """Of sources: name -> (task type, prompts)."""
    made = [Source(name, task_type, RolePrompts(**prompts)) for name, (task_type, prompts) in sources.items()]
    return make_contract(made, PromptConfig(**config), BasePrompts())


def front_of(settings: dict[str, Any], base: tuple[str, str] = BASE) -> tuple[str, dict[str, Any]]:
    """The sentence on the origin, and the front matter, of a card for these settings of an encoder."""
    origin = origin_of(EncoderConfig(**settings), base)
    text = model_card("mine", origin, contract_of({"s": ("Retrieval", {})}), {})
    assert origin.sentence in text
    return origin.sentence, yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(
    ("settings", "words", "relation"),
    [
        ({}, f"Fine-tuned from {NAMED} with nearfield.", "finetune"),
        ({"fresh": {}}, "Trained from new weights, drawn at random", None),
        ({"fresh": {"hidden_size": 32}}, f"architecture are those of {NAMED}, with hidden_size changed.", None),
        ({"layers": 2}, "Of its layers the first 2 are kept.", "finetune"),
        ({"adapter": {"kind": "lora"}}, f"A low-rank adapter, trained with nearfield on {NAMED}, whose weights", "finetune"),
        ({"adapter": {"kind": "lora", "save": "adapter"}}, f"on {NAMED}, and needs it to load.", "adapter"),
        ({"adapter": {"kind": "prefix"}}, "A prefix, trained with nearfield", "finetune"),
        ({"projection": {"dimensions": 8}}, "New, and trained from nothing: the projection.", "finetune"),
        ({"pooling": {"kind": "attention"}}, "New, and trained from nothing: the pooling.", "finetune"),
    ],
)  # fmt: skip
def test_a_card_says_what_the_weights_were(settings: dict[str, Any], words: str, relation: str | None) -> None:
    sentence, front = front_of(settings)
    assert words in sentence
    assert ("Fine-tuned" in sentence) == ("fresh" not in settings and "adapter" not in settings)
    assert front.get("base_model") == (None if relation is None else "org/base")
    assert front.get("base_model_relation") == relation


def test_an_image_tower_is_a_second_base_or_new(tmp_path: Path) -> None:
    sentence, front = front_of({"image_tower": {"model": "org/pictures"}})
    assert "The image tower is that of `org/pictures`." in sentence and front["base_model"] == [
        "org/base",
        "org/pictures",
    ]
    sentence, front = front_of({"image_tower": {"architecture": "vit"}})
    assert "The image tower (vit) was trained from new weights." in sentence and front["base_model"] == "org/base"
    sentence, front = front_of({"image_tower": {"model": str(tmp_path)}})
    assert str(tmp_path.parent) not in sentence and tmp_path.name in sentence and front["base_model"] == "org/base"


def test_a_local_base_is_named_in_the_text_alone() -> None:
    sentence, front = front_of({}, ("local/base", "abc"))
    assert "`local/base`" in sentence and not {"base_model", "base_model_relation"} & set(front)


def test_the_snippet_names_a_prompt_where_plain_methods_would_put_another() -> None:
    one = {"a": ("Retrieval", {"query": "q: ", "document": "d: "})}
    assert "\n".join(usage(contract_of(one))) == USED
    # Plain methods use what the recipe states for other tasks.
    other = usage(contract_of(one, fallback=RolePrompts(query="")))
    assert other[0] == 'queries = model.encode_query(["a query"], prompt_name="Retrieval-query")'
    assert other[1] == 'documents = model.encode_document(["a document"])'
    plain = usage(contract_of({"a": ("STS", {})}))
    assert plain[0] == 'texts = model.encode(["a text", "another text"])'
    prompted = usage(contract_of({"a": ("STS", {"query": "q: "})}))
    assert prompted[0] == 'texts = model.encode(["a text", "another text"], prompt_name="STS")'
    default = usage(contract_of({"a": ("STS", {"query": ""})}, fallback=RolePrompts(text="t: ")))
    assert default == prompted
    both = usage(contract_of({**one, "b": ("Classification", {"query": "c: "})}))
    assert both[:2] == [
        "# Classification",
        'texts = model.encode(["a text", "another text"], prompt_name="Classification")',
    ]
    assert both[3:5] == ["", "# Retrieval"] and "\n".join(both[5:]) == USED
    # Types whose queries are alike and whose documents are not have lines of their own.
    alike = {**one, "b": ("Reranking", {"query": "q: ", "document": "d: "})}
    assert "\n".join(usage(contract_of(alike))) == f"# Reranking, Retrieval\n{USED}"
    alike["b"] = ("Reranking", {"query": "q: ", "document": ""})
    assert usage(contract_of(alike, fallback=RolePrompts(document="d: ")))[:3] == [
        "# Reranking",
        'queries = model.encode_query(["a query"])',
        'documents = model.encode_document(["a document"], prompt_name="Reranking-document")',
    ]


def test_a_card_says_what_types_that_are_not_trained_get() -> None:
    made = contract_of({"a": ("Retrieval", {"query": "q: "})}, fallback=RolePrompts(text="t: "))
    text = model_card("mine", origin_of(EncoderConfig(), BASE), made, {})
    assert 'Type not trained: tasks of types other than those of the sources (Retrieval) get query `"q: "`' in text
    assert 'texts without a role `"t: "`.' in text
