"""Images in the store: hostile files, what is kept of good ones, and that stores of texts stay as they were."""

from __future__ import annotations

import builtins
import io
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from nearfield.data import DataSummary, Store, build_data
from nearfield.data.build import data_fingerprint
from nearfield.data.config import ImagesConfig
from nearfield.data.images import ImageError, ImageRef, decode, encode, open_kept
from nearfield.data.items import item_id
from nearfield.errors import BadInputError
from tests.data.image_making import chunk, noise, png_header, saved
from tests.data.making import config, source, write_rows

PNG = saved(noise(0))
JPEG = saved(noise(1, 64, 64), "JPEG")
RULES = ImagesConfig()


def with_text(png: bytes, size: int) -> bytes:
    """A PNG with a packed comment that becomes large when it is read."""
    packed = zlib.compress(bytes(size), 9)
    return png[:33] + chunk(b"zTXt", b"Comment\0\0" + packed) + chunk(b"iCCP", b"x\0\0" + packed) + png[33:]


def pixels(image: Image.Image | None) -> np.ndarray[Any, Any]:
    assert image is not None
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (PNG[: len(PNG) // 2], "broken or cut short"),
        (PNG[:-30], "broken or cut short"),
        (JPEG[: len(JPEG) // 2], "broken or cut short"),
        (JPEG[:10], "broken or cut short"),
        (PNG[:40] + bytes(len(PNG) - 40), "not a png, jpeg, webp, gif, bmp image"),
        (png_header(50_000, 50_000), "over 67,108,864 pixels"),
        (png_header(9_000, 9_000), "over 67,108,864 pixels"),
        (png_header(100, 100), "broken or cut short"),
        (with_text(PNG, 80 << 20), "broken or cut short"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "not a png, jpeg, webp"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not a png, jpeg, webp"),
        (b"\x00" * 64, "not a png, jpeg, webp"),
        (saved(noise(2), "TIFF"), "not a png, jpeg, webp"),
        (b"%PDF-1.4\n", "not a png, jpeg, webp"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a png, jpeg, webp"),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_hostile_bytes_are_refused(raw: bytes, reason: str, lenient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another library let Pillow accept files that are cut short."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    with pytest.raises(ImageError, match=reason):
        decode(raw, RULES)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="over 9 pixels"):
        decode(PNG, ImagesConfig(max_pixels=9))


@pytest.mark.parametrize("seed", range(40))
def test_spoilt_bytes_give_a_image_or_a_reason(seed: int) -> None:
    random = np.random.default_rng(seed)
    for good in (PNG, JPEG, saved(noise(3), "GIF"), saved(noise(4), "WEBP"), saved(noise(5), "BMP")):
        raw = bytearray(good)
        for place in random.integers(0, len(raw), 6):
            raw[place] = random.integers(0, 256)
        try:
            assert decode(bytes(raw), ImagesConfig(max_pixels=10_000)).image.mode == "RGB"
        except ImageError:
            continue


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP"])
def test_lossless_files_keep_their_pixels(kind: str) -> None:
    image = noise(6).quantize(16) if kind == "GIF" else noise(6)
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(saved(image, kind, **options), RULES)
    np.testing.assert_array_equal(pixels(decoded.image), pixels(image.convert("RGB")))
    assert decoded.original == (12, 8)


@pytest.mark.parametrize("quality", [None, 90])
def test_what_is_kept_is_what_was_decoded(quality: int | None) -> None:
    again = open_kept(encode(noise(7), quality))
    if quality is None:
        np.testing.assert_array_equal(pixels(again), pixels(noise(7)))
    else:
        assert again.size == (12, 8)


def test_transparent_is_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 128))
    for raw in (saved(clear), saved(clear, "WEBP", lossless=True, exact=True)):
        found = pixels(decode(raw, RULES).image)
        assert found[0, 0].tolist() == [255, 0, 0]
        assert abs(found[0, 1] - 127).max() <= 1
        assert (found[1:] == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 255, 9, 9, 9])
    palette.putpixel((0, 0), 0)
    found = pixels(decode(saved(palette, transparency=1), RULES).image)
    assert found[0, 0].tolist() == [0, 0, 255]
    assert (found[1:] == 255).all()
    grey = Image.merge("LA", [Image.new("L", (4, 4), 10), Image.new("L", (4, 4), 0)])
    assert (pixels(decode(saved(grey), RULES).image) == 255).all()


def test_other_modes() -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = pixels(decode(saved(ink, "JPEG", quality=100), RULES).image)
    assert (abs(red - np.asarray([255, 0, 0])) < 12).all()
    deep = Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))
    assert (pixels(decode(saved(deep), RULES).image) == 40_000 >> 8).all()
    assert (pixels(decode(saved(Image.new("1", (4, 4), 1)), RULES).image) == 255).all()


