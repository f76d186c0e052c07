"""Notices: facts that a user must know of a run or a score, which do not stop it.

A notice is said where the user looks: in the log, the manifest, the report, the model card and beside the scores. With
``--strict`` a notice is an error. The part that finds it returns it; the pipeline, the evaluation and the command line say it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nearfield.errors import BadInputError


@dataclass(frozen=True)
class Notice:
    """One fact: ``code`` names its kind (``texts-cut``), ``what`` is one sentence, ``hint`` says what to do about it."""

    code: str
    what: str
    hint: str | None = None
    blocks: bool = False
    """Whether the run would not start, or would surely fail."""

    @classmethod
    def of(cls, error: BadInputError) -> Notice:
        """An error that the run would end with."""
        return cls("error", f"{error.where}: {error.what}" if error.where else error.what, error.hint, blocks=True)

    def to_json(self) -> dict[str, Any]:
        """The notice as manifests and results keep it."""
        return {"code": self.code, "what": self.what, "hint": self.hint}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Notice:
        """A notice that :meth:`to_json` wrote."""
        return cls(str(data["code"]), str(data["what"]), data.get("hint"))


def refuse(notices: Iterable[Notice], where: str | None = None) -> None:
    """Raise :class:`BadInputError` that lists the notices, if there are any: what ``--strict`` does."""
    found = list(dict.fromkeys(notices))
    if found:
        hints = [notice.hint for notice in found if notice.hint]
        raise BadInputError(
            "; ".join(notice.what for notice in found),
            where=where,
            hint=" ".join([*hints, "Without --strict this is a warning."]),
        )
