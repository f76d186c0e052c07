"""Templates of prompts, checked against what mteb runs the published models with."""

from __future__ import annotations

from typing import Any

import pytest
from mteb.models.model_implementations import bge_models, e5_instruct, e5_models, nvidia_models, qwen3_models
from mteb.types import PromptType
from pydantic import ValidationError

from nearfield.data.config import TEMPLATES, Prompts, render

TASK = "Given a web search query, retrieve relevant passages that answer the query"


def prompts(**stated: Any) -> Prompts:
    return Prompts.model_validate(stated)


def test_published_conventions() -> None:
    e5 = prompts(template="e5")
    assert {"query": e5.query, "document": e5.document} == e5_models.model_prompts
    bge = prompts(template="bge")
    assert bge.query == bge_models.model_prompts["query"]
    assert bge.document == ""
    assert "document" not in bge_models.model_prompts
    for name, published in (
        ("e5-instruct", e5_instruct.E5_INSTRUCTION.format(instruction=TASK)),
        ("qwen3-embedding", qwen3_models.instruction_template(TASK, PromptType.query)),
        ("nv-embed", nvidia_models._instruction_template(TASK, PromptType.query)),
    ):
        made = prompts(template=name, instruction=TASK)
        assert made.query == published
        assert made.document == ""
    assert qwen3_models.instruction_template(TASK, PromptType.document) == ""
    assert nvidia_models.NV_embed_v2.loader_kwargs["add_eos_token"] is TEMPLATES["nv-embed"].ends_with_eos is True
    assert e5_instruct.e5_mistral.loader_kwargs["apply_instruction_to_passages"] is False


def test_instructor_has_instructions_on_both_sides() -> None:
    made = prompts(
        template="instructor",
        instruction="Represent the Wikipedia question for retrieving supporting documents:",
        document_instruction="Represent the Wikipedia document for retrieval",
    )
    assert made.query == "Represent the Wikipedia question for retrieving supporting documents: "
    assert made.document == "Represent the Wikipedia document for retrieval: "
    assert TEMPLATES["instructor"].pools_prompt is False


def test_symmetric_tasks_have_the_instruction_on_both_sides() -> None:
    made = prompts(
        template="nv-embed", instruction="Retrieve similar text", document_instruction="Retrieve similar text"
    )
    assert made.query == made.document == "Instruct: Retrieve similar text\nQuery: "


def test_phrasings_and_stated_strings() -> None:
    made = prompts(template="e5-instruct", instruction=["Find the answer", "Answer it"])
    assert made.query == ("Instruct: Find the answer\nQuery: ", "Instruct: Answer it\nQuery: ")
    assert prompts(template="e5", document="text: ").document == "text: "
    assert Prompts(**made.model_dump()) == made, "as it is stored and read again"


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"template": "e5-instruct"}, "wants an instruction"),
        ({"template": "e5", "instruction": "Find"}, "takes no instruction"),
        ({"template": "bge", "document_instruction": "Find"}, "takes no instruction"),
        ({"template": "nv-embed", "instruction": " "}, "is empty"),
        ({"instruction": "Find"}, "needs a template"),
        ({"template": "e6"}, "Input should be 'e5'"),
    ],
)
def test_templates_that_cannot_be_filled(stated: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        prompts(**stated)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_text_in_braces_is_text(name: Any) -> None:
    template = TEMPLATES[name]
    if template.takes_instruction:
        assert "{query} {0}" in render(template, "Find {query} {0}", None)[0]
