"""Pictures as held-out tasks: retrieval both ways, probe, clustering, zero-shot, each scored as a reference scores it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from nearfield.conformance.cases import TINY_VISION
from nearfield.conformance.tiny_models import save_tiny_bert
from nearfield.data import Store, build_data
from nearfield.encoders import EncoderConfig, LoadedEncoder
from nearfield.encoders.config import ImageTowerConfig
from nearfield.encoders.load import build_encoder
from nearfield.errors import BadInputError
from nearfield.evaluation import EvaluationResult, FolderTasks, HeldOutTask, SuiteConfig, evaluate
from nearfield.evaluation.encoder import TaskEncoder
from nearfield.evaluation.results import read_units
from nearfield.evaluation.tasks import heldout_task
from tests.data.image_making import noise, saved
from tests.data.making import LABELLED, config, source, write_rows

MNIST = Path(__file__).parents[2].parent / "shared" / "data" / "MNISTZeroShot"
SPLIT = {"kind": "column", "column": "split"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("pictures")
    pairs, labelled = [], []
    for number in range(40):
        (folder / f"{number}.png").write_bytes(saved(noise(number, 16 + number % 3, 16)))
        split = "test" if number % 2 else "train"
        # Two captions a picture, one of which several pictures share.
        captions = (f"word{number} word{number + 1}", f"word{100 + number // 6}")
        about = {"positives": f"{number}.png", "split": split, "key": f"c{number // 6}"}
        pairs += [{"query": caption, **about} for caption in captions]
        labelled.append({"text": f"{number}.png", "label": f"word{number // 2 % 4}", "split": split})
    for name, rows in (("pairs", pairs), ("labels", labelled)):
        write_rows(folder / f"{name}.jsonl", rows)
    retrieval = {"kind": "retrieval", "query": "query", "positives": "positives"}
    sources = (
        source(
            folder / "pairs.jsonl",
            name="pairs",
            task_type="Any2AnyRetrieval",
            examples=retrieval,
            images={"columns": ["positives"]},
            cluster="key",
            split=SPLIT,
        ),
        source(
            folder / "labels.jsonl",
            name="labels",
            task_type="ImageClassification",
            examples=LABELLED,
            images={"columns": ["text"]},
            split=SPLIT,
        ),
    )
    build_data(config(*sources), folder / "store")
    return Store.open(folder / "store")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    text = save_tiny_bert(tmp_path_factory.mktemp("text") / "model", hidden=16)
    tower = ImageTowerConfig(architecture="vit", settings=TINY_VISION, size=16)
    return build_encoder(EncoderConfig(model=str(text), image_tower=tower, normalize=True), "cpu").model


def score(model: SentenceTransformer, store: Store, folder: Path, **task: Any) -> tuple[dict[str, Any], Any]:
    """mteb's scores of a held-out task, and its unit scores."""
    name = "PicturesTask"
    suite = SuiteConfig(
        name="pictures", tasks=[HeldOutTask.model_validate({"name": name, "data": str(store.path), **task})]
    )
    result = evaluate(LoadedEncoder(model, "local/tiny", "0", "nowhere"), suite, folder)
    assert result.failures == {}
    return scores_of(result, name), read_units(result.results_dir, name)[0].to_pydict()


def scores_of(result: EvaluationResult, name: str) -> dict[str, Any]:
    (file,) = result.results_dir.glob(f"{name}.json")
    (entry,) = json.loads(file.read_text())["scores"]["test"]
    found: dict[str, Any] = entry
    return found


def sides(store: Store) -> tuple[list[int], list[int], np.ndarray[Any, Any]]:
    """Caption rows, picture rows of the test split, and which belong together."""
    rows = store.examples.take(store.select("pairs", "test")).to_pylist()
    captions = sorted({row["query"] for row in rows})
    pictures = sorted({row["positives"][0] for row in rows})
    belongs = np.zeros((len(captions), len(pictures)), dtype=bool)
    for row in rows:
        belongs[captions.index(row["query"]), pictures.index(row["positives"][0])] = True
    return captions, pictures, belongs


