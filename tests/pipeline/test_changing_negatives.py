"""Negatives that change in a run of the pipeline: what is handed to the loop, what becomes stale, what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from nearfield.data.vectors import VectorJob
from nearfield.errors import BadInputError
from nearfield.files import read_metrics
from nearfield.mining.negatives import Negatives
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.mining import VectorsStage
from nearfield.pipeline.run import Job
from nearfield.pipeline.stages import Stages
from nearfield.recipe import check_recipe, load_recipe
from nearfield.training.launch import Launch
from tests.pipeline.fingerprints import fingerprints

NAIVE = "mining={rules: [{kind: naive}], negatives: 14, depth: 20, explicit: replace}"
DYNAMIC = "mining.during={kind: dynamic, check_every: 2, ratio: 1.0, skip: 10}"
REFRESH = "mining.during={kind: refresh, every_steps: 4}"
SCHEDULED = "mining.during={kind: scheduled, start: 12}"


def run(recipe: Path, *overrides: str, until: str = "train") -> Stages:
    opened = open_run(recipe, [NAIVE, "batches.negatives=2", *overrides], recipe.parent / "runs" / "toy")
    run_stages(opened, until)
    return Stages.of(opened)


@pytest.mark.parametrize("during", [SCHEDULED, DYNAMIC, REFRESH], ids=["scheduled", "dynamic", "refresh"])
def test_a_recipe_trains_with_negatives_that_change(toy_recipe: Path, during: str) -> None:
    stages = run(toy_recipe, during)
    store = stages.data.open()
    inputs = stages.train._negative_inputs(stages.tokens.open())
    assert inputs is not None
    assert (inputs.wanted, inputs.distinct, inputs.avoid_positives) == (2, True, True)
    examples = store.select("pairs", "train")
    mined = Negatives(stages.mine.output)
    for found, expected in zip(inputs.candidates.of(examples), mined.of(examples), strict=True):
        assert found.tolist() == expected.tolist()
    assert (inputs.remine is not None) == (during is REFRESH)
    lines = read_metrics(stages.job.run.folder / "metrics.jsonl")
    assert len(lines) == 12
    assert all("negatives_clashing" in line for line in lines)
    pools = sorted(path.name for path in (stages.job.run.folder / "negatives").glob("generation-*"))
    assert pools == (["generation-00001", "generation-00002"] if during is REFRESH else [])


def test_what_makes_a_training_stale(toy_recipe: Path) -> None:
    def prints(*overrides: str) -> dict[str, str]:
        return fingerprints(toy_recipe, [NAIVE, "batches.negatives=2", *overrides])

    plain, dynamic = prints(), prints(DYNAMIC)
    assert {stage for stage in plain if plain[stage] != dynamic[stage]} == {
        "train",
        "compare",
        "report",
        "evaluate",
    } & set(plain)
    assert prints(DYNAMIC, "mining.during.skip=9")["train"] != dynamic["train"]
    wide = "mining.corpus=sources"
    assert prints(REFRESH, wide)["tokens"] != prints(wide)["tokens"], (
        "all documents may become negatives of all sources"
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mining.negatives=11", DYNAMIC], "need at least 12 mined candidates"),
        (["mining.negatives=2", SCHEDULED], "need at least 3 mined candidates"),
        ([REFRESH, "batches.negatives=0"], "batches.negatives is 0"),
        (["mining.negatives=1", REFRESH], "need at least 2 mined candidates"),
    ],
)
def test_lists_that_are_too_short_are_refused(toy_recipe: Path, overrides: list[str], words: str) -> None:
    loaded = load_recipe(toy_recipe, [NAIVE, "batches.negatives=2", *overrides])
    with pytest.raises(BadInputError) as error:
        check_recipe(loaded)
    assert words in error.value.what
    assert "during" in str(error.value.where)


class Ranks:
    """Stands for a launch of three ranks on one machine: the others' parts are done when rank 0 divides a task."""

    def __init__(self, recipe: Path, overrides: list[str], shares: bool) -> None:
        self.stages: list[Stages] = []
        self.shares = shares
        self.tasks: list[str] = []
        for rank in range(3):
            launch = Launch(rank, 3, rank)
            object.__setattr__(launch, "divide", self.divide)
            opened = open_run(recipe, overrides, recipe.parent / "runs" / "toy")
            self.stages.append(Stages(Job(opened, launch)))

    def divide(self, task: str, own) -> None:  # type: ignore[no-untyped-def]
        self.tasks.append(task)
        own()
        if self.shares:
            name, number = task.split()
            for stages in self.stages[1:]:
                getattr(stages, name).help(int(number))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npy")}


@pytest.mark.parametrize("shares", [True, False], ids=["shared file system", "each its own"])
def test_all_ranks_encode_and_search(toy_recipe: Path, shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    work, encode = VectorsStage._work, VectorJob._encode
    monkeypatch.setattr(VectorsStage, "_work", lambda *given: dataclasses.replace(work(*given), shard=16))
    overrides = [NAIVE]
    whole = run(toy_recipe, until="mine")
    alone = Negatives(whole.mine.output).table
    vectors = contents(whole.vectors.output)
    shutil.rmtree(whole.mine.output)
    shutil.rmtree(whole.vectors.output)

    ranks = Ranks(toy_recipe, overrides, shares)
    main = ranks.stages[0]
    made: list[int] = []

    def counted(job: VectorJob, share: tuple[int, int]) -> None:
        folder = job._store().folder
        before = len(list(folder.iterdir()))
        encode(job, share)
        made.append(len(list(folder.iterdir())) - before)

    monkeypatch.setattr(VectorJob, "_encode", counted)
    main.vectors.run()
    assert contents(main.vectors.output) == vectors
    total = sum(made)
    assert total > 6
    if shares:
        assert len(made) == 4 and made[3] == 0, "nothing was left for rank 0 to do again"
        assert max(made[:3]) - min(made[:3]) <= 1
    else:
        assert len(made) == 2 and made[0] < total
    main.mine.run()
    assert Negatives(main.mine.output).table.equals(alone)
    assert ranks.tasks == ["vectors 0", "mine 0"]
    assert not main.mine._shares.exists()
    assert np.array_equal(alone["example"].to_numpy(), np.sort(alone["example"].to_numpy()))
