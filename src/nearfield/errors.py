"""Words to the user: errors, with the exit codes of the command line, and notices, which do not stop a run.

Nothing here imports another part: every part of the package may raise these.

Notices are facts that a user must know of a run or a score. A notice is said where the user looks: in the log, the manifest, the
report, the model card and beside the scores. With ``--strict`` a notice is an error, unless it is minor. The part that finds it
returns it, or calls :func:`say` where nobody takes what it returns; the pipeline, the evaluation and the command line tell it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3
EXIT_NON_FINITE = 4
EXIT_OUT_OF_MEMORY = 75
"""As ``EX_TEMPFAIL``: the same command may succeed."""


class NearfieldError(Exception):
    """Something went wrong that the user can act on.

    ``what`` is one sentence that says what is wrong, ``where`` the place (file, line, key, row) and ``hint`` what to
    do about it. The command line prints the three and leaves with ``exit_code``, without a traceback.
    """

    exit_code = EXIT_FAULT

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.hint:
            lines.append(f"  -> {self.hint}")
        return "\n".join(lines)


class BadInputError(NearfieldError):
    """The input (a recipe, a data file, a model folder, a checkpoint, an argument) cannot be used as it is."""

    exit_code = EXIT_BAD_INPUT


class StoppedError(NearfieldError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has written a checkpoint to go on from."""

    exit_code = EXIT_STOPPED


class NonFiniteError(NearfieldError):
    """The loss or a gradient is not a finite number; the last good state is in a checkpoint."""

    exit_code = EXIT_NON_FINITE


class OutOfMemoryStopError(NearfieldError):
    """Memory ran out on a backend that cannot repeat a step; the last checkpoint holds a smaller budget to go on with."""

    exit_code = EXIT_OUT_OF_MEMORY


# Notices

logger = logging.getLogger("nearfield.notices")


@dataclass(frozen=True)
class Notice:
    """One fact: ``code`` names its kind (``texts-cut``), ``what`` is one sentence, ``hint`` says what to do about it."""

    code: str
    what: str
    hint: str | None = None
    blocks: bool = False
    """Whether the run would not start, or would surely fail."""
    minor: bool = False
    """Whether ``--strict`` lets it pass: a matter of course, such as a last batch that is not full."""

    @property
    def sentence(self) -> str:
        """The fact and what to do about it, for a log."""
        return f"{self.what} ({self.hint})" if self.hint else self.what

    @classmethod
    def of(cls, error: BadInputError) -> Notice:
        """An error that the run would end with."""
        return cls("error", f"{error.where}: {error.what}" if error.where else error.what, error.hint, blocks=True)

    def to_json(self) -> dict[str, Any]:
        """The notice as manifests and results keep it."""
        return {
            "code": self.code,
            "what": self.what,
            "hint": self.hint,
            **({"blocks": True} if self.blocks else {}),
            **({"minor": True} if self.minor else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Notice:
        """A notice that :meth:`to_json` wrote."""
        marks = {name: bool(data.get(name, False)) for name in ("blocks", "minor")}
        return cls(str(data["code"]), str(data["what"]), data.get("hint"), **marks)


def stop_on_blocking(notices: Iterable[Notice], where: str | None = None) -> None:
    """Raise :class:`BadInputError` that lists the notices of what would surely fail, if there are any."""
    blocking = [notice for notice in dict.fromkeys(notices) if notice.blocks]
    if blocking:
        hints = [notice.hint for notice in blocking if notice.hint]
        raise BadInputError("; ".join(notice.what for notice in blocking), where=where, hint=" ".join(hints) or None)


def refuse(notices: Iterable[Notice], where: str | None = None) -> None:
    """Raise :class:`BadInputError` that lists the notices, if any is not minor: what ``--strict`` does."""
    serious = [notice for notice in dict.fromkeys(notices) if not notice.minor]
    if serious:
        hints = [notice.hint for notice in serious if notice.hint]
        raise BadInputError(
            "; ".join(notice.what for notice in serious),
            where=where,
            hint=" ".join([*hints, "Without --strict this is a warning."]),
        )


class Said:
    """Notices by what they are of: the name of a task, or ``""`` for the model and all else. Each is logged when it is new."""

    def __init__(self) -> None:
        self._found: dict[str, dict[Notice, None]] = {}
        self._logged: set[Notice] = set()
        self._now = ""

    def say(self, notice: Notice, of: str | None = None) -> None:
        """Keep a notice of ``of``, by default of what :meth:`about` names now."""
        name = self._now if of is None else of
        self._found.setdefault(name, {})[notice] = None
        if notice not in self._logged:
            self._logged.add(notice)
            _log(notice, name)

    def of(self, name: str = "") -> tuple[Notice, ...]:
        """The notices of this, in order."""
        return tuple(self._found.get(name, {}))

    def all(self) -> dict[str, tuple[Notice, ...]]:
        """Everything that was said, by what it is of."""
        return {name: tuple(notices) for name, notices in self._found.items() if notices}

    @contextlib.contextmanager
    def about(self, name: str) -> Iterator[None]:
        """Notices said inside without a name belong to ``name``."""
        before, self._now = self._now, name
        try:
            yield
        finally:
            self._now = before


_LISTENING: list[Said] = []


@contextlib.contextmanager
def listening(said: Said | None = None) -> Iterator[Said]:
    """Hear what :func:`say` is called with inside; what a listener around it has logged is not logged again."""
    heard = said or Said()
    if _LISTENING:
        heard._logged = _LISTENING[-1]._logged
    _LISTENING.append(heard)
    try:
        yield heard
    finally:
        _LISTENING.pop()


def say(notice: Notice, of: str | None = None) -> None:
    """Tell a notice to whoever listens (the evaluation, of the task that it scores, or of the one named ``of``); else log it."""
    if _LISTENING:
        _LISTENING[-1].say(notice, of)
    else:
        _log(notice, of or "")


def _log(notice: Notice, of: str) -> None:
    level = logging.INFO if notice.minor else logging.WARNING
    logger.log(level, "%s", f"{of}: {notice.sentence}" if of else notice.sentence)


def in_file(notices: Iterable[Notice]) -> list[dict[str, Any]]:
    """Notices as manifests and results keep them, each once."""
    return [notice.to_json() for notice in dict.fromkeys(notices)]


def from_file(value: Any) -> tuple[Notice, ...]:
    """Notices that :func:`in_file` wrote; none where the file is older than notices."""
    entries: Sequence[Any] = value if isinstance(value, list) else []
    return tuple(Notice.from_json(one) for one in entries if isinstance(one, dict) and {"code", "what"} <= set(one))


@dataclass(frozen=True)
class CutTexts:
    """Counts of texts and tokens that a longest input cuts off, for a notice (``texts-cut``)."""

    texts: int = 0
    cut: int = 0
    """Texts that lost tokens."""
    tokens: int = 0
    """Of all texts, uncut."""
    lost: int = 0
    """Tokens that are not read."""

    def __add__(self, other: CutTexts) -> CutTexts:
        return CutTexts(
            self.texts + other.texts, self.cut + other.cut, self.tokens + other.tokens, self.lost + other.lost
        )

    def say(self, length: int) -> str:
        """The share of texts and of tokens, in words."""
        return (
            f"{self.cut:,} of {self.texts:,} texts ({self.cut / max(1, self.texts):.1%}) are cut at {length:,} tokens and lose "
            f"{self.lost:,} of all {self.tokens:,} tokens ({self.lost / max(1, self.tokens):.1%})"
        )

    def to_json(self) -> dict[str, int]:
        """The entry of a file."""
        return asdict(self)