def test_exif_says_what_is_up() -> None:
    image = noise(8, 12, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode(saved(image, exif=exif), RULES)
    np.testing.assert_array_equal(pixels(decoded.image), np.rot90(pixels(image), -1))
    assert decoded.original == (8, 12)
    turned = decode(saved(image.quantize(200), exif=exif), RULES)
    assert turned.image.size == (8, 12)
    assert decode(saved(image, exif=b"Exif\0\0broken"), RULES).image.size == (12, 8)


def test_the_longer_side_is_bounded() -> None:
    decoded = decode(saved(noise(9, 400, 100), "JPEG"), ImagesConfig(max_side=40))
    assert decoded.image.size == (40, 10)
    assert decoded.original == (400, 100)
    assert decode(saved(noise(9, 3000, 2)), ImagesConfig(max_side=40)).image.size == (40, 1)
    assert decode(PNG, ImagesConfig(max_side=12)).image.size == (12, 8)


def test_animated_images() -> None:
    moving = saved(noise(10).quantize(8), "GIF", save_all=True, append_images=[noise(11).quantize(8)])
    np.testing.assert_array_equal(pixels(decode(moving, RULES).image), pixels(noise(10).quantize(8).convert("RGB")))
    with pytest.raises(ImageError, match="animated"):
        decode(moving, ImagesConfig(animated="refuse"))
    with pytest.raises(ImageError, match="not a png image"):
        decode(moving, ImagesConfig(formats=("png",)))


def test_paths_stay_in_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "good.png").write_bytes(PNG)
    (folder / "empty.png").write_bytes(b"")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "fine.png").symlink_to(folder / "good.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    assert ImageRef("x", None, "fine.png", folder).read(10_000) == PNG
    for path, reason in {
        "../secret.png": "leaves its folder",
        str(tmp_path / "secret.png"): "leaves its folder",
        "link.png": "leaves its folder",
        "loop.png": "cannot be read",
        "pipe.png": "no file",
        ".": "no file",
        "none.png": "a missing file",
        "a\0b.png": "cannot be read",
        "x" * 5000: "cannot be read",
        "empty.png": "an empty file",
    }.items():
        with pytest.raises(ImageError, match=reason):
            ImageRef("x", None, path, folder).read(10_000)
    with pytest.raises(ImageError, match="over 10 bytes"):
        ImageRef("x", None, "good.png", folder).read(10)


def built(folder: Path, rows: list[dict[str, object]], images: dict[str, object], **changes: Any) -> DataSummary:
    path = write_rows(folder / "rows.jsonl", rows)
    examples = {"kind": "retrieval", "query": "photo", "positives": "text"}
    settings = {"examples": examples, "task_type": "Any2AnyRetrieval", "images": images} | changes
    return build_data(config(source(path, **settings), max_bad_rows=0.9), folder / "store")


def test_images_in_a_store(tmp_path: Path) -> None:
    raws = [saved(noise(seed)) for seed in range(3)]
    for number, raw in enumerate(raws):
        (tmp_path / f"{number}.png").write_bytes(raw)
    (tmp_path / "again.png").write_bytes(saved(noise(0), compress_level=0))
    rows: list[dict[str, object]] = [
        {"photo": "0.png", "text": "zero", "title": "t"},
        {"photo": "1.png", "text": "one", "title": ""},
        {"photo": "2.png", "text": "two", "title": "t"},
        {"photo": "0.png", "text": "nought", "title": "t"},
        {"photo": "again.png", "text": "again", "title": "t"},
        {"photo": "9.png", "text": "nine", "title": "t"},
        {"photo": "../up.png", "text": "ten", "title": "t"},
        {"photo": "", "text": "eleven", "title": "t"},
    ]
    join = {"both": {"text": "title", "image": "photo"}}
    examples = {"kind": "retrieval", "query": "photo", "positives": ["text", "both"]}
    summary = built(tmp_path, rows, {"columns": ["photo"], "join": join}, examples=examples)
    assert summary.sources[0].quarantined == {
        "'photo' has an image that cannot be used: a missing file": 1,
        "'photo' has an image that cannot be used: a path that leaves its folder": 1,
        "'photo' is null": 1,
    }
    store = Store.open(tmp_path / "store")
    assert store.has_images
    assert store.items.column_names == ["id", "text", "image"]
    queries = store.examples["query"].to_pylist()
    assert len(set(queries)) == 4, "one item a file; the same file is the same item"
    ids = [store.items["id"][row].as_py() for row in queries[:3]]
    assert ids == [item_id("image", (("image", raw),)) for raw in raws]
    assert store.image_table.num_rows == 3, "an image that is packed otherwise has the same pixels"
    assert store.texts(queries[:2]) == ["", ""]
    for seed, image in enumerate(store.images(queries[:3])):
        np.testing.assert_array_equal(pixels(image), pixels(noise(seed)))
    first = store.examples["positives"][0].as_py()
    assert store.modalities([queries[0], *first]) == ["image", "text", "text+image"]
    assert store.texts(first) == ["zero", "t"]
    assert store.images(first)[0] is None
    np.testing.assert_array_equal(pixels(store.images(first)[1]), pixels(noise(0)))
    fields = (("text", b"t"), ("image", raws[0]))
    assert store.items["id"][first[1]].as_py() == item_id("text+image", fields)
    second = store.examples["positives"][1].as_py()
    assert store.modalities(second) == ["text", "image"], "without a title the item is the image alone"
    assert second[1] == queries[1]
    assert store.image_sizes([queries[0], first[0]]).tolist() == [[12, 8], [0, 0]]
    assert store.shown([queries[0], *first]) == ["[image 12x8]", "zero", "[image 12x8] t"]


def test_images_as_bytes_are_made_smaller(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = saved(noise(3, 100, 50))
    table = {"photo": [{"bytes": raw, "path": None}, {"bytes": b"no", "path": None}], "text": ["a", "b"]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    recipe = config(
        source(
            tmp_path,
            reader={"kind": "parquet", "path": str(tmp_path / "rows.parquet")},
            examples={"kind": "retrieval", "query": "text", "positives": "photo"},
            images={"columns": ["photo"], "max_side": 20},
        ),
        max_bad_rows=0.5,
    )
    summary = build_data(recipe, tmp_path / "store")
    assert sum(summary.sources[0].quarantined.values()) == 1
    entry = json.loads((tmp_path / "store" / "quarantine.jsonl").read_text())
    assert entry["excerpt"] == "<image of 2 bytes>"
    store = Store.open(tmp_path / "store")
    (row,) = store.examples["positives"][0].as_py()
    assert store.image_sizes([row]).tolist() == [[20, 10]]
    assert store.original_sizes([row]).tolist() == [[100, 50]]


def test_the_same_build_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(PNG)
    rows: list[dict[str, object]] = [{"photo": "0.png", "text": "zero"}]
    built(tmp_path, rows, {"columns": ["photo"]})
    files = ("items.arrow", "images.arrow", "examples.arrow")
    before = [(tmp_path / "store" / name).read_bytes() for name in files]
    built(tmp_path, rows, {"columns": ["photo"]})
    assert [(tmp_path / "store" / name).read_bytes() for name in files] == before


def test_the_fingerprint_has_the_images_in_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"photo": "0.png", "text": "zero"}])

    def mark(**images: object) -> str:
        examples = {"kind": "retrieval", "query": "photo", "positives": "text"}
        return data_fingerprint(config(source(path, examples=examples, images={"columns": ["photo"]} | images)))

    missing = mark()
    (tmp_path / "0.png").write_bytes(PNG)
    there = mark()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0.png").write_bytes(PNG)
    assert mark(folder=str(tmp_path / "other")) == there
    (tmp_path / "0.png").write_bytes(JPEG)
    assert len({missing, there, mark(), mark(max_side=100)}) == 4


def test_stores_of_texts_know_nothing_of_images(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"query": "a", "positives": "b", "negatives": None}])
    build_data(config(source(path)), tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert not store.has_images
    assert store.items.column_names == ["id", "text"]
    assert not (tmp_path / "store" / "images.arrow").exists()
    assert store.images([0, 1]) == [None, None]
    assert store.image_sizes([1, 0]).tolist() == [[0, 0], [0, 0]]
    assert store.modalities([0]) == ["text"]
    assert store.shown([0]) == ["a"]


def test_without_pillow_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.png").write_bytes(PNG)
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "PIL":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(BadInputError, match="need Pillow") as error:
        built(tmp_path, [{"photo": "0.png", "text": "zero"}], {"columns": ["photo"]})
    assert "nearfield[image]" in str(error.value)


def test_a_image_where_nobody_asked_for_one(tmp_path: Path) -> None:
    """A reader of texts hands bytes on as they are: a bad row, as before."""
    assert Image.open(io.BytesIO(PNG)).size == (12, 8)
    with pytest.raises(BadInputError, match="1 of 1 rows cannot be used"):
        built(tmp_path, [{"photo": 7, "text": "zero"}], {"columns": []})
