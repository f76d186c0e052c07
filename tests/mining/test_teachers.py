"""Teachers against plain loops: BM25, a cross-encoder, ensembles, callables, vectors from files, a real encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Router, StaticEmbedding

from nearfield.arrays import Ragged
from nearfield.conformance.tiny_models import WORDS
from nearfield.data import Store
from nearfield.data.vectors import VectorFile, read_vectors
from nearfield.encoders.encode import Encoder
from nearfield.errors import BadInputError
from nearfield.mining import teachers
from nearfield.mining.config import (
    BM25Teacher,
    CrossEncoderTeacher,
    EnsembleTeacher,
    SentenceTransformerTeacher,
    VectorsTeacher,
)
from nearfield.mining.search import ArrayDocuments
from tests.data.making import build_rows
from tests.mining import reference

QUERIES = ["red apple pie", "the running dogs", "nothing shared xyzzy"]
DOCUMENTS = ["apple", "apple pie recipes", "a dog runs", "red red red", "blue sky", "apple pie recipes!", "dogs"]


def texts_of(role: str, rows: Any) -> list[str]:
    return [(QUERIES if role == "query" else DOCUMENTS)[row] for row in rows]


def no_vectors(teacher: Any) -> Any:
    raise AssertionError("not a teacher of vectors")


def make(teacher: Any) -> Any:
    return teacher.build(teachers.TeacherPool((len(QUERIES), len(DOCUMENTS)), texts_of, no_vectors))


def pool_of(queries: list[str], documents: list[str]) -> teachers.TeacherPool:
    texts = {"query": queries, "document": documents}
    return teachers.TeacherPool(
        (len(queries), len(documents)), lambda role, rows: [texts[role][row] for row in rows], no_vectors
    )


def random_dense(seed: int, n: int = 6, m: int = 30) -> teachers.DenseScorer:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((n + m, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return teachers.DenseScorer(vectors[:n], ArrayDocuments(vectors[n:]))


def test_bm25_finds_by_words_with_ties_by_row_and_nothing_without_a_common_word() -> None:
    found, scores = make(BM25Teacher()).find(5, Ragged.from_lists([[3], [2], [4]]), Ragged.from_lists([[], [], []]))
    # "apple pie recipes" twice: equal scores, the smaller row first. Stemming: dogs, dog; running, runs.
    assert found.rows[0].tolist() == [1, 5, 0, -1, -1]
    assert found.scores[0, 0] == found.scores[0, 1] > found.scores[0, 2] > 0
    assert found.rows[1].tolist() == [6, -1, -1, -1, -1]
    assert (found.rows[2] == -1).all()
    assert scores[0] > 0 and scores[1] > found.scores[1, 0] and scores[2] == 0


def test_bm25_is_okapi_as_bm25s_defines_it() -> None:
    import bm25s

    corpus = [" ".join(np.random.default_rng(i).choice(WORDS[:30], 8)) for i in range(40)]
    queries = [" ".join(np.random.default_rng(100 + i).choice(WORDS[:30], 3)) for i in range(5)]
    scorer = teachers.BM25Scorer(BM25Teacher(language=None, k1=1.2, b=0.5), pool_of(queries, corpus))
    index = bm25s.BM25(k1=1.2, b=0.5)
    index.index([text.split() for text in corpus], show_progress=False)
    found = scorer.search(7, Ragged.from_lists([[]] * 5))
    for number, query in enumerate(queries):
        line = index.get_scores(query.split())
        order = [row for row in sorted(range(40), key=lambda row: (-line[row], row)) if line[row] > 0][:7]
        assert found.rows[number][: len(order)].tolist() == order
        np.testing.assert_allclose(found.scores[number][: len(order)], line[order], rtol=1e-6)
    pairs = scorer.score(np.array([3, 0, 3]), np.array([1, 2, 39]))
    np.testing.assert_allclose(pairs[[0, 2]], index.get_scores(queries[3].split())[[1, 39]], rtol=1e-6)


def test_bm25_of_nothing_finds_nothing() -> None:
    scorer = teachers.BM25Scorer(BM25Teacher(), pool_of(["the", "words"], ["the", "of"]))
    assert (scorer.search(2, Ragged.from_lists([[], []])).rows == -1).all()
    with pytest.raises(BadInputError, match="stemmer for 'klingon'"):
        teachers.BM25Scorer(BM25Teacher(language="klingon"), pool_of(["a"], ["b"]))


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A tiny BERT with one output and random weights."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("cross") / "model"
    torch.manual_seed(3)
    config = BertConfig.from_pretrained(tiny_model, num_labels=1, initializer_range=0.5)
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_a_cross_encoder_scores_what_another_teacher_finds(cross_encoder: Path) -> None:
    from sentence_transformers import CrossEncoder

    queries = [" ".join(WORDS[i : i + 3]) for i in range(4)]
    documents = [" ".join(WORDS[i : i + 1 + i % 4]) for i in range(12)]
    texts = lambda role, rows: [(queries if role == "query" else documents)[row] for row in rows]  # noqa: E731
    teacher = CrossEncoderTeacher(model=str(cross_encoder), retrieve=BM25Teacher(language=None))
    scorer = teacher.build(teachers.TeacherPool((4, 12), texts, no_vectors))
    positives = Ragged.from_lists([[11], [0], [1], [2]])
    found, scores = scorer.find(4, positives, Ragged.from_lists([[0], [], [], []]))
    retrieved, _ = (
        BM25Teacher(language=None)
        .build(teachers.TeacherPool((4, 12), texts, no_vectors))
        .find(4, positives, Ragged.from_lists([[0], [], [], []]))
    )
    model = CrossEncoder(str(cross_encoder))
    for number in range(4):
        rows = [row for row in retrieved.rows[number].tolist() if row >= 0]
        alone = [float(model.predict([(queries[number], documents[row])])[0]) for row in rows]
        order = [row for _, row in sorted(zip(alone, rows, strict=True), key=lambda pair: -pair[0])]
        assert [row for row in found.rows[number].tolist() if row >= 0] == order
        np.testing.assert_allclose(found.scores[number][: len(rows)], sorted(alone, reverse=True), atol=1e-5)
        own = positives[number][0]
        assert scores[number] == pytest.approx(float(model.predict([(queries[number], documents[own])])[0]), abs=1e-5)
    assert scores.min() > 0 and scores.max() < 1
    raw = CrossEncoderTeacher(model=str(cross_encoder), retrieve=BM25Teacher(language=None), scale="none")
    logits = raw.build(teachers.TeacherPool((4, 12), texts, no_vectors)).find(
        4, positives, Ragged.from_lists([[]] * 4)
    )[1]
    np.testing.assert_allclose(1 / (1 + np.exp(-logits.astype(float))), scores, atol=1e-5)


def test_scores_of_pairs_that_are_not_finite_are_refused(cross_encoder: Path) -> None:
    """One bad row of a common word: as a number it would have ordered the candidates anyhow."""
    import torch

    documents = [" ".join(WORDS[i : i + 2]) for i in range(12)]
    texts = lambda role, rows: [WORDS[0] if role == "query" else documents[row] for row in rows]  # noqa: E731
    teacher = CrossEncoderTeacher(model=str(cross_encoder), retrieve=BM25Teacher(language=None))
    scorer = teacher.build(teachers.TeacherPool((1, 12), texts, no_vectors))
    number = scorer.model.tokenizer.convert_tokens_to_ids(WORDS[3])
    assert np.isfinite(scorer.score(np.zeros(12, dtype=np.int64), np.arange(12))).all()
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            scorer.model.model.bert.embeddings.word_embeddings.weight[number] = value
        with pytest.raises(BadInputError, match="2 of 12 pairs have a score that is not finite") as error:
            scorer.score(np.zeros(12, dtype=np.int64), np.arange(12))
        assert str(cross_encoder) in str(error.value)


def test_a_model_that_is_no_cross_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot be loaded"):
        make(CrossEncoderTeacher(model=str(tmp_path), retrieve=BM25Teacher()))


@pytest.mark.parametrize("fusion", ["rank", "score"])
def test_ensembles_equal_a_loop(fusion: str) -> None:
    members, weights = [random_dense(0), random_dense(1)], (2.0, 1.0)
    positives, excluded = (
        Ragged.from_lists([[i, i + 6] for i in range(6)]),
        Ragged.from_lists([[20 + i] for i in range(6)]),
    )
    found, scores = teachers.EnsembleScorer(members, weights, fusion).find(8, positives, excluded)
    for query in range(6):
        hidden = {query, query + 6, 20 + query}
        lines = [reference.all_scores(m.queries, m.documents.vectors)[query] for m in members]  # type: ignore[attr-defined]
        union = set()
        for line in lines:
            union |= set([row for row in sorted(range(30), key=lambda r: (-line[r], r)) if row not in hidden][:8])
        pairs = sorted(union | {query, query + 6})
        fused = dict.fromkeys(pairs, 0.0)
        for line, weight in zip(lines, weights, strict=True):
            for rank, row in enumerate(sorted(pairs, key=lambda r: (-line[r], r)), start=1):
                fused[row] += weight / (60 + rank) if fusion == "rank" else weight * float(line[row]) / 3
        order = sorted(union, key=lambda row: (-np.float32(fused[row]), row))[:8]
        assert found.rows[query].tolist() == order
        np.testing.assert_allclose(found.scores[query], [fused[row] for row in order], rtol=1e-6)
        np.testing.assert_allclose(scores[2 * query : 2 * query + 2], [fused[query], fused[query + 6]], rtol=1e-6)


def test_an_ensemble_is_built_from_settings() -> None:
    teacher = EnsembleTeacher(members=(BM25Teacher(), BM25Teacher(k1=2.0)), fusion="score")
    found, _ = make(teacher).find(3, Ragged.from_lists([[3], [2], [4]]), Ragged.from_lists([[], [], []]))
    assert found.rows[0].tolist()[:2] == [1, 5]


def test_teachers_of_vectors_are_found_once() -> None:
    minilm, vectors = SentenceTransformerTeacher(), VectorsTeacher(documents=Path("x.npy"))
    cross = CrossEncoderTeacher(model="x", retrieve=minilm)
    assert EnsembleTeacher(members=(minilm, cross, vectors, BM25Teacher())).dense_teachers() == [minilm, vectors]
    assert BM25Teacher().dense_teachers() == []


def test_any_function_can_teach() -> None:
    asked: list[str] = []

    def encode(texts: Any, role: str) -> Any:
        asked.append(role)
        return [[len(text), 1.0] for text in texts]

    scorer = teachers.encoded(encode, QUERIES, DOCUMENTS)
    assert asked == ["query", "document"]
    found, _ = scorer.find(2, Ragged.from_lists([[0], [1], [2]]), Ragged.from_lists([[], [], []]))
    vectors = [np.array([[len(t), 1.0] for t in texts]) for texts in (QUERIES, DOCUMENTS)]
    vectors = [(v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32) for v in vectors]
    np.testing.assert_array_equal(found.rows, reference.best(*vectors, 2, [{0}, {1}, {2}])[0])


@pytest.fixture()
def store(tmp_path: Path) -> Store:
    rows = [{"query": f"q{i}", "positives": [f"d{i}"], "negatives": []} for i in range(5)]
    return build_rows(tmp_path, rows)


def vectors_by_id(store: Store) -> tuple[list[bytes], Any]:
    ids = store.items["id"].to_pylist()
    return ids, np.random.default_rng(0).standard_normal((len(ids), 4)).astype(np.float32)


@pytest.mark.parametrize("form", ["npy", "parquet", "hex"])
def test_vectors_from_files_are_found_by_id(store: Store, tmp_path: Path, form: str) -> None:
    ids, vectors = vectors_by_id(store)
    order = np.random.default_rng(1).permutation(len(ids))
    path = tmp_path / ("v.npy" if form == "npy" else "v.parquet")
    shuffled = [ids[i] for i in order]
    if form == "npy":
        np.save(path, vectors[order])
        (tmp_path / "v.ids.txt").write_text("\n".join(i.hex() for i in shuffled))
    else:
        column = [i.hex() for i in shuffled] if form == "hex" else shuffled
        pq.write_table(pa.table({"id": column, "vector": list(vectors[order])}), path)
    encode = read_vectors(store, path)
    rows = np.array([3, 0, 9, 3])
    np.testing.assert_array_equal(encode("query", rows), vectors[rows])
    np.testing.assert_array_equal(encode("document", rows[:0]), vectors[:0])


def test_bad_files_of_vectors(store: Store, tmp_path: Path) -> None:
    ids, vectors = vectors_by_id(store)
    path = tmp_path / "v.npy"
    with pytest.raises(BadInputError, match="does not exist"):
        VectorFile(path)
    np.save(path, vectors[:3])
    with pytest.raises(BadInputError, match=r"ids .* missing"):
        VectorFile(path)
    listed = tmp_path / "v.ids.txt"
    for lines, words in (
        (["zz"], "no item id"),
        ([i.hex() for i in ids[:2]], "2 ids for 3 vectors"),
        ([ids[0].hex()] * 3, "stands twice"),
    ):
        listed.write_text("\n".join(lines))
        with pytest.raises(BadInputError, match=words):
            VectorFile(path)
    listed.write_text("\n".join(i.hex() for i in ids[:3]))
    with pytest.raises(BadInputError, match=r"1 of 2 items have no vector here, the first is [0-9a-f]{32}"):
        VectorFile(path).of(store, np.array([0, 4]))
    np.save(path, np.arange(3))
    with pytest.raises(BadInputError, match="floats"):
        VectorFile(path)
    path.write_text("no numbers")
    with pytest.raises(BadInputError, match=r"no \.npy"):
        VectorFile(path)
    pq.write_table(pa.table({"id": ids[:2], "vector": [[1.0], [1.0, 2.0]]}), tmp_path / "v.parquet")
    with pytest.raises(BadInputError, match="lengths"):
        VectorFile(tmp_path / "v.parquet")


def test_texts_are_encoded_as_sentence_transformers_does(tiny_model: Path) -> None:
    encoder = Encoder.load(str(tiny_model), device="cpu")
    encoder.chunk_tokens = 40
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(1, 30))) for _ in range(50)]
    expected = encoder.model.encode(texts, prompt="word1 word2 ", show_progress_bar=False)
    for packing in (encoder.packing, None):
        encoder.packing = packing
        np.testing.assert_allclose(encoder(texts, "word1 word2 "), expected, atol=2e-6)
    assert encoder([]).shape == (0, 32)


def test_models_whose_texts_are_more_than_tokens_are_encoded_by_their_own_method(tiny_model: Path) -> None:
    """A table of words, and a model that reads queries otherwise than documents."""
    base = SentenceTransformer(str(tiny_model), device="cpu")
    table = base[0].auto_model.get_input_embeddings().weight.detach().numpy()
    words = SentenceTransformer(modules=[StaticEmbedding(base.tokenizer.backend_tokenizer, embedding_weights=table)])
    texts = ["word1 word2 word3", "word4", "", *(f"word{n} word{n + 1}" for n in range(100))]
    encoder = Encoder(words)
    assert not encoder.by_tokens
    np.testing.assert_allclose(encoder(texts, "word9 "), words.encode(texts, prompt="word9 "), atol=1e-6)
    width = table.shape[1]
    sides = {name: [*base, Dense(width, 8, activation_function=None)] for name in ("query", "document")}
    both = SentenceTransformer(modules=[Router.for_query_document(sides["query"], sides["document"])], device="cpu")
    encoder = Encoder(both)
    assert not encoder.by_tokens
    np.testing.assert_allclose(encoder(texts, "", "query"), both.encode_query(texts), atol=2e-6)
    np.testing.assert_allclose(encoder(texts, "", "document"), both.encode_document(texts), atol=2e-6)
    assert np.abs(encoder(texts, "", "query") - encoder(texts, "", "document")).max() > 0.01
