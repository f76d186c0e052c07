"""The encoder feeds the model what mteb's own wrapper feeds it, once for each distinct text."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from nearfield.encoders import load_encoder
from nearfield.encoders.encode import Encoder, cut
from nearfield.encoders.identity import model_fingerprint
from nearfield.errors import BadInputError
from nearfield.evaluation import evaluate, open_model
from nearfield.evaluation.encoder import TaskEncoder, compress
from nearfield.evaluation.folder import folder_task, task_folders
from nearfield.evaluation.results import failed_tasks, read_manifest, read_units

PROMPTS = {
    "plain": {},
    "roles": {"query": "query: ", "document": "passage: "},
    "types": {
        "query": "q: ",
        "document": "d: ",
        "Retrieval-query": "rq: ",
        "Reranking-document": "rd: ",
        "STS": "sts: ",
        "Classification": "topic: ",
        "Clustering-query": "unused: ",
        "BitextMining": "bitext: ",
    },
}


def fed(model: Any) -> list[tuple[int, ...]]:
    """From now on, collect the token ids of every text that goes into the model, padded or packed."""
    rows: list[tuple[int, ...]] = []

    def padded(_module: Any, args: tuple[Any, ...]) -> None:
        for ids, mask in zip(args[0]["input_ids"], args[0]["attention_mask"], strict=True):
            rows.append(tuple(ids[mask.bool()].tolist()))

    def packed(_module: Any, _args: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert named["input_ids"].shape == (1, sum(named["segments"].lengths))
        rows.extend(tuple(text.tolist()) for text in named["input_ids"][0].split(list(named["segments"].lengths)))

    model[0].register_forward_pre_hook(padded)
    model[0].auto_model.register_forward_pre_hook(packed, with_kwargs=True)
    return rows


def run(model: Any, folder: Path) -> dict[str, float]:
    result = mteb.evaluate(
        model, folder_task(folder).task, cache=None, encode_kwargs={"show_progress_bar": False}, show_progress_bar=False
    )
    return {entry["hf_subset"]: entry["main_score"] for entry in result.task_results[0].scores["test"]}


@pytest.mark.parametrize(("prompts", "default"), [("plain", None), ("roles", None), ("types", "query")])
@pytest.mark.filterwarnings("ignore")
def test_every_task_type_gets_the_strings_and_scores_of_mteb(
    prompts: str, default: str | None, every_type: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", PROMPTS[prompts] or None, default=default)
    theirs, ours = load_encoder(str(folder), device="cpu").model, load_encoder(str(folder), device="cpu").model
    their_rows, our_rows = fed(theirs), fed(ours)
    encoder = TaskEncoder(ours, name="local/tiny", revision="1")
    assert encoder.encoder.packing is not None
    for task_folder in task_folders(every_type):
        their_rows.clear(), our_rows.clear(), encoder.forget()
        expected, got = run(theirs, task_folder), run(encoder, task_folder)
        assert set(our_rows) == set(their_rows), task_folder.name
        assert len(our_rows) <= len(their_rows)
        assert got == pytest.approx(expected, abs=1e-6), task_folder.name


@pytest.mark.filterwarnings("ignore")
def test_a_prompt_under_an_official_task_name_is_used_for_the_local_copy(
    tasks: Any, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", {"query": "q: ", "document": "d: ", "SciFact-query": "claim: "})
    model = load_encoder(str(folder), device="cpu").model
    encoder, rows = TaskEncoder(model, name="local/tiny", revision="1"), fed(model)
    task = folder_task(tasks.retrieval("SciFact")).task
    run(encoder, tasks.root / "SciFact")
    decoded = [
        model.tokenizer.decode(list(row), skip_special_tokens=True).replace(" ", "").replace("##", "") for row in rows
    ]
    assert sum(text.startswith("claim:") for text in decoded) == 20
    assert sum(text.startswith("d:") for text in decoded) == 40
    assert encoder.prompt_for(task.metadata, mteb.types.PromptType.query) == "claim: "


@pytest.mark.parametrize("batch_tokens", [None, 40, 100_000])
def test_embeddings_equal_those_of_sentence_transformers(
    model_folder: Path, some_sentences: Callable[..., list[str]], batch_tokens: int | None
) -> None:
    from mteb._create_dataloaders import _create_dataloader_from_texts

    model = load_encoder(str(model_folder), device="cpu").model
    encoder = TaskEncoder(model, name="local/tiny", revision="1", encoder=Encoder(model, batch_tokens))
    texts = some_sentences(70, seed=3, longest=30)
    texts += [*texts[:9], "", "  ", "walnut " * 400]
    metadata = mteb.get_task("STS12").metadata
    arguments: dict[str, Any] = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default"}
    got = encoder.encode(_create_dataloader_from_texts(texts), **arguments)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, model.encode(texts, show_progress_bar=False), atol=2e-6, rtol=0)
    # The empty text and that of two spaces have the same tokens.
    assert encoder.encoder.encoded == len(set(texts)) - 1 == 72 and encoder.same_tokens == 1
    encoder.encode(_create_dataloader_from_texts(texts[:20]), **arguments)
    assert encoder.encoder.encoded == 72


@pytest.mark.parametrize("padded", [True, False])
def test_chunks_stay_within_the_token_budget(padded: bool) -> None:
    lengths = np.random.default_rng(0).integers(0, 40, size=60).tolist()
    lengths[7] = 300
    chunks = cut(lengths, 200, padded=padded, most=12)
    order = [i for chunk in chunks for i in chunk]
    assert sorted(order) == list(range(60)) and [lengths[i] for i in order] == sorted(lengths, reverse=True)
    for chunk in chunks:
        longest = lengths[chunk[0]]
        cost = len(chunk) * longest if padded else sum(lengths[i] for i in chunk)
        assert len(chunk) == 1 or (cost <= 200 and len(chunk) <= 12)
    # No chunk could have taken the first text of the next.
    for chunk, following in itertools.pairwise(chunks):
        more = lengths[chunk[0]] if padded else lengths[following[0]]
        cost = len(chunk) * lengths[chunk[0]] if padded else sum(lengths[i] for i in chunk)
        assert cost + more > 200 or len(chunk) == 12


ARGUMENTS: dict[str, Any] = {
    "task_metadata": mteb.get_task("SciFact").metadata,
    "hf_split": "test",
    "hf_subset": "default",
}


@pytest.mark.parametrize("packed", [True, False])
def test_packed_or_padded_a_text_gets_the_vector_of_its_role(
    packed: bool, make_model: Callable[..., Path], some_sentences: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Prompts that poolings leave out, and cut dimensions; where roles have lengths of their own, nothing is packed."""
    from mteb._create_dataloaders import _create_dataloader_from_texts

    folder = make_model(tmp_path / "model", {"query": "query: ", "document": "passage: "})
    model = load_encoder(str(folder), device="cpu").model
    model[1].include_prompt = False
    model.truncate_dim = 20
    if not packed:
        model[0].query_length = 9
    encoder = TaskEncoder(model, name="local/tiny", revision="1")
    assert (encoder.encoder.packing is not None) == packed
    texts = [*some_sentences(40, longest=20), ""]
    found = {}
    for role, alone in (("query", model.encode_query), ("document", model.encode_document)):
        found[role] = encoder.encode(
            _create_dataloader_from_texts(texts), prompt_type=mteb.types.PromptType(role), **ARGUMENTS
        )
        np.testing.assert_allclose(found[role], alone(texts, show_progress_bar=False), atol=2e-6, rtol=0)
        assert found[role].shape == (41, 20)
    assert np.abs(found["query"] - found["document"]).max() > 0.01


