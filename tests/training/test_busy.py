"""The busy share is said, with what keeps it down."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nearfield.conformance.cases import Case
from nearfield.objectives import InfoNCEConfig
from nearfield.training import TrainingConfig
from nearfield.training.chunks import Budget, Cut, Load, TextPool, Work, busy_share, cut_work, say_busy
from nearfield.training.engine import Engine
from nearfield.training.forecast import measure_loads, tell_busy
from nearfield.training.launch import Launch
from nearfield.training.trainer import TrainingInputs


def work_of(lengths: np.ndarray, ranks: int, cut: Cut) -> Work:
    rows = np.arange(len(lengths))
    pool = TextPool(rows, np.zeros_like(rows), rows, rows, rows, rows >= 0)
    return cut_work(pool, lengths, cut, Launch(0, ranks), padded=True, by_prompt=False)


def load_of(lengths: np.ndarray, ranks: int, cut: Cut) -> Load:
    return Load.of(work_of(lengths, ranks, cut), lengths)


def test_even_batches() -> None:
    load = load_of(np.full(64, 30), 8, Cut(16_384, 8))
    assert load == Load(240.0, 240, False, False)
    assert busy_share([load]) == 1.0
    assert say_busy([load], Budget(16_384, 100, 8), 8) == "Ranks are busy 100.0% of the time by their tokens"


def test_one_long_text_is_named() -> None:
    long, even = load_of(np.r_[500, np.full(60, 10)], 4, Cut(16_384, 4)), load_of(np.full(64, 30), 4, Cut(16_384, 4))
    assert long == Load(275.0, 500, True, False)
    said = say_busy([long, even], Budget(16_384, 100, 4), 4)
    assert said.startswith("Ranks are busy 77.0% of the time")
    assert said.endswith("one long text forbids more in 1 of 2 batches looked at")


def test_few_texts_are_named() -> None:
    load = load_of(np.full(3, 10), 4, Cut(16_384, 4))
    assert (load.mean, load.heaviest, load.few_texts) == (7.5, 10, True)
    assert "fewer texts in a batch than ranks" in say_busy([load], Budget(16_384, 100, 4), 4)


def test_a_run_that_goes_on_elsewhere_keeps_its_cut_and_says_what_that_costs() -> None:
    """Two chunks stay two chunks on three ranks, of which one then has nothing to do."""
    lengths, cut = np.full(64, 30), Cut(16_384, 2)
    here, there = work_of(lengths, 2, cut), work_of(lengths, 3, cut)
    assert [chunk.tolist() for chunk in there.chunks] == [chunk.tolist() for chunk in here.chunks]
    load = Load.of(there, lengths)
    said = say_busy([load], Budget(16_384, 100, 2), 3)
    assert said == (
        "Ranks are busy 66.7% of the time by their tokens: batches stay cut for the 2 ranks that the run began with, "
        "and there are 3"
    )


@pytest.fixture()
def engine(tiny_model: Path, inputs: TrainingInputs) -> Engine:
    case = Case.make(InfoNCEConfig(), folder=tiny_model)
    engine = case.engine(Launch(), "single", dropout=True)
    return replace(engine, data=inputs.data)


def test_several_ranks_log_it(engine: Engine, inputs: TrainingInputs, caplog: pytest.LogCaptureFixture) -> None:
    config = TrainingConfig(averaged_batches=2)
    loads = measure_loads(replace(engine, config=config), Budget(512, 512), inputs.plans)
    assert len(loads) == 12, "of each part of averaged batches"
    with caplog.at_level("INFO", logger="nearfield"):
        tell_busy(replace(engine, config=config), Budget(512, 512), inputs.plans)
        assert caplog.records == [], "one process is always busy"
        many = replace(engine, launch=Launch(0, 30))
        tell_busy(replace(many, config=config), Budget(512, 512, 1), inputs.plans)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "busy 3.3% of the time" in record.message
    assert "cut for the 1 ranks that the run began with, and there are 30" in record.message


@pytest.mark.parametrize(("precision", "said"), [("bf16-pure", True), ("bf16-mixed", False), ("fp32", False)])
def test_sums_in_bfloat16_are_said(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, precision: str, said: bool
) -> None:
    case = replace(Case.make(InfoNCEConfig(), folder=tiny_model, dtype=torch.float32), precision=precision)
    with caplog.at_level(logging.INFO, logger="nearfield.training"):
        case.engine(Launch(), "single", dropout=False)
    (line,) = [record.getMessage() for record in caplog.records if "in effect" in record.message]
    assert line.startswith(f"Backend single in effect on 1 process(es), cpu, {precision}")
    assert ("their sums over chunks and ranks in bfloat16" in line) == said
