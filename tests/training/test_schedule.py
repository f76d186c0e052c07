"""Learning-rate schedules."""

from __future__ import annotations

import itertools
import math

import pytest

from nearfield.training import ScheduleConfig
from nearfield.training.optimizers import rate_factor, warmup_steps


def test_warmup_is_a_share_or_a_number() -> None:
    assert warmup_steps(ScheduleConfig(warmup=0.1), 95) == 10
    assert warmup_steps(ScheduleConfig(warmup=7), 95) == 7
    assert warmup_steps(ScheduleConfig(warmup=0), 95) == 0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_shape(kind: str) -> None:
    config = ScheduleConfig(kind=kind, warmup=4, final=0.25)  # type: ignore[arg-type]
    factors = [rate_factor(config, step, 24) for step in range(24)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4] == 1
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))
    middle = {"cosine": 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi / 2)), "linear": 0.25 + 0.75 * 0.5, "constant": 1.0}
    assert factors[14] == pytest.approx(middle[kind])
    last = {
        "cosine": 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * 19 / 20)),
        "linear": 0.25 + 0.75 / 20,
        "constant": 1.0,
    }
    assert factors[23] == pytest.approx(last[kind])


def test_no_warmup_starts_at_the_peak() -> None:
    assert rate_factor(ScheduleConfig(warmup=0), 0, 10) == 1
