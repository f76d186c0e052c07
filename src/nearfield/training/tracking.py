"""The figures of a run: JSON lines that others read, TensorBoard and Weights & Biases where asked, a progress display."""

from __future__ import annotations

import configparser
import contextlib
import json
import logging
import math
import netrc
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import urlsplit

from nearfield.console import stderr_console
from nearfield.errors import BadInputError, NearfieldError
from nearfield.files import EVALUATIONS, METRICS, atomic_path, read_json, read_metrics, write_json
from nearfield.training.step import Part, StepMade

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from nearfield.training.config import TrackerSettings, WandbConfig


logger = logging.getLogger("nearfield.training")


def used_memory(device: torch.device) -> dict[str, int]:
    """The most memory that tensors took on a GPU so far, in bytes; nothing on a CPU, where no one counts it."""
    if device.type != "cuda":
        return {}
    import torch

    return {"memory_bytes": torch.cuda.max_memory_allocated(device)}


class TrainingProgress:
    """Loss, rate and time left: a bar on a terminal, a log line every ten seconds elsewhere."""

    def __init__(self, first_step: int, total_steps: int) -> None:
        self.first_step = first_step
        self.total_steps = total_steps
        self._start = self._shown = time.monotonic()
        self._rows = 0
        self._bar: Progress | None = None
        console = stderr_console()
        if console.is_terminal and logger.isEnabledFor(logging.INFO):
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("Training", total=total_steps, completed=first_step)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, rows: int) -> None:
        """Tell that ``step`` steps are done."""
        self._rows += rows
        now = time.monotonic()
        rate = self._rows / max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=step, description=f"Training  loss {loss:.4f}  {rate:.1f} examples/s"
            )
        elif now - self._shown >= 10:
            self._shown = now
            left = (now - self._start) / (step - self.first_step) * (self.total_steps - step)
            logger.info(
                "Training: step %d of %d, loss %.4f, %.1f examples/s, %.0f s left",
                step,
                self.total_steps,
                loss,
                rate,
                left,
            )


logger = logging.getLogger("nearfield.training")

_COUNTS = {"step", "epoch", "rows", "tokens", "padded_tokens", "seconds"}
"""Figures of a step that say what it was, not how it went."""
WANDB_FILE = "wandb.json"


class Tracker(Protocol):
    """Something that shows figures by step."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step, by name; ``part/name`` groups them."""
        ...

    def close(self, *, failed: bool) -> None:
        """Flush and end; ``failed`` says that the run did not come to its end."""
        ...


