"""A suite as the scores of a model in training: the same as those of a finished model, as often as wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nearfield.encoders import load_encoder
from nearfield.errors import BadInputError
from nearfield.evaluation import FolderTasks, SuiteConfig, evaluate
from nearfield.evaluation.encoder import TrainedPrompts
from nearfield.evaluation.runner import DuringTraining

PROMPTS = {"query": "q: ", "document": "d: ", "STS": "same: "}
LISTED = {"query": ["q: ", "same: ", ""], "document": ["d: "]}
ALLOWED = TrainedPrompts(LISTED, fallback={"text": ""})


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "prompted", prompts=PROMPTS)


class Encode:
    """Encodes by sentence-transformers, and remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.model = load_encoder(str(folder), device="cpu").model
        self.asked: list[tuple[str, int]] = []

    def __call__(self, texts: Sequence[str], prompt: str) -> np.ndarray:
        assert len(set(texts)) == len(texts), "each text once"
        self.asked.append((prompt, len(texts)))
        return self.model.encode(list(texts), prompt=prompt, show_progress_bar=False).astype(np.float32)


def opened(
    folder: Path, tasks: Path, metric: str = "mean", contract: dict[str, list[str]] | None = None
) -> DuringTraining:
    model = load_encoder(str(folder), device="cpu").model
    for parameter in model.parameters():
        parameter.data.zero_()  # the weights here are not to matter
    return DuringTraining(model, tasks, name="tests/model", metric=metric, contract=contract)


def test_scores_are_those_of_a_finished_model(prompted: Path, every_type: Path, tmp_path: Path) -> None:
    finished = evaluate(str(prompted), every_type, tmp_path / "results")
    assert not finished.failures
    expected = {task: float(np.mean(list(subsets.values()))) for task, subsets in finished.scores.items()}
    during = opened(prompted, every_type)
    encode = Encode(prompted)
    scores = during(encode)
    assert set(scores) == {"mean", *expected}
    assert {task: scores[task] for task in expected} == pytest.approx(expected, abs=1e-5)
    assert scores["mean"] == pytest.approx(np.mean(list(expected.values())), abs=1e-5)
    assert {prompt for prompt, _ in encode.asked} == {"q: ", "d: ", "same: ", ""}
    assert during(encode) == scores, "tasks that draw samples draw the same again"
    assert during(Encode(prompted)) == scores


def test_another_metric(prompted: Path, every_type: Path) -> None:
    suite = SuiteConfig(name="s", tasks=[FolderTasks(path=every_type, only=["TinySTS", "TinyClustering"])])
    encode = Encode(prompted)
    scores = DuringTraining(
        encode.model, suite, name="tests/model", metric="TinyClustering.v_measure_std", contract=None
    )(encode)
    assert list(scores) == ["mean", "TinySTS", "TinyClustering", "TinyClustering.v_measure_std"]
    assert scores["TinyClustering.v_measure_std"] != scores["TinyClustering"]
    assert list(opened(prompted, every_type / "TinySTS", metric="TinySTS")(encode)) == ["mean", "TinySTS"]


def test_metrics_that_no_task_has(prompted: Path, every_type: Path) -> None:
    with pytest.raises(BadInputError, match="no task of the suite") as error:
        opened(prompted, every_type / "TinySTS", metric="TinySts.f1")
    assert error.value.hint == "Use 'mean', or one of TinySTS, or <task>.<metric>."
    during = opened(prompted, every_type / "TinySTS", metric="TinySTS.f1")
    with pytest.raises(BadInputError, match="no metric 'f1'") as error:
        during(Encode(prompted))
    assert "cosine_spearman" in str(error.value.hint)


def test_prompts_that_are_not_trained_with(prompted: Path, every_type: Path) -> None:
    assert opened(prompted, every_type, contract=ALLOWED).tasks
    with pytest.raises(BadInputError, match="would put 'd: ' before each document") as error:
        opened(
            prompted, every_type / "TinyRetrieval", contract=replace(ALLOWED, listed={**LISTED, "document": ["p: "]})
        )
    assert "training.evaluation.prompts=as-is" in str(error.value.hint)


def test_what_fails_is_not_swallowed(prompted: Path, every_type: Path) -> None:
    """Not even what is no Exception, such as a signal's end of the evaluation."""
    during = opened(prompted, every_type / "TinySTS")

    class Interrupted(BaseException):
        pass

    for kind in (Interrupted, ValueError):

        def fail(texts: Sequence[str], prompt: str) -> np.ndarray:
            raise kind("a test")  # noqa: B023

        with pytest.raises(kind, match="a test"):
            during(fail)
    assert during(Encode(prompted))["TinySTS"] != 0
