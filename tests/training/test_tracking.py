"""metrics.jsonl, evaluations.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nearfield.errors import BadInputError, NearfieldError
from nearfield.files import read_metrics
from nearfield.training.config import AccelerateConfig, TensorBoardConfig, TrackerSettings, WandbConfig
from nearfield.training.tracking import JsonLines, Trackers

FIGURES = ("loss", "learning_rate", "gradient_norm", "positive_similarity", "hardest_negative_similarity")


def line(step: int) -> dict[str, Any]:
    return {"step": step, **{name: step + number / 10 for number, name in enumerate(FIGURES)}, "rows": 4}


def scored(step: int, score: float | None = 0.5) -> dict[str, Any]:
    return {"step": step, "scores": {"mean": score, "Task": 0.25}, "seconds": 1.0}


def open_trackers(
    run: Path, *configs: TrackerSettings, first: int = 0, evaluated: int = -1, writes: bool = True, **about: Any
) -> Trackers:
    return Trackers(configs, run, first, evaluated=evaluated, about=about, writes=writes)


def test_lines_are_there_as_soon_as_written(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "new"
    with open_trackers(run) as trackers:
        for step in (1, 2):
            trackers.step(line(step))
            assert read_metrics(run / "metrics.jsonl") == [line(s) for s in range(1, step + 1)]
        assert [path.name for path in run.iterdir()] == ["metrics.jsonl"], "no evaluations, no file of them"
        trackers.evaluation(scored(2))
        assert read_metrics(run / "evaluations.jsonl") == [scored(2)]
    text = (run / "metrics.jsonl").read_text()
    assert text == json.dumps(line(1)) + "\n" + json.dumps(line(2)) + "\n"


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    """The evaluation of the checkpoint's own step may not have come to its end; then it is told again."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line(s)) + "\n" for s in range(1, 6)) + '{"step": 6, "lo'
    )
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(scored(s)) + "\n" for s in (0, 3, 5)))
    with open_trackers(tmp_path, first=3, evaluated=0) as trackers:
        assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
        assert [entry["step"] for entry in read_metrics(tmp_path / "evaluations.jsonl")] == [0]
        trackers.step(line(4))
    assert read_metrics(tmp_path / "metrics.jsonl") == [line(s) for s in range(1, 5)]


def test_a_closed_file_is_opened_again_by_the_next_line(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "a.jsonl", 0)
    lines.close()
    lines.write(line(1))
    lines.close()
    assert read_metrics(tmp_path / "a.jsonl") == [line(1)]


def test_only_one_process_writes(tmp_path: Path) -> None:
    with open_trackers(tmp_path / "run", TensorBoardConfig(), writes=False) as trackers:
        trackers.step(line(1))
        trackers.evaluation(scored(1))
    assert not (tmp_path / "run").exists()


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_figures_and_forgets_what_a_resumed_run_replays(tmp_path: Path) -> None:
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with open_trackers(tmp_path, TensorBoardConfig(), first=first, evaluated=first) as trackers:
            for step in steps:
                trackers.step(line(step))
                trackers.evaluation(scored(step, None if step == 4 else step / 8))
    shown = scalars(tmp_path)
    assert set(shown) == {f"train/{name}" for name in FIGURES} | {"evaluation/mean", "evaluation/Task"}
    for number, name in enumerate(FIGURES):
        assert shown[f"train/{name}"] == [(step, pytest.approx(step + number / 10)) for step in (1, 2, 3, 4)]
    assert shown["evaluation/mean"] == [(1, 0.125), (2, 0.25), (3, 0.375)], "a score that is no number is not drawn"
    assert shown["evaluation/Task"] == [(step, 0.25) for step in (1, 2, 3, 4)]


def test_other_trackers_are_those_of_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    told: list[Any] = []

    class Recorder(tracking.GeneralTracker):  # type: ignore[misc]
        name = "mlflow"
        requires_logging_directory = True

        def __init__(self, project: str, logging_dir: str, **settings: Any) -> None:
            super().__init__()
            told.append((project, logging_dir, settings))

        tracker = None

        def start(self) -> None:
            if told[0][2] == {"wrong": True}:
                raise OSError("the server is gone")

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.append(values)

        def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
            told.append((step, values["train/loss"]))

        def finish(self) -> None:
            told.append("finished")

    with pytest.raises(BadInputError, match="the tracker mlflow is not installed"):
        AccelerateConfig(name="mlflow").check()
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", Recorder)
    config = AccelerateConfig(name="mlflow", settings={"run_id": "7"})
    with open_trackers(tmp_path, config, name="toy", training={"learning_rate": 0.5, "freeze": ["a"]}) as trackers:
        trackers.step(line(1))
    assert told[0] == ("toy", str(tmp_path), {"run_id": "7"})
    assert told[1]["training.learning_rate"] == 0.5 and told[1]["training.freeze"] == '["a"]'
    assert told[2:] == [(1, line(1)["loss"]), "finished"]
    told.clear()
    with pytest.raises(BadInputError, match="the tracker mlflow cannot be used: the server is gone"):
        open_trackers(tmp_path, AccelerateConfig(name="mlflow", settings={"wrong": True}))


