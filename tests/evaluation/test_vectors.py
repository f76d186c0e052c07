"""Kept vectors: by content, never by name; resumed inside a task; cut and rounded without encoding again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfield import checksums
from nearfield.encoders import load_encoder
from nearfield.encoders.identity import model_fingerprint
from nearfield.errors import BadInputError
from nearfield.evaluation import evaluate
from nearfield.evaluation.encoder import TaskEncoder
from nearfield.evaluation.results import failed_tasks, read_manifest
from nearfield.evaluation.vectors import VectorCache, compress

pytestmark = pytest.mark.filterwarnings("ignore")


def rows(count: int, seed: int = 0) -> list[tuple[str, np.ndarray]]:
    vectors = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
    return [(f"text {i}", vector) for i, vector in enumerate(vectors)]


def test_vectors_come_back_bit_for_bit_and_only_for_the_same_model_role_and_prompt(tmp_path: Path) -> None:
    made = rows(50)
    cache = VectorCache(tmp_path, "m1", {"name": "m"})
    assert dict(cache.part("query", "q: ").put(made)).keys() == dict(made).keys()
    cache.close()
    again = VectorCache(tmp_path, "m1", {})
    found = again.part("query", "q: ").get([text for text, _ in made] + ["unknown"])
    assert len(found) == 50 and all(np.array_equal(found[text], vector) for text, vector in made)
    for other in (
        again.part("query", ""),
        again.part(None, "q: "),
        VectorCache(tmp_path, "m2", {}).part("query", "q: "),
    ):
        assert other.get(["text 0"]) == {}


def test_what_was_encoded_before_an_error_is_kept(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from rows(20)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        dict(VectorCache(tmp_path, "m", {}).part(None, "").put(broken()))
    assert len(VectorCache(tmp_path, "m", {}).part(None, "").get([f"text {i}" for i in range(20)])) == 20


@pytest.mark.parametrize("seconds_a_text", [0.01, 2.0, 9.0])
def test_a_kill_loses_seconds_of_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds_a_text: float
) -> None:
    """At every moment, all but the last 30 seconds' work is on the disk: nothing need run when the process dies."""
    now = 0.0
    monkeypatch.setattr("nearfield.evaluation.vectors.time.monotonic", lambda: now)
    done: list[tuple[float, str]] = []

    def encode() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal now
        for text, vector in rows(40 if seconds_a_text > 1 else 6_000):
            now += seconds_a_text
            done.append((now, text))
            yield text, vector

    for count, _ in enumerate(VectorCache(tmp_path, "m", {}).part(None, "").put(encode())):
        if count % 500 == 0 or seconds_a_text > 1:
            kept = VectorCache(tmp_path, "m", {}).part(None, "").get([text for _, text in done])
            lost = [when for when, text in done if text not in kept]
            assert not lost or now - min(lost) + seconds_a_text <= 30


@pytest.mark.parametrize("name", ["keys.npy", "vectors.npy", "checksums.json"])
def test_a_damaged_shard_is_left_out_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    made = rows(5)
    for place in (0, 70, 130, -1):
        checksums._checked.clear()
        dict(VectorCache(tmp_path, "m", {}).part(None, "").put(made))
        (file,) = tmp_path.rglob(name)
        content = bytearray(file.read_bytes())
        content[place] ^= 16
        file.write_bytes(bytes(content))
        caplog.clear()
        assert VectorCache(tmp_path, "m", {}).part(None, "").get([text for text, _ in made]) == {}
        assert "encoded again" in caplog.text and not list(tmp_path.rglob(name))
    part = VectorCache(tmp_path, "m", {}).part(None, "")
    dict(part.put(made))
    found = VectorCache(tmp_path, "m", {}).part(None, "").get([text for text, _ in made])
    assert all(np.array_equal(found[text], vector) for text, vector in made)


