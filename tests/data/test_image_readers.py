"""Readers of images: folders, WebDataset shards, MMEB's format, triplets, and Open Clipart."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfield.data import DataConfig, Row, Store, build_data
from nearfield.data.build import data_fingerprint
from nearfield.data.images import (
    BothRef,
    CaptionTable,
    ImageFolderReader,
    ImageRef,
    ImageTripletsReader,
    MmebReader,
    WebDatasetReader,
    item_of,
)
from nearfield.errors import BadInputError
from nearfield.methods import openclipart
from nearfield.methods.openclipart import OpenClipartReader, title_and_tags
from tests.data.image_making import noise, saved
from tests.data.making import config, source, write_rows

PNG = saved(noise(0))
COLUMNS = ("image", "text")


def good(rows: list[Row]) -> list[dict[str, Any]]:
    return [dict(row.values) for row in rows if row.values is not None]


def reasons(rows: list[Row]) -> list[str]:
    return [row.reason for row in rows if row.values is None]


def test_a_folder_of_images_with_texts_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "cats").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("a secret")
    (folder / "cats" / "a.png").write_bytes(PNG)
    (folder / "cats" / "a.txt").write_text("a cat\n\nanother cat\n")
    for name in ("b.JPG", "c.png", "d.png", "e.png"):
        (folder / name).write_bytes(PNG)
    (folder / "b.txt").write_text("\ufeffa dog", encoding="utf-8")
    (folder / "c.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "d.txt").write_bytes(b"caf\xe9")
    (folder / "notes.md").write_text("not read")
    rows = list(ImageFolderReader(path=folder).rows(COLUMNS))
    assert [(row["file"], row["text"], row["texts"], row["folder"]) for row in good(rows)] == [
        ("b.JPG", "a dog", ["a dog"], None),
        ("cats/a.png", "a cat\n\nanother cat", ["a cat", "another cat"], "cats"),
    ]
    assert good(rows)[0]["image"].read(10_000) == PNG
    assert reasons(rows) == [
        "the caption is a path that leaves its folder",
        "not UTF-8",
        "the caption is a missing file",
    ]
    labelled = list(ImageFolderReader(path=folder).rows(("image", "folder")))
    assert [row["file"] for row in good(labelled)] == ["b.JPG", "c.png", "cats/a.png", "e.png"]
    before = ImageFolderReader(path=folder).inputs()
    (folder / "b.txt").write_text("a wolf")
    assert ImageFolderReader(path=folder).inputs() != before
    with pytest.raises(BadInputError, match="does not exist"):
        ImageFolderReader(path=tmp_path / "none").inputs()
    with pytest.raises(BadInputError, match="holds no images"):
        (tmp_path / "empty").mkdir()
        ImageFolderReader(path=tmp_path / "empty").inputs()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_of_captions(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.png").write_bytes(PNG)
    table = tmp_path / f"metadata.{kind}"
    if kind == "csv":
        table.write_text("file_name,caption\na.png,a cat\n../up.png,a bird\n")
    elif kind == "jsonl":
        write_rows(table, [{"file_name": "a.png", "caption": "a cat"}, {"file_name": "../up.png", "caption": "a bird"}])
    else:
        pq.write_table(pa.table({"file_name": ["a.png", "../up.png"], "caption": ["a cat", "a bird"]}), table)
    reader = {"kind": "image_folder", "path": str(tmp_path), "captions": str(table)}
    examples = {"kind": "retrieval", "query": "image", "positives": "caption"}
    recipe = config(source(reader=reader, examples=examples), max_bad_rows=0.5)
    summary = build_data(recipe, tmp_path / "store")
    assert list(summary.sources[0].quarantined) == [
        "'image' has an image that cannot be used: a path that leaves its folder"
    ]
    store = Store.open(tmp_path / "store")
    assert store.shown([0, 1]) == ["[image 12x8]", "a cat"]
    before = data_fingerprint(recipe)
    (tmp_path / "a.png").write_bytes(saved(noise(1)))
    assert data_fingerprint(recipe) != before
    assert (
        reasons(list(CaptionTable(path=table, image_folder=tmp_path, file_column="file").rows(())))
        if kind == "jsonl"
        else True
    )


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_shards(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a-000.tar",
        [
            ("000.png", PNG),
            ("000.txt", b"a cat\n"),
            ("000.json", b'{"caption": "cat", "key": "not this one", "size": [1, 2]}'),
            ("deep/001.jpg", saved(noise(1), "JPEG")),
            ("deep/001.cls", b"7"),
            ("002.json", b"{"),
            ("002.png", PNG),
            ("003.json", b"[1]"),
            ("004.txt", b"caf\xe9"),
            ("005.png", PNG),
            ("005.webp", saved(noise(2), "WEBP")),
            ("006.txt", b"no image"),
            ("007.png", PNG),
            ("007.png", PNG),
            ("../../escape.png", PNG),
            ("../../escape.txt", b"a name is no path"),
            ("README", b"passed over"),
            (".hidden", b"passed over"),
        ],
    )
    rows = list(WebDatasetReader(path=path).rows(COLUMNS))
    assert [(row["key"], row.get("text"), row.get("cls")) for row in good(rows)] == [
        ("000", "a cat", None),
        ("deep/001", None, "7"),
        ("006", "no image", None),
        ("../../escape", "a name is no path", None),
    ]
    assert good(rows)[0]["caption"] == "cat"
    assert good(rows)[0]["image"].read(10_000) == PNG
    assert good(rows)[2]["image"] is None
    assert reasons(rows) == [
        "the member .json is not valid JSON",
        "the member .json is not a JSON object",
        "the member .txt is not UTF-8",
        "several images",
        "the member .png appears twice",
    ]
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a-000.tar"]


def test_links_in_shards_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "000.png"), (tarfile.LNKTYPE, "000.txt"), (tarfile.FIFOTYPE, "000.json")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert list(WebDatasetReader(path=tmp_path / "a.tar").rows(())) == []


def test_broken_shards(tmp_path: Path) -> None:
    data = shard(tmp_path / "a.tar", [("000.png", PNG * 30), ("000.txt", b"a cat")]).read_bytes()
    whole = tmp_path / "whole.tar.gz"
    whole.write_bytes(gzip.compress(data))
    assert [row["text"] for row in good(list(WebDatasetReader(path=whole).rows(())))] == ["a cat"]
    for name, raw in {
        "cut.tar": data[:3000],
        "cut.tar.gz": gzip.compress(data)[:200],
        "no.tar": b"no tar" * 200,
    }.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(BadInputError, match="broken or cut short"):
            list(WebDatasetReader(path=tmp_path / name).rows(()))


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("nearfield.data.images.MAX_IMAGE_BYTES", 10)
    path = shard(tmp_path / "a.tar", [("000.png", PNG), ("001.txt", b"a cat")])
    rows = list(WebDatasetReader(path=path).rows(()))
    assert reasons(rows) == ["the member .png is over 10 bytes"]
    assert good(rows)[0]["text"] == "a cat"


IMAGE = ImageRef("a.png", None, "a.png", Path("x"))


@pytest.mark.parametrize(
    ("text", "image", "item"),
    [
        ("<|image_1|>\nFind a cat.", IMAGE, BothRef("<image>\nFind a cat.", IMAGE)),
        ("<image> Find a cat.", IMAGE, BothRef("<image> Find a cat.", IMAGE)),
        ("Find a cat.", IMAGE, BothRef("Find a cat.", IMAGE)),
        ("<|image_1|>\n", IMAGE, IMAGE),
        ("", IMAGE, IMAGE),
        (None, IMAGE, IMAGE),
        ("<|image_1|>\nFind a cat.", None, "Find a cat."),
        (" Find a cat. ", None, " Find a cat. "),
        ("<|image_1|>", None, None),
        ("", None, None),
        (None, None, None),
    ],
)
def test_marks_of_images(text: str | None, image: ImageRef | None, item: object) -> None:
    assert item_of(text, image, "qry") == item


def test_the_format_of_mmeb(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(saved(noise(number)))
    mark = "<|image_1|>\n"
    keys = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
    table: list[tuple[object, ...]] = [
        (f"{mark}What is it?", "0.png", "A cat.", "", "A dog.", ""),
        ("Find a bird.", "", f"{mark}An image of a bird.", "1.png", [mark, mark], ["0.png", "2.png"]),
        (f"{mark}Name it.", "2.png", "", "", "", ""),
        ("", "", "A cat.", "", "", ""),
        (f"{mark}{mark}Which?", "0.png", "A cat.", "", "", ""),
        ("Find.", "", ["a", "b"], ["0.png"], "", ""),
        (f"{mark}Gone.", "9.png", "A cat.", "", "", ""),
    ]
    path = write_rows(tmp_path / "rows.jsonl", [dict(zip(keys, row, strict=True)) for row in table])
    reader = {"kind": "mmeb", "path": str(path), "image_folder": str(tmp_path)}
    examples = {"kind": "retrieval", "query": "query", "positives": "positives", "negatives": "negatives"}
    recipe = config(source(reader=reader, examples=examples), max_bad_rows=0.8)
    summary = build_data(recipe, tmp_path / "store")
    assert summary.sources[0].quarantined == {
        "no positive": 1,
        "an empty query": 1,
        "'qry' has marks for several images": 1,
        "'pos_text' has 2 members and 'pos_image_path' has 1": 1,
        "'query' has an image that cannot be used: a missing file": 1,
    }
    store = Store.open(tmp_path / "store")
    first, second = store.examples.to_pylist()
    assert store.texts([first["query"], *first["positives"], *first["negatives"]]) == [
        "<image>\nWhat is it?",
        "A cat.",
        "A dog.",
    ]
    assert store.modalities([first["query"], *first["positives"]]) == ["text+image", "text"]
    assert store.texts([second["query"], *second["positives"]]) == ["Find a bird.", "<image>\nAn image of a bird."]
    assert store.modalities(second["negatives"]) == ["image", "image"]
    images = store.images(second["negatives"])
    for found, number in zip(images, (0, 2), strict=True):
        assert found is not None
        np.testing.assert_array_equal(np.asarray(found), np.asarray(noise(number)))
    assert "images" in MmebReader(path=path, image_folder=tmp_path).inputs()


def test_triplets(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(saved(noise(number)))
    path = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"q_img": "0.png", "q_text": ["in red", "but larger"], "t_img": "1.png", "hns": ["2.png", "3.png"]},
            {"q_img": "0.png", "q_text": [], "t_img": "1.png", "hns": []},
            {"q_img": "", "q_text": "in blue", "t_img": "1.png", "hns": None},
        ],
    )
    reader = {"kind": "image_triplets", "path": str(path), "image_folder": str(tmp_path)}
    examples = {"kind": "retrieval", "query": "query", "positives": "positives", "negatives": "negatives"}
    summary = build_data(config(source(reader=reader, examples=examples), max_bad_rows=0.5), tmp_path / "store")
    assert summary.sources[0].quarantined == {"no instruction in 'q_text'": 1, "no image in 'q_img'": 1}
    store = Store.open(tmp_path / "store")
    assert store.examples.num_rows == 2
    assert store.image_table.num_rows == 4
    for example, text in zip(store.examples.to_pylist(), ("in red", "but larger"), strict=True):
        assert store.shown([example["query"]]) == [f"[image 12x8] {text}"]
        assert store.modalities([*example["positives"], *example["negatives"]]) == ["image"] * 3
    without = ImageTripletsReader(path=path, image_folder=tmp_path, negative_images=None)
    assert good(list(without.rows(())))[0]["negatives"] == []


DRAWING = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:cc="http://web.resource.org/cc/"
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<metadata><rdf:RDF><cc:Work><dc:title>{title}</dc:title><dc:publisher><cc:Agent><dc:title>Library</dc:title></cc:Agent>
</dc:publisher><dc:subject><rdf:Bag>{tags}</rdf:Bag></dc:subject></cc:Work></rdf:RDF></metadata></svg>
"""


