"""The prompts of published models, as templates for one's own instructions.

Each says what stands before a query and before a document. ``tests/data/test_prompt_templates.py`` compares them with the
conventions that mteb runs the published models by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TemplateName = Literal["e5", "e5-instruct", "qwen3-embedding", "nv-embed", "bge", "instructor"]


@dataclass(frozen=True)
class PromptTemplate:
    """``{instruction}`` in a template stands for the task; one without it takes none."""

    query: str
    document: str
    """Where there is no instruction for documents."""
    source: str
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
