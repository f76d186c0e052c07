"""Fixtures that several parts share, and a closing line that counts skips with their reasons."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this when it is imported, which torch may do in any test: its kernels are tested in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

from nearfield.conformance.tiny_models import WORDS, save_tiny_bert

# A test never compares times: a busy machine must not fail one.
settings.register_profile("nearfield", deadline=None)
settings.load_profile("nearfield")


# No machine loses its power in the middle of a test: what is written need not have reached the disk.
os.fsync = lambda _: None

DEAR = (
    "training/test_launching.py",
    "scripts/test_gpu_check.py",
    "training/test_ending_ranks.py",
    "evaluation/test_published_scores.py",
    "pipeline/test_quickstart_image.py",
    "training/test_train.py",
    "evaluation/test_mocks.py",
    "pipeline/test_trainings_in_a_row.py",
)
"""Files of minutes. They are begun first, so that processes side by side end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files; the order within each stays."""
    places = {f"tests/{file}": place for place, file in enumerate(DEAR)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(DEAR)))


@pytest.fixture(autouse=True)
def _restore_process() -> Iterator[None]:
    """The command line sends nearfield's records to standard error and handles SIGTERM; the next test finds neither."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    logger = logging.getLogger("nearfield")
    logger.handlers.clear()
    logger.propagate = True


PROFILES: dict[str, Any] = {}
"""The memory and time that the trainings of a process measured before their first step, by what they train."""


@pytest.fixture(autouse=True)
def _measured_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the time of a tiny training is the forecast: it is made anew where it is tested, with the trainer."""
    forecast = sys.modules.get("nearfield.training.forecast")
    if forecast is None or request.node.nodeid.startswith("tests/training/"):
        return
    measure = forecast.measure_profile

    def once(engine: Any, plans: Any, **named: Any) -> Any:
        sizes = [(tuple(p.shape), p.requires_grad) for p in engine.backend.module.parameters()]
        settings = engine.config.model_dump_json(include={"micro_batch_tokens", "graph_tokens", "gradient_cache"})
        about = type(engine.objective), type(engine.backend), sys.modules[measure.__module__].available_memory
        key = repr((sizes, settings, about, [len(plan) for plan in plans], named))
        if key not in PROFILES:
            PROFILES[key] = measure(engine, plans, **named)
        return PROFILES[key]

    monkeypatch.setattr(forecast, "measure_profile", once)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random BERT that has dropout."""
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data recipe with 200 query-document pairs of words, each with a negative, in four groups of splits."""
    folder = tmp_path_factory.mktemp("data")
    rows = random.Random(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(200):
            words = rows.sample(WORDS, 12)
            row = {
                "query": " ".join(words[: rows.randint(1, 4)]) + f" word{number}",
                "positive": " ".join(words[:8]) + f" word{number}",
                "negative": " ".join(rows.sample(WORDS, 6)),
                "group": f"g{number // 2}",
            }
            file.write(json.dumps(row) + "\n")
    recipe = folder / "toy.yaml"
    recipe.write_text(
        """\
name: toy
sources:
  - name: pairs
    task_type: Retrieval
    reader: {kind: jsonl, path: pairs.jsonl}
    examples: {kind: retrieval, query: query, positives: positive, negatives: negative}
    group: group
    split: {kind: hash, fractions: {train: 0.7, test: 0.3}, seed: 0}
"""
    )
    return recipe


@pytest.fixture()
def toy_recipe(tmp_path: Path, tiny_model: Path, toy_data: Path) -> Path:
    """A recipe that trains the tiny model on the toy data for a few steps, without evaluation."""
    return write_toy_recipe(tmp_path, tiny_model, toy_data)


def write_toy_recipe(folder: Path, model: Path, data: Path) -> Path:
    """The recipe of :func:`toy_recipe`, in a folder of any scope."""
    recipe = folder / "toy.yaml"
    recipe.write_text(
        f"""\
name: toy
data: {data}
encoder: {{model: {model}}}
objective: {{kind: infonce, temperature: 0.1}}
batches: {{kind: single_source, batch_size: 16}}
training:
  epochs: 2
  max_steps: 12
  learning_rate: 1.0e-3
  checkpoints: {{every_steps: 4}}
  trackers: []
"""
    )
    return recipe


_OUTCOMES = pytest.StashKey[tuple[int, "Counter[str]"]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Count the skips and their reasons."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        longrepr = report.longrepr
        reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    config.stash[_OUTCOMES] = (len(terminalreporter.stats.get("passed", [])), reasons)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say them in the very last lines, below the coverage."""
    passed, reasons = config.stash.get(_OUTCOMES, (0, Counter()))
    if passed or reasons:
        print(f"{passed} tests passed, {sum(reasons.values())} skipped")
        for reason, count in reasons.most_common():
            print(f"  {count} skipped: {reason}")
