"""The equalities of every backend, one launch each: several ranks = one, chunked = whole, resumed = uninterrupted ..."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nearfield.cli.project import equalities
from nearfield.conformance.equalities import CheckLine
from nearfield.conformance.runner import LAUNCHES, Outcome, run_launch, select
from nearfield.conformance.tiny_models import save_tiny_bert
from nearfield.errors import BadInputError

pytestmark = pytest.mark.conformance

CHECKS = 57
"""Lines of a launch; of several ranks three more: a resume on another number of them, the ring, and the bytes on the wire."""
NOT_SHARDED = 2
"""Lines fewer where parameters are taken apart (losses on tokens)."""
SHARDED = 1
"""Lines more there: that chunks are added in float32 though weights are in bfloat16."""
REFUSED = 1
"""Lines fewer on FSDP2: an adapter in float32 over weights in bfloat16."""
BY_FILES = 5
"""Lines more on ZeRO: DeepSpeed's files, with and without a type of sums."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("conformance") / "model")


@pytest.fixture(scope="module", params=LAUNCHES, ids=lambda launch: f"{launch[0]}-{launch[1]}")
def outcome(request: pytest.FixtureRequest, model: Path) -> Iterator[Outcome]:
    backend, ranks = request.param
    found = run_launch(backend, ranks, model)
    print("\n" + "\n".join(equalities([found])))
    yield found


def test_all_equalities_hold(outcome: Outcome) -> None:
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.error is None
    assert [line.check for line in outcome.lines if not line.passed] == []
    gathered = outcome.backend not in ("single", "ddp")
    expected = CHECKS + (SHARDED - NOT_SHARDED) * gathered + 3 * (outcome.ranks > 1)
    expected += BY_FILES * outcome.backend.startswith("zero") - REFUSED * (outcome.backend == "fsdp2")
    assert len(outcome.lines) == expected


def test_a_broken_equality_is_told() -> None:
    fine = CheckLine("ddp", 2, "x = y", 1e-12, 1e-10)
    off = CheckLine("ddp", 2, "y = z", 0.5, 1e-10)
    unnoticed = CheckLine("ddp", 2, "a fault is noticed", 1e-5, 1e-3, at_least=True)
    undefined = CheckLine("ddp", 2, "z = x", float("nan"), 1e-10)
    assert [line.passed for line in (fine, off, unnoticed, undefined)] == [True, False, False, False]
    texts = equalities(
        [Outcome("ddp", 2, [fine, off, unnoticed, undefined]), Outcome("zero1", 2, skipped="no DeepSpeed")]
    )
    assert sum("FAIL" in text for text in texts) == 3
    assert texts[-1] == "1 of 4 equalities hold; 0 launches ended early, 1 were left out"
    assert not Outcome("ddp", 2).passed, "a launch without a line shows nothing"


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(BadInputError, match="no backend 'horovod'"):
        select(["horovod"])
    assert select(["ddp"]) == [("ddp", 2), ("ddp", 3)]
