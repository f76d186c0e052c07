"""Starts the ranks of each backend, one launch for all its equalities, and collects the table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.conformance.equalities import CheckLine

LAUNCHES: tuple[tuple[str, int], ...] = (
    ("single", 1),
    ("ddp", 2),
    ("ddp", 3),
    ("fsdp2", 2),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
)
"""(backend, ranks) that are run on CPUs, with gloo where there are several."""
_TIMEOUT_SECONDS = 1800


@dataclass
class Outcome:
    """The outcome of a launch."""

    backend: str
    ranks: int
    lines: list[CheckLine] = field(default_factory=list)
    error: str | None = None
    """Why the launch ended before all was checked."""
    skipped: str | None = None
    """Why it was not made."""

    @property
    def passed(self) -> bool:
        """Whether all was checked and holds."""
        return self.skipped is None and self.error is None and bool(self.lines) and all(x.passed for x in self.lines)


def select(backends: Sequence[str]) -> list[tuple[str, int]]:
    """The launches of the named backends; all where none is named."""
    known = list(dict.fromkeys(name for name, _ in LAUNCHES))
    for name in backends:
        if name not in known:
            raise BadInputError(f"there is no backend {name!r}", hint=f"Backends: {', '.join(known)}.")
    return [launch for launch in LAUNCHES if not backends or launch[0] in backends]


def run_launch(backend: str, ranks: int, model: Path) -> Outcome:
    """Run all equalities of a backend in one launch of its ranks on this machine's CPUs."""
    from nearfield.conformance.equalities import CheckLine

    outcome = Outcome(backend, ranks)
    if backend.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        outcome.skipped = "DeepSpeed is not installed (pip install 'nearfield[deepspeed]')"
        return outcome
    with tempfile.TemporaryDirectory(prefix="nearfield-conformance-") as folder:
        out = Path(folder) / "lines.jsonl"
        worker = ["-m", "nearfield.conformance", backend, "--model", str(model), "--out", str(out)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        try:
            done = subprocess.run(
                [sys.executable, *launcher, *worker],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            outcome.error = f"not finished after {_TIMEOUT_SECONDS} s"
        else:
            if done.returncode != 0:
                outcome.error = f"exit code {done.returncode}\n" + done.stderr[-4000:]
        if out.is_file():
            outcome.lines = [CheckLine(**json.loads(text)) for text in out.read_text(encoding="utf-8").splitlines()]
    return outcome


def run_all(
    backends: Sequence[str] = (), on_launch: Callable[[str, int], None] = lambda backend, ranks: None
) -> list[Outcome]:
    """Run the equalities of the named backends (all where none is named), one launch after the other."""
    from nearfield.conformance.tiny_models import save_tiny_bert

    outcomes = []
    with tempfile.TemporaryDirectory(prefix="nearfield-conformance-") as folder:
        model = save_tiny_bert(Path(folder) / "model")
        for backend, ranks in select(backends):
            on_launch(backend, ranks)
            outcomes.append(run_launch(backend, ranks, model))
    return outcomes
