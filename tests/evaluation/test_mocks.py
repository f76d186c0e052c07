"""Every mock task of mteb, of texts and of pictures, scores as mteb itself scores it, and its scores can be compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from mteb.mocks import MOCK_MIEB_TASK_GRID, MOCK_TASK_TEST_GRID
from mteb.models import SentenceTransformerEncoderWrapper

from nearfield.encoders import LoadedEncoder, load_encoder
from nearfield.evaluation import FolderTasks, SuiteConfig, compare, label_results, runner
from nearfield.evaluation.scoring import mean_over_splits, scores_by_split
from nearfield.evaluation.tasks import SuiteTask

ANY = SuiteConfig(name="mocks", tasks=[FolderTasks(path=Path())])
TEXTS = {type(task).__name__: type(task) for task in MOCK_TASK_TEST_GRID}
PICTURES = {type(task).__name__: type(task) for task in MOCK_MIEB_TASK_GRID}


class Reference(SentenceTransformerEncoderWrapper):  # type: ignore[misc]
    """mteb's wrapper with what sentence-transformers' image towers want: RGB, and each kind of item by its own tower."""

    def __init__(self, loaded: LoadedEncoder) -> None:
        super().__init__(loaded.model)
        self.mteb_model_meta = self.mteb_model_meta.model_copy(update={"modalities": ["text", "image"]})

    def encode(self, inputs: Any, **named: Any) -> Any:
        if "image" not in inputs.dataset.features:
            return super().encode(inputs, **named)
        parts = []
        for batch in inputs:
            vectors = self.model.encode([picture.convert("RGB") for picture in batch["image"]])
            if "text" in batch:
                vectors = vectors + self.model.encode(list(batch["text"]))
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            parts.append(vectors)
        return np.concatenate(parts)


@pytest.fixture(scope="module")
def texts(model_folder: Path) -> LoadedEncoder:
    return load_encoder(str(model_folder), device="cpu")


def score_all(made: dict[str, Any], model: LoadedEncoder, out: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "open_suite", lambda *_, **__: [SuiteTask(task()) for task in made.values()])
        result = runner.evaluate(model, ANY, out)
    return result, compare(label_results([result.results_dir] * 2, ["a", "b"]), samples=100, permutations=100)


@pytest.fixture(scope="module")
def of_texts(texts: LoadedEncoder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return score_all(TEXTS, texts, tmp_path_factory.mktemp("texts") / "results")


@pytest.fixture(scope="module")
def of_pictures(picture_model: LoadedEncoder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return score_all(PICTURES, picture_model, tmp_path_factory.mktemp("pictures") / "results")


def main_scores(result: Any) -> dict[str, float]:
    return mean_over_splits(scores_by_split(result))


def check(found: Any, made: Any, reference: Any) -> None:
    result, table = found
    task = made()
    name = task.metadata.name
    assert name not in result.failures and name not in result.not_applicable
    theirs = mteb.evaluate(reference, task, cache=None, show_progress_bar=False, co2_tracker=False)
    wanted, got = main_scores(theirs.task_results[0]), result.scores[name]
    assert got.keys() == wanted.keys()
    for subset, score in wanted.items():
        assert got[subset] == pytest.approx(score, abs=1e-6, nan_ok=True)
    # The kept units give the score again, or say why they are none.
    rows = [row for row in table.scores if row.task == name]
    assert {row.subset for row in rows} == set(wanted)
    assert all(row.reason or math.isfinite(row.score) for row in rows)
    verdicts = {row.verdict for row in table.differences if row.task == name}
    assert verdicts <= {"not separable", "not tested"} and verdicts


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_a_mock_task_of_texts_scores_as_mteb_scores_it(name: str, texts: LoadedEncoder, of_texts: Any) -> None:
    check(of_texts, TEXTS[name], texts.model)


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_a_mock_task_of_pictures_scores_as_mteb_scores_it(
    name: str, picture_model: LoadedEncoder, of_pictures: Any
) -> None:
    check(of_pictures, PICTURES[name], Reference(picture_model))
