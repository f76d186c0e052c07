"""The embedded emoji: what is shipped, and the recipe that reads it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from nearfield.data import DataConfig, Store, build_data
from nearfield.errors import BadInputError
from nearfield.methods.emoji import COLUMNS, FOLDER, LANGUAGES, EmojiReader

RECIPE = Path(__file__).parents[2] / "data_recipes" / "emoji.yaml"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("emoji") / "store"
    summary = build_data(DataConfig.load(RECIPE), out)
    assert not summary.sources[0].quarantined
    return Store.open(out)


def test_the_files_are_those_of_the_sums() -> None:
    lines = (FOLDER / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        value, _, name = line.partition("  ")
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == value
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2_100_000
    assert "SIL OPEN FONT LICENSE Version 1.1" in (FOLDER / "LICENSE-OFL-1.1").read_text()
    assert "COPYRIGHT AND PERMISSION NOTICE" in (FOLDER / "LICENSE-Unicode-DFS-2016").read_text()


def test_the_store_of_the_recipe(store: Store) -> None:
    assert {split: len(store.select("emoji", split)) for split in ("train", "validation", "test")} == {
        "train": 1486,
        "validation": 146,
        "test": 214,
    }
    assert store.image_table.num_rows == 1846
    queries = store.examples["query"].to_numpy()
    assert set(store.modalities(queries)) == {"image"}
    assert (store.image_sizes(queries) == 64).all()
    split_of: dict[str, set[str]] = defaultdict(set)
    for group, split in zip(store.examples["group"].to_pylist(), store.examples["split"].to_pylist(), strict=True):
        split_of[group].add(split)
    assert max(map(len, split_of.values())) == 1
    names = store.texts([positives[0] for positives in store.examples["positives"].to_pylist()])
    assert len(set(names)) == 1846
    heart = names.index("red heart")
    (image,) = store.images(queries[heart : heart + 1])
    assert image is not None
    middle = np.asarray(image).astype(int)[24:40, 24:40].mean(axis=(0, 1))
    assert middle[0] > middle[1] + 80
    assert middle[0] > middle[2] + 80
    assert np.asarray(image)[0, 0].tolist() == pytest.approx([255, 255, 255], abs=3)


def test_languages_and_flags() -> None:
    def count(**settings: object) -> int:
        return sum(1 for _ in EmojiReader(**settings).rows(("image", "name")))  # type: ignore[arg-type]

    assert count(flags="only") == 253
    assert count(flags="none") == 1846 - 253
    assert count(languages=("de", "ja")) == 2 * 1846
    rows = [row.values for row in EmojiReader(languages=LANGUAGES).rows(COLUMNS)]
    assert all(row is not None and row["name"] for row in rows)
    found = {str(row["language"]): row["name"] for row in rows if row is not None and row["code"] == "1f436"}
    assert found["en"] == "dog face"
    assert found["de"] == "Hundegesicht"
    dog = next(row for row in rows if row is not None and row["code"] == "1f436")
    assert dog["caption"] == "dog face: dog, face, pet"
    assert dog["keywords"] == ["dog", "face", "pet"]
    assert (dog["category"], dog["subcategory"]) == ("Animals & Nature", "animal-mammal")
    categories = Counter(str(row["category"]) for row in rows if row is not None and row["language"] == "en")
    assert len(categories) == 10 and categories["Flags"] == 261 and sum(categories.values()) == 1846


def test_variants_are_in_the_same_splits(store: Store, tmp_path: Path) -> None:
    config = DataConfig.load(RECIPE.parent / "emoji-variants.yaml")
    assert len(config.sources) == 11 and len({source.name for source in config.sources}) == 11
    few = config.model_copy(update={"sources": tuple(s for s in config.sources if s.name in ("categories", "chinese"))})
    build_data(few, tmp_path / "store")
    other = Store.open(tmp_path / "store")

    def split_of(found: Store, source: str) -> dict[str, str]:
        rows = found.examples.take(
            np.concatenate([found.select(source, split) for split in ("train", "validation", "test")])
        )
        return dict(zip(rows["cluster"].to_pylist(), rows["split"].to_pylist(), strict=True))

    expected = split_of(store, "emoji")
    assert len(expected) == 1846
    assert split_of(other, "categories") == split_of(other, "chinese") == expected


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(BadInputError, match="no column 'title'"):
        list(EmojiReader().rows(("title",)))
