"""Cleaning steps for images, and what the steps for texts do where there are images."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from nearfield.data import DataSummary, Store, build_data
from nearfield.data.cleaning.steps import PerceptualHashes, grams
from nearfield.data.config import InContextConfig
from nearfield.data.decontaminate import BenchmarkTask, BenchmarkText, decontaminate
from nearfield.data.in_context import draw_example_sets
from nearfield.data.statistics import sample_examples, store_stats
from nearfield.data.store import read_summary
from nearfield.errors import BadInputError
from tests.data.image_making import noise, saved
from tests.data.making import config, source, write_rows

Rows = Sequence[Mapping[str, object]]
SIZES = {"wide.png": (90, 30), "wider.png": (91, 30), "small.png": (40, 29)}
NEUTRAL: list[dict[str, Any]] = [
    {"kind": "picture_size"},
    {"kind": "shared"},
    {"kind": "rare_words"},
    {"kind": "near_pictures", "bits": None},
]


def built(folder: Path, rows: Rows, steps: Sequence[Mapping[str, Any]], **changes: Any) -> tuple[Store, DataSummary]:
    """The store of rows with ``photo`` (the name of a file), ``text`` and ``split``; files that are missing are made."""
    for number, name in enumerate(dict.fromkeys(str(row["photo"]) for row in rows)):
        if not (folder / name).exists():
            (folder / name).write_bytes(saved(noise(100 + number, *SIZES.get(name, (60, 50)))))
    path = write_rows(folder / "rows.jsonl", [{"split": "train", **row} for row in rows])
    settings: dict[str, Any] = {
        "examples": {"kind": "retrieval", "query": "photo", "positives": "text"},
        "images": {"columns": ["photo"], "max_side": 48},
        "split": {"kind": "column", "column": "split"},
    }
    build_data(config(source(path, **settings | changes), steps=list(steps)), folder / "store")
    return Store.open(folder / "store"), read_summary(folder / "store")


def removed(store: Store) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store.path / "removed.jsonl").read_text().splitlines()]


def texts(store: Store) -> list[str]:
    """The first positive of each example."""
    return store.texts([positives[0] for positives in store.examples["positives"].to_pylist()])


def test_neutral_steps_change_no_byte(tmp_path: Path) -> None:
    rows = [{"photo": f"{n}.png", "text": f"text number {n}"} for n in range(4)]
    (tmp_path / "with").mkdir()
    plain, _ = built(tmp_path, rows, [])
    cleaned, summary = built(tmp_path / "with", rows, NEUTRAL)
    for name in ("items.arrow", "examples.arrow", "images.arrow"):
        assert (plain.path / name).read_bytes() == (cleaned.path / name).read_bytes()
    assert [step.before == step.after for step in summary.steps] == [True] * 4
    assert not removed(cleaned)


def test_the_filters_of_align(tmp_path: Path) -> None:
    """Each rule has rows that fail it alone; what stays and what goes are all there are."""
    common = [{"photo": f"good-{n}.png", "text": "a red house by the sea"} for n in range(2)]
    common += [{"photo": f"fine-{n}.png", "text": "the sea by a red house"} for n in range(2)]
    crowd = ["a red house", "the red house", "a house by the sea", "the house by the sea"]
    rows = [
        *common,
        {"photo": "wide.png", "text": "the sea by a red house"},
        {"photo": "wider.png", "text": "a red house by the sea"},
        {"photo": "small.png", "text": "a red house by the sea"},
        *({"photo": "crowded.png", "text": text} for text in crowd),
        *({"photo": f"stock-{n}.png", "text": "by the sea"} for n in range(4)),
        {"photo": "rare.png", "text": "a red sea by the house"},
        {"photo": "short.png", "text": "the sea"},
    ]
    steps = [
        {"kind": "picture_size", "min_side": 30, "max_ratio": 3},
        {"kind": "shared", "texts_per_picture": 3, "pictures_per_text": 3},
        {"kind": "rare_words", "least": 2},
        {"kind": "length", "least": 3, "most": 20},
    ]
    store, summary = built(tmp_path, rows, steps)
    assert [dict(step.reasons) for step in summary.steps] == [
        {"query: a side under 30 pixels": 1, "query: sides over 3 to 1": 1},
        {"query: an image with over 3 texts": 4, "positive: a text of over 3 images": 4},
        {"positive: a rare word or pair of words": 1},
        {"positive: fewer than 3 words": 1},
    ]
    gone = sum(sum(step.reasons.values()) for step in summary.steps)
    assert store.examples.num_rows + gone == len(rows)
    assert sorted(texts(store)) == sorted([*(str(row["text"]) for row in common), "the sea by a red house"])
    assert len(removed(store)) == gone
    assert removed(store)[0]["query"] == "[image 48x16]"
    used = store.image_rows(store.examples["query"].to_numpy())
    assert sorted(used.tolist()) == list(range(store.image_table.num_rows)), "no image is kept that nobody uses"
    images = store.images(store.examples["query"].to_numpy()[:2])
    assert images[0] is not None
    assert images[0].size == (48, 40)


def test_images_that_go_leave_the_others_in_place(tmp_path: Path) -> None:
    rows = [{"photo": f"{n}.png", "text": "x" if n % 2 else f"text number {n}"} for n in range(7)]
    before, _ = built(tmp_path, rows, [])
    shown = dict(zip(texts(before), before.images(before.examples["query"].to_numpy()), strict=True))
    after, _ = built(tmp_path, rows, [{"kind": "length", "least": 2}])
    assert texts(after) == [f"text number {n}" for n in (0, 2, 4, 6)]
    for text, image in zip(texts(after), after.images(after.examples["query"].to_numpy()), strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(shown[text]))


def test_sharing_counts_different_partners(tmp_path: Path) -> None:
    """Either side may be the query; the same pair twice is one; pixels make an image, not files."""
    rows = [{"photo": f"{n}.png", "text": "shared"} for n in range(3)]
    again = io.BytesIO()
    Image.open(io.BytesIO(saved(noise(100, 60, 50)))).save(again, "PNG", compress_level=0)
    (tmp_path / "copy.png").write_bytes(again.getvalue())
    rows += [{"photo": "copy.png", "text": "shared"}, {"photo": "3.png", "text": "alone"}]
    examples = {"kind": "retrieval", "query": "text", "positives": "photo"}
    step = {"kind": "shared", "pictures_per_text": 3}
    _, summary = built(tmp_path, rows, [step], examples=examples)
    assert summary.steps[0].after == {"pairs": 5}
    _, summary = built(tmp_path, rows, [step | {"pictures_per_text": 2}], examples=examples)
    assert summary.steps[0].reasons == {"query: a text of over 2 images": 4}


@pytest.mark.parametrize("vocabulary", [1, 5, 9, 30, None])
@pytest.mark.parametrize("least", [1, 2, 3])
def test_rare_words_equal_plain_counting(tmp_path: Path, vocabulary: int | None, least: int) -> None:
    random = np.random.default_rng(3)
    vocabulary_words = np.asarray(["a", "b", "c", "d", "e", "f"])
    chosen = [" ".join(random.choice(vocabulary_words, 3, p=[0.5, 0.3, 0.1, 0.06, 0.03, 0.01])) for _ in range(40)]
    chosen[0] = "a a a"
    rows = [{"photo": f"{n}.png", "text": text} for n, text in enumerate(chosen)]
    store, _ = built(tmp_path, [*rows, {"photo": "z.png", "text": "a a a"}], [])
    whole = texts(store)
    counts: Counter[str] = Counter(gram for text in whole for gram in grams(text))
    ranked = sorted(counts.values(), reverse=True)
    bar = max(least, ranked[vocabulary - 1] if vocabulary is not None and vocabulary < len(ranked) else 0)
    kept = [text for text in whole if all(counts[gram] >= bar for gram in grams(text))]
    step = {"kind": "rare_words", "vocabulary": vocabulary, "least": least}
    if not kept:
        with pytest.raises(BadInputError, match="leaves nothing"):
            built(tmp_path, [*rows, {"photo": "z.png", "text": "a a a"}], [step])
        return
    store, _ = built(tmp_path, [*rows, {"photo": "z.png", "text": "a a a"}], [step])
    assert texts(store) == kept


def scene(seed: int) -> Image.Image:
    """A smooth image, as photographs are at a small scale."""
    return noise(seed, 6, 5).resize((120, 100), resample=Image.Resampling.BICUBIC)


def test_copies_look_alike_and_others_do_not() -> None:
    originals = [scene(seed) for seed in range(30)]
    copies = [
        [image.resize((60, 50)) for image in originals],
        [Image.open(io.BytesIO(saved(image, "JPEG", quality=60))).convert("RGB") for image in originals],
        [ImageEnhance.Brightness(image).enhance(1.04) for image in originals],
    ]
    every = PerceptualHashes.of([*originals, *(image for group in copies for image in group)])
    first = every.first_alike(3, 8)
    assert first.tolist() == list(range(30)) * 4
    flat = PerceptualHashes.of([Image.new("RGB", (9, 9), colour) for colour in ("red", "blue", "#fe0101")])
    assert flat.first_alike(3, 8).tolist() == [0, 1, 0], "the hash is blind to colour, the rule is not"


@pytest.mark.parametrize("bits", [0, 1, 3, 16])
def test_the_search_equals_brute_force(bits: int) -> None:
    random = np.random.default_rng(bits)
    base = random.integers(0, 2**63, 12, dtype=np.uint64)
    flips = np.asarray(
        [sum(1 << int(b) for b in random.choice(64, random.integers(0, bits + 3), replace=False)) for _ in range(150)],
        dtype=np.uint64,
    )
    hashes = PerceptualHashes(
        base[random.integers(0, 12, 150)] ^ flips, random.integers(100, 108, (150, 8, 8, 3)).astype(np.uint8)
    )
    expected = list(range(150))
    for one in range(150):
        for other in range(one):
            apart = np.abs(hashes.small[one].astype(float) - hashes.small[other].astype(float)).mean()
            different = bin(int(hashes.bits[one]) ^ int(hashes.bits[other])).count("1")
            assert hashes.alike(one, np.asarray([other]), bits, 3.0)[0] == (different <= bits and apart <= 3.0)
            if expected[other] == other and different <= bits and apart <= 3.0:
                expected[one] = other
                break
    assert hashes.first_alike(bits, 3.0).tolist() == expected


def test_copies_of_test_images_go(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(saved(scene(number)))
    (tmp_path / "copy.jpg").write_bytes(saved(scene(1).resize((90, 75)), "JPEG", quality=80))
    rows = [
        {"photo": "copy.jpg", "text": "a copy"},
        {"photo": "0.png", "text": "zero"},
        {"photo": "1.png", "text": "one", "split": "test"},
        {"photo": "0.png", "text": "another text of the same image"},
    ]
    step = {"kind": "near_pictures", "compare": "query", "keep": ["test"]}
    store, summary = built(tmp_path, rows[:3], [step])
    assert texts(store) == ["zero", "one"]
    assert summary.steps[0].reasons == {"near-duplicate image": 1}
    assert removed(store)[0]["like"] == "[image 48x40]"
    store, _ = built(tmp_path, rows, [{"kind": "near_pictures"}])
    assert len(texts(store)) == 4, "by example, another text is another example"


def test_text_steps_leave_images_alone(tmp_path: Path) -> None:
    rows = [{"photo": f"{n}.png", "text": "the very same caption here"} for n in range(3)]
    rows += [{"photo": "3.png", "text": "zu kurz"}]
    steps = [
        {"kind": "near_duplicates"},
        {"kind": "length", "least": 3},
        {"kind": "characters", "min_letters": 0.5},
        {"kind": "language", "languages": ["en"]},
    ]
    store, summary = built(tmp_path, rows, steps)
    assert [{k: n for k, n in step.reasons.items() if n} for step in summary.steps] == [
        {},
        {"positive: fewer than 3 words": 1},
        {},
        {},
    ]
    join = {"item": {"text": "text", "image": "photo"}}
    examples = {"kind": "labelled", "item": "item", "label": "split"}
    store, _ = built(tmp_path, rows, steps, examples=examples, images={"join": join})
    assert store.examples.num_rows == 3, "one text with three images is three items"


def test_decontamination_compares_texts_and_counts_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"photo": f"{n}.png", "text": f"caption number {n} of the set"} for n in range(3)]
    store, _ = built(tmp_path, rows, [])
    texts_of = [BenchmarkText("0", "query", "caption number 1 of the set")]
    report = decontaminate(store, [BenchmarkTask("Task", lambda: texts_of)])
    assert (report.texts, report.images, report.contaminated) == (3, 3, 1)
    assert report.to_json()["images"] == 3
    assert "3 training images are not compared" in caplog.text
    examples = {"kind": "retrieval", "query": "photo", "positives": "photo"}
    store, _ = built(tmp_path, rows, [], examples=examples)
    with pytest.raises(BadInputError, match="images alone"):
        decontaminate(store, [BenchmarkTask("Task", lambda: texts_of)])


def test_statistics_and_samples(tmp_path: Path) -> None:
    rows = [{"photo": f"{n}.png", "text": "two words"} for n in range(3)]
    store, _ = built(tmp_path, rows, [])
    (found,) = store_stats(store).sources
    assert found.images == 3
    assert found.overlap is None
    assert [(lengths.role, lengths.items, lengths.mean) for lengths in found.lengths] == [("document", 1, 2.0)]
    (shown,) = sample_examples(store, 1)
    assert (shown.query, shown.positives) == ("[image 48x40]", ("two words",))
    with pytest.raises(BadInputError, match="has images"):
        draw_example_sets(store, "pairs", "train", InContextConfig(), 0)