def test_drawings_with_title_and_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(root: Path, name: str, title: str, tags: list[str], raw: bytes = PNG) -> None:
        for kind in ("svg", "png"):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
        listed = "".join(f"<rdf:li>{tag}</rdf:li>" for tag in tags)
        (root / "svg" / f"{name}.svg").write_text(DRAWING.format(title=title, tags=listed))
        (root / "png" / f"{name}.png").write_bytes(raw)

    root = tmp_path / "usr/share/openclipart"
    draw(root, "animals/cat", " Sitting\n cat ", ["unsorted", "cat", "animal", "cat"], saved(noise(5, 500, 250)))
    draw(root, "animals/dog", "Dog", ["Dog", "unsorted"])
    draw(root, "animals/bird", "", ["bird"])
    draw(root, "food/pear", "Pear", ["fruit"], b"no image")
    draw(root, "food/apple", "Apple", ["fruit"])
    (root / "svg/food/broken.svg").write_text("<svg")
    (root / "svg/food/link.svg").symlink_to("apple.svg")
    assert title_and_tags(root / "svg/animals/cat.svg") == ("Sitting cat", ["cat", "animal"])
    openclipart.build(root, tmp_path / "openclipart.zip")
    rows = good(list(OpenClipartReader(cache=tmp_path).rows(("image", "caption"))))
    assert [(row["file"], row["caption"], row["folder"]) for row in rows] == [
        ("animals/cat", "Sitting cat: cat, animal", "animals"),
        ("food/apple", "Apple: fruit", "food"),
    ]
    assert len(OpenClipartReader(cache=tmp_path).inputs()) == 1
    (tmp_path / "openclipart.zip").write_bytes(b"PK broken")
    with pytest.raises(BadInputError, match="this file is broken"):
        list(OpenClipartReader(cache=tmp_path).rows(()))
    monkeypatch.setattr("nearfield.methods.on_demand.shutil.which", lambda name: None)
    with pytest.raises(BadInputError, match="there is no apt here"):
        OpenClipartReader(cache=tmp_path / "elsewhere").inputs()


