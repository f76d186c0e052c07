"""The suites that come with the project: mteb's own names, and filters."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearfield.errors import BadInputError
from nearfield.evaluation import MtebTasks, SuiteConfig
from nearfield.evaluation.config import open_suite

SUITES = Path(__file__).parents[2] / "eval" / "suites"


@pytest.mark.parametrize("file", sorted(SUITES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_suite_is_read_and_its_benchmarks_are_known(file: Path) -> None:
    config = SuiteConfig.load(file)
    assert config.name == file.stem
    official = [entry for entry in config.tasks if isinstance(entry, MtebTasks)]
    if official and file.stem != "mteb-multilingual":
        tasks = open_suite(SuiteConfig(name="official", tasks=official))
        assert len({task.name for task in tasks}) == len(tasks) > 0
        assert file.stem != "mteb-english" or len(tasks) == 41


def test_tasks_are_kept_by_type_domain_and_modality() -> None:
    tasks = open_suite(SuiteConfig.load(SUITES / "legal.yaml"))
    assert len(tasks) > 5
    for task in tasks:
        metadata = task.task.metadata
        assert metadata.type == "Retrieval" and "Legal" in metadata.domains and metadata.modalities == ["text"]
        assert "eng" in {language.split("-")[0] for language in metadata.languages}
    english = MtebTasks(benchmark="MTEB(eng, v2)", types=["STS"])
    assert len(open_suite(SuiteConfig(name="s", tasks=[english]))) == 9


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"names": ["STS12"], "benchmark": "MTEB(eng, v2)"},
        {"names": ["STS12"], "types": ["STS"]},
        {"types": ["STS"], "splits": ["test"]},
    ],
)
def test_entries_that_contradict_themselves(entry: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"give either|do not go|go with"):
        MtebTasks.model_validate({"kind": "mteb", **entry})


def test_filters_that_leave_nothing() -> None:
    with pytest.raises(BadInputError, match="no task of mteb"):
        open_suite(SuiteConfig(name="s", tasks=[MtebTasks(types=["STS"], domains=["Engineering"], languages=["xxx"])]))