def test_a_model_is_known_by_what_it_computes(make_model: Callable[..., Path], tmp_path: Path) -> None:
    first = load_encoder(str(make_model(tmp_path / "a")), device="cpu").model
    copy = load_encoder(str(make_model(tmp_path / "b")), device="cpu").model
    other = load_encoder(str(make_model(tmp_path / "c", seed=1)), device="cpu").model
    name = model_fingerprint(first)
    first.encode(["harbour", "lantern meadow"])
    assert model_fingerprint(first) == model_fingerprint(copy) == name != model_fingerprint(other)
    copy.max_seq_length = 16
    assert model_fingerprint(copy) != name
    assert model_fingerprint(first.bfloat16()) != name


def test_cutting_and_rounding() -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.array_equal(compress(vectors, None, "none"), vectors) and np.array_equal(
        compress(vectors, 16, "none"), vectors
    )
    cut = compress(vectors, 4, "none")
    np.testing.assert_allclose(cut, vectors[:, :4] / np.linalg.norm(vectors[:, :4], axis=1, keepdims=True), rtol=1e-6)
    binary = compress(vectors, None, "binary")
    assert np.array_equal(np.sign(binary), np.where(vectors > 0, 1, -1))
    np.testing.assert_allclose(np.linalg.norm(binary, axis=1), 1, rtol=1e-6)
    rounded = compress(vectors, None, "int8")
    for row, vector in zip(rounded, vectors, strict=True):
        steps = row / (np.abs(vector).max() / 127)
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
        assert np.abs(row - vector).max() <= np.abs(vector).max() / 254 + 1e-7


def test_a_second_model_name_costs_nothing_and_scores_the_same(
    every_type: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"device": "cpu", "tasks": ["TinyRetrieval", "TinySTS"], "cache": tmp_path / "vectors"}
    plain = evaluate(str(model_folder), every_type, tmp_path / "plain", device="cpu", tasks=arguments["tasks"])
    first = evaluate(str(model_folder), every_type, tmp_path / "one", **arguments)
    assert first.scores == plain.scores

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("encoded again")

    monkeypatch.setattr(TaskEncoder, "_embed", never)
    again = evaluate(str(model_folder), every_type, tmp_path / "two", name="other/name", **arguments)
    assert again.scores == first.scores
    (line,) = read_manifest(again.results_dir)
    facts = line["tasks"]["TinyRetrieval"]
    assert facts["texts_encoded"] == 0 and facts["texts_from_cache"] == 60
    assert line["versions"]["mteb"] and line["dtype"] == "float32" and facts["data_revision"].startswith("local-")
    cut = evaluate(str(model_folder), every_type, tmp_path / "two", dimensions=8, **arguments)
    assert cut.model == "local/tiny-dim8" and cut.scores != first.scores
    rounded = evaluate(str(model_folder), every_type, tmp_path / "two", quantize="int8", **arguments)
    assert rounded.model == "local/tiny-int8"
    assert rounded.scores["TinySTS"]["default"] == pytest.approx(first.scores["TinySTS"]["default"], abs=0.02)
    for bad in ({"dimensions": 33}, {"dimensions": 0}, {"quantize": "int3"}):
        with pytest.raises(BadInputError):
            evaluate(str(model_folder), every_type, tmp_path / "two", **{**arguments, **bad})


def test_failures_are_recorded_until_the_task_is_scored(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    folder = tasks.sts()
    good = (folder / "default.test.parquet").read_bytes()
    tasks.table(folder / "default.test.parquet", sentence1=["a"], sentence2=["b"], score=["high"])
    tasks.pairs()
    result = evaluate(str(model_folder), tasks.root, tmp_path / "out", device="cpu")
    assert set(failed_tasks(result.results_dir)) == {"TinySTS"}
    (folder / "default.test.parquet").write_bytes(good)
    again = evaluate(str(model_folder), tasks.root, tmp_path / "out", device="cpu")
    assert again.failures == {} and again.reused == ("TinyPairs",) and failed_tasks(again.results_dir) == {}
    assert [len(json.dumps(line)) > 2 for line in read_manifest(again.results_dir)] == [True, True]