def test_the_recipe_of_open_clipart() -> None:
    (source,) = DataConfig.load(Path(__file__).parents[2] / "data_recipes" / "openclipart.yaml").sources
    assert set(source.read_columns()) <= set(openclipart.COLUMNS)
    assert source.image_rules() is not None


def test_labels_of_images(tmp_path: Path) -> None:
    for label in ("cats", "dogs"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for number in range(2):
            raw = saved(noise(len(label) * 10 + number + (label == "dogs") * 7))
            (tmp_path / "in" / label / f"{number}.png").write_bytes(raw)
    reader = {"kind": "image_folder", "path": str(tmp_path / "in")}
    examples = {"kind": "labelled", "item": "image", "label": "folder"}
    summary = build_data(
        config(source(reader=reader, examples=examples, task_type="ImageClassification")), tmp_path / "store"
    )
    assert summary.examples == 4
    store = Store.open(tmp_path / "store")
    assert store.examples["label"].to_pylist() == ["cats", "cats", "dogs", "dogs"]
    assert (
        json.loads((tmp_path / "store" / "store.json").read_text())["sources"][0]["task_type"] == "ImageClassification"
    )


def test_images_of_a_hugging_face_data_set(tmp_path: Path) -> None:
    import datasets

    raw = saved(noise(9))
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": raw, "path": None}, {"bytes": b"no", "path": None}], "caption": ["a", "b"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    reader = {"kind": "hub", "path": str(tmp_path / "set")}
    examples = {"kind": "retrieval", "query": "image", "positives": "caption"}
    recipe = config(source(reader=reader, examples=examples, images={"columns": ["image"]}), max_bad_rows=0.5)
    summary = build_data(recipe, tmp_path / "store")
    assert sum(summary.sources[0].quarantined.values()) == 1
    (image,) = Store.open(tmp_path / "store").images([0])
    np.testing.assert_array_equal(np.asarray(image), np.asarray(noise(9)))
