"""Prompts before texts: strings, templates of published models for one's own instructions, and in-context examples.

``tests/data/test_prompts.py`` compares the templates with the conventions that mteb runs the published models by.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from nearfield.config import Config

TemplateName = Literal["e5", "e5-instruct", "qwen3-embedding", "nv-embed", "bge", "instructor"]


@dataclass(frozen=True)
class PromptTemplate:
    """``{instruction}`` in a template stands for the task; one without it takes none."""

    query: str
    """Before queries."""
    document: str
    """Before documents. Used where there is no instruction for documents."""
    source: str
    """The paper and a model that was trained so."""
    pools_prompt: bool = True
    """Whether the published models count the prompt's tokens in pooling."""
    ends_with_eos: bool = False
    """Whether they end texts with the end-of-text token."""

    @property
    def takes_instruction(self) -> bool:
        """Whether the query's prompt has a place for an instruction."""
        return "{instruction}" in self.query


TEMPLATES: dict[TemplateName, PromptTemplate] = {
    "e5": PromptTemplate("query: ", "passage: ", "E5 (arXiv 2212.03533); intfloat/e5-base-v2"),
    "e5-instruct": PromptTemplate(
        "Instruct: {instruction}\nQuery: ",
        "",
        "E5-mistral (arXiv 2401.00368); intfloat/e5-mistral-7b-instruct",
        ends_with_eos=True,
    ),
    "qwen3-embedding": PromptTemplate(
        "Instruct: {instruction}\nQuery:",
        "",
        "Qwen3-Embedding (arXiv 2506.05176); Qwen/Qwen3-Embedding-0.6B: no space behind the colon",
        ends_with_eos=True,
    ),
    "nv-embed": PromptTemplate(
        "Instruct: {instruction}\nQuery: ",
        "",
        "NV-Embed (arXiv 2405.17428, section 4); nvidia/NV-Embed-v2",
        pools_prompt=False,
        ends_with_eos=True,
    ),
    "bge": PromptTemplate(
        "Represent this sentence for searching relevant passages: ",
        "",
        "C-Pack (arXiv 2309.07597); BAAI/bge-base-en-v1.5",
    ),
    "instructor": PromptTemplate(
        "{instruction}: ",
        "",
        "INSTRUCTOR (arXiv 2212.09741): 'Represent the (domain) text_type for task_objective:', on both sides",
        pools_prompt=False,
    ),
}


def render(template: PromptTemplate, query: str | None, document: str | None) -> tuple[str, str]:
    """The query's and the document's prompt for these instructions; None is no instruction.

    Raises ValueError where the template wants an instruction that is missing, or takes none.
    """
    if template.takes_instruction != (query is not None) or (document is not None and not template.takes_instruction):
        raise ValueError(
            "this template wants an instruction" if template.takes_instruction else "this template takes no instruction"
        )
    if not template.takes_instruction:
        return template.query, template.document
    put = {role: (text or "").strip().removesuffix(":") for role, text in (("query", query), ("document", document))}
    if not put["query"]:
        raise ValueError("the instruction is empty")
    before = template.query.replace("{instruction}", put["query"])
    behind = template.query.replace("{instruction}", put["document"]) if put["document"] else template.document
    return before, behind


Phrasings = Annotated[tuple[str, ...], Field(min_length=1)]


class Prompts(Config):
    """Strings put before the text of an item, a role; null leaves it to the training recipe, and there to the base model.

    Where the texts of the task type have no role (classification, clustering, pairs and the like), ``query`` is put before
    all of them, unless ``document`` is stated, too.
    Several phrasings of one prompt are a list: training draws one for each example and epoch, and the model keeps the first.
    Instead of the strings a ``template`` of a published model can be named, with instructions for the places that it has.
    """

    query: str | Phrasings | None = None
    """Before queries; an empty string is no prompt, null leaves it to the training recipe."""
    document: str | Phrasings | None = None
    """Before documents."""
    template: TemplateName | None = None
    """Makes the strings that are not stated."""
    instruction: str | Phrasings | None = None
    """The task, in one or several phrasings; the template puts it before queries."""
    document_instruction: str | None = None
    """The same for documents; null leaves them as the template has them without one."""

    @model_validator(mode="before")
    @classmethod
    def _from_template(cls, stated: Any) -> Any:
        if not isinstance(stated, dict):
            return stated
        # Whoever reads JSON strictly takes a list for a tuple, but not what comes out of here.
        stated = {key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()}
        if not isinstance(stated.get("template"), str):
            return stated
        template = TEMPLATES.get(stated["template"])
        if template is None:
            return stated
        instruction = stated.get("instruction")
        phrasings = list(instruction) if isinstance(instruction, (list, tuple)) else [instruction]
        made = [render(template, phrasing, stated.get("document_instruction")) for phrasing in phrasings]
        queries = [query for query, _ in made]
        return {"query": tuple(queries) if len(queries) > 1 else queries[0], "document": made[0][1], **stated}

    @property
    def states_document(self) -> bool:
        """Whether the prompt before documents is stated, and not what a template has where nothing is said of documents."""
        made = None if self.template is None else TEMPLATES[self.template].document
        return self.document is not None and (made is None or self.document != made or bool(self.document_instruction))

    @model_validator(mode="after")
    def _instructions_need_a_template(self) -> Self:
        if self.template is None and (self.instruction is not None or self.document_instruction is not None):
            raise ValueError("an instruction needs a template that says where it stands")
        return self

    @field_validator("query", "document")
    @classmethod
    def _different(cls, prompt: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(prompt, tuple) and len(set(prompt)) < len(prompt):
            raise ValueError("a phrasing is given twice")
        return prompt


class InContextConfig(Config):
    """Examples of the training split, put before a query's prompt (LG-ANNA, arXiv 2506.07438); documents carry none.

    A few sets of examples are drawn once a source, each of 1 to ``most`` examples. Training draws for each example and
    epoch one of the sets that hold neither its query nor one of its positives, or none.
    """

    sources: tuple[str, ...] | None = None
    """The sources whose queries get examples; null means all."""
    draws: Annotated[int, Field(ge=1, le=256)] = 8
    """Sets a source. Queries are tokenised once with each."""
    most: Annotated[int, Field(ge=1, le=64)] = 3
    """Examples in a set, at most."""
    none: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of the rows that get no examples, so that the model works without."""
    max_words: Annotated[int, Field(ge=1)] = 32
    """Longer texts in an example are cut to so many words."""
    query_tokens: Annotated[int, Field(ge=1)] = 64
    """Room that a prompt with examples must leave below the encoder's maximum length."""
    head: str = "Examples:\n"
    """The text before the examples."""
    example: str = "query: {query}\ndocument: {document}\n"
    """The text of each example, with its two places."""
    evaluated: Literal["plain", "examples"] = "plain"
    """Whether the model is saved with the prompt alone, or with the first set of examples before it."""

    @field_validator("example")
    @classmethod
    def _has_both(cls, template: str) -> str:
        if set(re.findall(r"\{([^{}]*)\}", template)) != {"query", "document"}:
            raise ValueError("the template of an example must hold {query} and {document}, and nothing else in braces")
        return template