def test_what_waits_for_the_next_chunk_is_in_no_inference_mode(
    model_folder: Path, some_sentences: Callable[..., list[str]]
) -> None:
    model = load_encoder(str(model_folder), device="cpu").model.train()
    encoder = TaskEncoder(model, name="local/tiny", revision="1", encoder=Encoder(model, 30))
    vectors = iter(encoder.encoder.pairs(some_sentences(10)))
    next(vectors)
    assert not torch.is_inference_mode_enabled() and model[0].training
    assert len(list(vectors)) == 9


def test_the_model_is_filed_under_its_own_name(model_folder: Path) -> None:
    loaded = load_encoder(str(model_folder), device="cpu")
    meta = TaskEncoder(loaded.model, name=loaded.name, revision=loaded.revision).mteb_model_meta
    assert (meta.name, meta.revision) == ("local/tiny", loaded.revision)
    assert meta.modalities == ["text"]


def test_embeddings_of_a_huge_task_are_not_kept(
    model_folder: Path, some_sentences: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mteb._create_dataloaders import _create_dataloader_from_texts

    from nearfield.evaluation import encoder as module

    monkeypatch.setattr(module, "_MAX_KEPT_TEXTS", 30)
    encoder = TaskEncoder(load_encoder(str(model_folder), device="cpu").model, name="local/tiny", revision="1")
    arguments: dict[str, Any] = {
        "task_metadata": mteb.get_task("STS12").metadata,
        "hf_split": "test",
        "hf_subset": "default",
    }
    texts = some_sentences(50)
    first = encoder.encode(_create_dataloader_from_texts(texts[:20]), **arguments)
    whole = encoder.encode(_create_dataloader_from_texts(texts), **arguments)
    np.testing.assert_array_equal(whole[:20], first)
    assert encoder.encoder.encoded == 50 and sum(map(len, encoder._kept.values())) == 20


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


@pytest.mark.filterwarnings("ignore")
def test_a_second_model_name_costs_nothing_and_scores_the_same(
    every_type: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["TinyRetrieval", "TinySTS"]
    open_kept = functools.partial(open_model, str(model_folder), cache=tmp_path / "vectors")
    plain = evaluate(str(model_folder), every_type, tmp_path / "plain", tasks=tasks)
    first = evaluate(open_kept(), every_type, tmp_path / "one", tasks=tasks)
    assert first.scores == plain.scores

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Encoder, "pairs", never)
    again = evaluate(open_kept(name="other/name"), every_type, tmp_path / "two", tasks=tasks)
    assert again.scores == first.scores
    (line,) = read_manifest(again.results_dir)
    facts = line["tasks"]["TinyRetrieval"]
    assert facts["texts_encoded"] == 0 and facts["texts_from_cache"] == 60
    assert line["versions"]["mteb"] and line["dtype"] == "float32" and facts["data_revision"].startswith("local-")
    cut = evaluate(open_kept(dimensions=8), every_type, tmp_path / "two", tasks=tasks)
    assert cut.model == "local/tiny-dim8" and cut.scores != first.scores
    rounded = evaluate(open_kept(quantize="int8"), every_type, tmp_path / "two", tasks=tasks)
    assert rounded.model == "local/tiny-int8"
    assert rounded.scores["TinySTS"]["default"] == pytest.approx(first.scores["TinySTS"]["default"], abs=0.02)
    settings: tuple[dict[str, Any], ...] = ({"dimensions": 33}, {"dimensions": 0}, {"quantize": "int3"})
    for bad in settings:
        with pytest.raises(BadInputError):
            open_kept(**bad)


@pytest.mark.filterwarnings("ignore")
def test_failures_are_recorded_until_the_task_is_scored(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    folder = tasks.sts()
    good = (folder / "default.test.parquet").read_bytes()
    tasks.table(folder / "default.test.parquet", sentence1=["a"], sentence2=["b"], score=["high"])
    tasks.pairs()
    result = evaluate(str(model_folder), tasks.root, tmp_path / "out")
    assert set(failed_tasks(result.results_dir)) == {"TinySTS"}
    (folder / "default.test.parquet").write_bytes(good)
    again = evaluate(str(model_folder), tasks.root, tmp_path / "out")
    assert again.failures == {} and again.reused == ("TinyPairs",) and failed_tasks(again.results_dir) == {}
    assert [len(json.dumps(line)) > 2 for line in read_manifest(again.results_dir)] == [True, True]


def test_texts_of_the_same_tokens_have_the_same_vector_whatever_their_batch(tasks: Any, model_folder: Path) -> None:
    encoder = TaskEncoder(load_encoder(str(model_folder), device="cpu").model, name="local/tiny", revision="1")
    metadata = folder_task(tasks.sts()).task.metadata
    texts = ["harbour lantern", "a", "meadow " * 9, "harbour  lantern", "harbour lantern ", "a b c d e f g"]
    first = encoder._embed_texts(texts[:3], metadata, None)
    rest = encoder._embed_texts(texts, metadata, None)
    assert np.array_equal(rest[3], first[0]) and np.array_equal(rest[4], first[0])
    assert not np.array_equal(rest[5], first[1]) and encoder.same_tokens == 2
    encoder.forget()
    assert encoder.same_tokens == 0


def test_equal_hamming_distances_are_ties(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    scored = open_model(str(model_folder), name="a/b", quantize="binary")
    for folder in (tasks.sts(), tasks.pairs()):
        result = evaluate(scored, folder, tmp_path / "out")
        (line,) = read_manifest(result.results_dir)[-1]["tasks"].values()
        table, _ = read_units(result.results_dir, next(iter(result.scores)))
        values = table.filter(pc.equal(table["metric"], "prediction"))["value"].to_numpy()
        counts = (1 - values) / 2 * scored.encoder.model.get_embedding_dimension()
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
        assert len(np.unique(values)) == len(np.unique(np.round(counts))) < len(values)
        assert line["tied_predictions"] == len(values) - len(np.unique(values))
        assert line["texts_of_same_tokens"] == 0
    encoder = scored.encoder
    signs = compress(np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32), None, "binary")
    exact = np.asarray(encoder.similarity(signs, signs))
    differing = (signs[:, None] != signs[None]).sum(axis=-1)
    assert len(np.unique(exact)) == len(np.unique(differing))
    paired = np.asarray(encoder.similarity_pairwise(signs, signs[::-1].copy()))
    np.testing.assert_array_equal(paired, exact[np.arange(40), np.arange(40)[::-1]])
