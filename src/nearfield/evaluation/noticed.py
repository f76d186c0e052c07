"""Notices of scores that are shown: by model, with the tasks that each holds for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nearfield.evaluation.scores import Key, TaskScores
    from nearfield.notices import Notice

MARK = " *"
"""What stands behind a score that has a notice."""
_NAMED = 6


@dataclass(frozen=True)
class ScoreNotice:
    """A notice of one model's scores on ``tasks``; ``everywhere`` if these are all that are shown of it."""

    model: str
    code: str
    what: str
    hint: str | None
    tasks: tuple[str, ...]
    everywhere: bool

    @property
    def sentence(self) -> str:
        """The notice in one line, as tables have it below them."""
        return f"* {self.model} on {tasks_in_words(self.tasks, self.everywhere)}: {self.what}"


def tasks_in_words(tasks: Sequence[str], everywhere: bool) -> str:
    """Names of tasks; of many only the first ones."""
    if everywhere and len(tasks) > 1:
        return "all tasks"
    more = f" and {len(tasks) - _NAMED} more" if len(tasks) > _NAMED else ""
    return ", ".join(tasks[:_NAMED]) + more


def score_notices(read: Mapping[str, Mapping[Key, TaskScores]], keys: Iterable[Key]) -> tuple[ScoreNotice, ...]:
    """The notices of each model's scores under these keys."""
    shown = list(keys)
    made = []
    for model, found in read.items():
        own = [key for key in shown if key in found]
        tasks: dict[Notice, dict[str, None]] = {}
        for key in own:
            for notice in found[key].notices:
                tasks.setdefault(notice, {})[key[0]] = None
        scored = {key[0] for key in own}
        made += [
            ScoreNotice(model, notice.code, notice.what, notice.hint, tuple(of), set(of) == scored)
            for notice, of in tasks.items()
        ]
    return tuple(made)


def noticed(notices: Iterable[ScoreNotice]) -> set[tuple[str, str]]:
    """Model and task of each score that has a notice."""
    return {(notice.model, task) for notice in notices for task in notice.tasks}