class JsonLines:
    """Appends a JSON line a step; lines after ``last_step`` are dropped first, since a resumed run writes them anew."""

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        lines = [line for line in read_metrics(path) if line["step"] <= last_step]
        if lines or path.is_file():
            with self._writing(), atomic_path(path) as aside:
                aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._file: IO[str] | None = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NearfieldError(
                f"this file could not be written: {error.strerror}",
                where=str(self.path),
                hint="Make room, or give the right to write there; then the same command goes on from the last checkpoint.",
            ) from error

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line; it is there for others at once."""
        with self._writing():
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            # A failure to write was reported when the line was written.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


class AccelerateTracker:
    """A tracker of accelerate's, by its name, on the one process that writes."""

    def __init__(
        self,
        name: str,
        project: str,
        run: Path,
        settings: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """``settings`` are arguments of accelerate's class; ``about`` is stored as the run's configuration."""
        import torch
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # accelerate's own log asks for it. It takes the process group that is open, and may change the number of threads.
        threads = torch.get_num_threads()
        PartialState()
        torch.set_num_threads(threads)
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": str(run)} if kind.requires_logging_directory else {}
        try:
            self._tracker = kind(project, **place, **settings)
            self._tracker.start()
            if about is not None:
                self._tracker.store_init_configuration(dict(_flat(about)))
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BadInputError(f"the tracker {name} cannot be used: {reason[0]}", where="training.trackers") from error

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._tracker.log(dict(figures), step=step)

    def close(self, *, failed: bool) -> None:
        self._tracker.finish()


def _flat(about: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """Nested settings as ``key.path`` and a plain value."""
    for key, value in about.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield (
                f"{before}{key}",
                value if isinstance(value, str | int | float | bool) else json.dumps(value, default=str),
            )


def has_wandb_login() -> bool:
    """Whether W&B would find a key, in the places where it looks, in their order; no key is looked at, nothing is sent."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = configparser.ConfigParser(interpolation=None)
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read([folder / "settings", Path("wandb") / "settings"])
    if settings.get("default", "api_key", fallback=None):
        return True
    url = os.environ.get("WANDB_BASE_URL") or settings.get("default", "base_url", fallback="https://api.wandb.ai")
    host = str(urlsplit(url).netloc)
    named = os.environ.get("NETRC")
    for file in [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with contextlib.suppress(netrc.NetrcParseError, OSError):
            if netrc.netrc(file).authenticators(host):
                return True
    return False


def check_wandb_login() -> None:
    """Ask W&B's server whether it takes the key of this machine; no figure is sent. Raises :class:`BadInputError` if it does not."""
    import wandb

    try:
        wandb.setup(wandb.Settings(silent=True))
        wandb.login(verify=True)
    except wandb.Error as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInputError(
            f"Weights & Biases does not take the login of this machine: {reason}",
            where="training.trackers",
            hint="Run `wandb login --relogin`, mend WANDB_API_KEY, or set mode: offline.",
        ) from error


class WandbTracker:
    """A W&B run. Its id is in the run's folder, so that a resumed training goes on with it.

    Steps are a figure of their own and the axis of all others: W&B's own counter never goes back, and a training that
    was killed resumes before the last step it told of.
    """

    def __init__(self, config: WandbConfig, run: Path, first_step: int, about: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise BadInputError(
                "Weights & Biases is not installed", where="training.trackers", hint="pip install 'nearfield[wandb]'"
            ) from error
        file = run / WANDB_FILE
        known = read_json(file, "record of the W&B run") if file.is_file() and first_step else {}
        place = {"project": config.project, "entity": config.entity}
        same = all(known.get(key) == value for key, value in place.items())
        ident = str(known["id"]) if same and "id" in known else uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or about.get("name"),
                group=config.group,
                tags=list(config.tags),
                mode=config.mode,
                id=ident,
                resume="allow",
                dir=str(run),
                config=dict(about),
                # Figures and the recipe only: no copy of the terminal, of code or of a repository's state is sent.
                settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
            )
        except wandb.Error as error:
            raise BadInputError(
                f"Weights & Biases cannot be used: {str(error).splitlines()[0]}",
                where="training.trackers",
                hint="Run `wandb login`, or set mode: offline.",
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        write_json(file, {"id": ident, **place})

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackers(Part):
    """All of them; on a process that is not to write they do nothing."""

    def __init__(
        self,
        configs: Sequence[TrackerSettings],
        run: Path,
        first_step: int,
        *,
        evaluated: int,
        about: Mapping[str, Any],
        writes: bool,
    ) -> None:
        """``first_step`` steps are done, and the evaluations up to step ``evaluated``: what was told later is dropped."""
        self._writes = writes
        self._others: list[Tracker] = []
        if not writes:
            return
        self._metrics = JsonLines(run / METRICS, first_step)
        self._evaluations = JsonLines(run / EVALUATIONS, evaluated)
        for config in configs:
            self._others.append(config.build(run, first_step, about))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._writes:
            return
        with contextlib.ExitStack() as stack:
            for tracker in list(self._others):
                stack.callback(self._or_drop, tracker, lambda one: one.close(failed=kind is not None))
            stack.callback(self._evaluations.close)
            stack.callback(self._metrics.close)

    def after_step(self, made: StepMade) -> None:
        if made.line is not None:
            self.step(made.line)

    def step(self, line: Mapping[str, Any]) -> None:
        """Tell the figures of a step, ``step`` among them."""
        if self._writes:
            self._metrics.write(line)
            self._tell(line["step"], {f"train/{name}": value for name, value in line.items() if name not in _COUNTS})

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Tell the scores of an evaluation after ``step`` steps."""
        if self._writes:
            self._evaluations.write(line)
            self._tell(line["step"], {f"evaluation/{name}": score for name, score in line["scores"].items()})

    def _tell(self, step: int, figures: Mapping[str, float | None]) -> None:
        known = {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
        for tracker in list(self._others):
            self._or_drop(tracker, lambda one: one.log(step, known))

    def _or_drop(self, tracker: Tracker, use: Callable[[Tracker], None]) -> None:
        """A tracker that fails (a full disk, a server that is gone) is given up and said, and the training goes on."""
        try:
            use(tracker)
        except Exception as error:
            self._others.remove(tracker)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            logger.warning(
                "%s failed and gets no more figures (%s); %s has them all", type(tracker).__name__, reason[0], METRICS
            )
