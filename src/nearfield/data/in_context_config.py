"""In-context examples before queries (LG-ANNA, arXiv 2506.07438, section on the query template)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from nearfield.config import Config


class InContextConfig(Config):
    """Examples of the training split, put before a query's prompt; documents carry none.

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
    example: str = "query: {query}\ndocument: {document}\n"
    evaluated: Literal["plain", "examples"] = "plain"
    """Whether the model is saved with the prompt alone, or with the first set of examples before it."""

    @field_validator("example")
    @classmethod
    def _has_both(cls, template: str) -> str:
        if set(re.findall(r"\{([^{}]*)\}", template)) != {"query", "document"}:
            raise ValueError("the template of an example must hold {query} and {document}, and nothing else in braces")
        return template