@pytest.mark.parametrize("reverse", [False, True])
def test_retrieval_both_ways_is_scored_as_a_matrix_is(
    model: SentenceTransformer, store: Store, tmp_path: Path, reverse: bool
) -> None:
    entry, units = score(model, store, tmp_path, source="pairs", distractors=0, reverse=reverse, metric="recall_at_5")
    captions, pictures, belongs = sides(store)
    similarity = model.encode(store.texts(captions)) @ model.encode(store.images(pictures)).T
    similarity, belongs = (similarity.T, belongs.T) if reverse else (similarity, belongs)
    first = np.argsort(-similarity, axis=1)[:, :5]
    recall = np.take_along_axis(belongs, first, axis=1).sum(axis=1) / belongs.sum(axis=1)
    assert entry["main_score"] == pytest.approx(recall.mean(), abs=1e-4)
    values = [value for metric, value in zip(units["metric"], units["value"], strict=True) if metric == "recall_at_5"]
    assert sorted(values) == pytest.approx(sorted(recall))
    assert len(set(units["cluster"])) == 7, "by the key of the pictures"


def test_labelled_pictures_are_probed_clustered_and_named(
    model: SentenceTransformer, store: Store, tmp_path: Path
) -> None:
    entry, units = score(model, store, tmp_path / "probe", source="labels")
    assert 0 <= entry["accuracy"] <= 1 and set(units["unit"]) == {"item"}
    entry, _ = score(model, store, tmp_path / "cluster", source="labels", **{"as": "clustering"})
    assert 0 <= entry["v_measure"] <= 1
    zero_shot = {"as": "zero_shot", "template": "word9 {label}"}
    entry, units = score(model, store, tmp_path / "named", source="labels", **zero_shot)
    rows = store.examples.take(store.select("labels", "test")).to_pylist()
    names = sorted({row["label"] for row in rows})
    labels = model.encode([f"word9 {name}" for name in names])
    found = (model.encode(store.images([row["query"] for row in rows])) @ labels.T).argmax(axis=1)
    right = [names[best] == row["label"] for best, row in zip(found, rows, strict=True)]
    assert entry["accuracy"] == pytest.approx(np.mean(right))
    assert [bool(value) for value in units["value"]] == right


def test_what_does_not_fit_is_refused(store: Store) -> None:
    def task(**settings: Any) -> None:
        heldout_task(HeldOutTask.model_validate({"name": "T", "data": str(store.path), **settings}), lambda path: store)

    with pytest.raises(BadInputError, match="needs labelled examples"):
        task(source="pairs", **{"as": "zero_shot"})
    with pytest.raises(BadInputError, match="'reverse' and 'metric' are for retrieval"):
        task(source="labels", reverse=True)


def test_an_item_of_both_is_the_sum_of_its_towers(model: SentenceTransformer) -> None:
    import datasets
    from torch.utils.data import DataLoader

    pictures, texts = [noise(1), noise(2).convert("L")], ["word1", "word2 word3"]
    data = datasets.Dataset.from_dict({"image": pictures, "text": texts})
    loader = DataLoader(data, batch_size=2, collate_fn=lambda rows: {key: [r[key] for r in rows] for key in rows[0]})
    encoder = TaskEncoder(model, name="local/tiny", revision="0")
    assert set(encoder.mteb_model_meta.modalities) == {"text", "image"}
    import mteb

    metadata = mteb.get_task("MNISTZeroShot").metadata
    found = encoder.encode(loader, task_metadata=metadata, hf_split="test", hf_subset="default")
    added = model.encode([each.convert("RGB") for each in pictures]) + model.encode(texts)
    np.testing.assert_allclose(found, added / np.linalg.norm(added, axis=1, keepdims=True), atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="the shared MNIST test images are not here")
def test_mnist_is_scored_zero_shot(model: SentenceTransformer, tmp_path: Path) -> None:
    suite = SuiteConfig(name="mnist", tasks=[FolderTasks(path=MNIST)])
    result = evaluate(LoadedEncoder(model, "local/tiny", "0", "nowhere"), suite, tmp_path)
    assert result.failures == {}
    assert 0.02 < scores_of(result, "MNISTZeroShot")["accuracy"] < 0.3, "random weights: near a tenth"
    assert read_units(result.results_dir, "MNISTZeroShot")[0].num_rows == 10_000