def test_wandb_offline_keeps_its_run(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    config = WandbConfig(project="tests", mode="offline", tags=("small",))
    with open_trackers(tmp_path, config, name="toy", seed=3) as trackers:
        trackers.step(line(1))
        trackers.step({**line(2), "gradient_norm": math.nan})
        trackers.evaluation(scored(2))
        assert wandb.run is not None
        assert (wandb.run.name, wandb.run.project, wandb.run.tags) == ("toy", "tests", ("small",))
        assert wandb.run.config["seed"] == 3
        summary = dict(wandb.run.summary)
    assert summary["step"] == 2
    assert summary["train/loss"] == 2.0
    assert summary["train/gradient_norm"] == pytest.approx(1.2), "what is no number is not told"
    assert summary["evaluation/mean"] == 0.5
    kept = json.loads((tmp_path / "wandb.json").read_text())
    assert kept["project"] == "tests"
    with open_trackers(tmp_path, config, first=2, evaluated=2) as trackers:
        trackers.step(line(3))
        assert wandb.run is not None
        assert wandb.run.id == kept["id"], "a resumed training goes on with its W&B run"
    with open_trackers(tmp_path, config):
        assert wandb.run is not None
        assert wandb.run.id != kept["id"], "one that starts anew does not"
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] != kept["id"]
    runs = sorted(path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 3
    assert runs.count(kept["id"]) == 2
    assert wandb.run is None


def test_another_project_is_another_wandb_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    ids = []
    for project in ("one", "two"):
        with open_trackers(tmp_path, WandbConfig(project=project, mode="disabled"), first=5):
            ids.append(json.loads((tmp_path / "wandb.json").read_text())["id"])
    assert ids[0] != ids[1]


def test_without_wandb_there_is_one_line_of_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInputError, match="not installed") as error:
        open_trackers(tmp_path, WandbConfig(project="tests"))
    assert error.value.hint == "pip install 'nearfield[wandb]'"


def test_wandb_without_a_login_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login is looked for where W&B looks: environment, its settings, netrc by the host that is meant."""
    pytest.importorskip("wandb")
    monkeypatch.setattr("nearfield.training.tracking.check_wandb_login", lambda: None)
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = WandbConfig(project="tests")
    entry, settings = "machine {} login user password 0123\n", tmp_path / ".config" / "wandb" / "settings"

    def refused() -> bool:
        try:
            config.check()
        except BadInputError as error:
            assert "no login" in str(error) and "wandb login" in str(error.hint)
            return True
        return False

    assert refused()
    for mode in ("offline", "disabled"):
        WandbConfig(project="tests", mode=mode).check()
    (tmp_path / ".netrc").write_text(entry.format("example.org"))
    assert refused()
    monkeypatch.setenv("WANDB_BASE_URL", "https://example.org")
    assert not refused()
    monkeypatch.delenv("WANDB_BASE_URL")
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://example.org\n")
    assert not refused()
    settings.unlink()
    (tmp_path / "elsewhere").write_text(entry.format("api.wandb.ai"))
    monkeypatch.setenv("NETRC", "~/elsewhere")
    assert not refused()
    monkeypatch.setenv("NETRC", str(tmp_path / "nowhere"))
    assert refused()
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert not refused()


class _Refusing(BaseHTTPRequestHandler):
    """W&B's server, which takes no key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.end_headers()

    def log_message(self, *parts: Any) -> None:
        """Nothing: the server is one of a test."""


@pytest.mark.parametrize(
    ("key", "reason"),
    [("a" * 40, "127.0.0.1"), ("abc", "API key")],
    ids=["a key that the server does not take", "a key of another shape"],
)
def test_a_wrong_wandb_key_is_refused_before_any_work(tmp_path: Path, toy_recipe: Path, key: str, reason: str) -> None:
    """By the training before its first stage, and by the dry run; in a process of its own, as W&B keeps a key that it has read."""
    pytest.importorskip("wandb")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "HOME": str(tmp_path)}
        code = (
            "import sys; from nearfield.cli import main; main(sys.argv[1:])",
            "import sys, nearfield; found = nearfield.dry_run(sys.argv[2], sys.argv[3:4], sys.argv[5])\n"
            "print([notice.what for notice in found.notices if notice.blocks], found.would_start)",
        )
        trackers = "training.trackers=[{kind: wandb, project: p}]"
        done = [
            subprocess.run(
                [sys.executable, "-c", each, "train", str(toy_recipe), trackers, "--run-folder", str(tmp_path / name)],
                env={**os.environ, **place, "WANDB_API_KEY": key},
                capture_output=True,
                text=True,
            )
            for name, each in zip(("run", "dry"), code, strict=True)
        ]
        server.shutdown()
    wanted = "Weights & Biases does not take the login of this machine"
    assert done[0].returncode == 2 and wanted in done[0].stderr and reason in done[0].stderr
    assert wanted in done[1].stdout and done[1].stdout.strip().endswith("False"), done[1].stderr
    assert key not in done[0].stderr + done[1].stdout
    assert not (tmp_path / "run" / "manifest.json").exists()


class BrokenTracker:
    """Takes one step, then fails."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def log(self, step: int, figures: Any) -> None:
        if self.seen:
            raise OSError(28, "No space left on device")
        self.seen.append(step)

    def close(self, *, failed: bool) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("steps", [1, 3])
def test_a_tracker_that_fails_is_given_up_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    trackers, broken = open_trackers(tmp_path), BrokenTracker()
    trackers._others.append(broken)
    with trackers:
        for step in range(1, steps + 1):
            trackers.step(line(step))
    assert broken.seen == [1]
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, steps + 1))
    said = [message for message in caplog.messages if "BrokenTracker failed and gets no more figures" in message]
    assert len(said) == 1 and "No space left" in said[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a thing of Linux")
def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(NearfieldError, match="could not be written: No space left on device") as error,
        open_trackers(tmp_path) as trackers,
    ):
        trackers.step(line(1))
    assert error.value.hint is not None and "goes on from the last checkpoint" in error.value.hint
