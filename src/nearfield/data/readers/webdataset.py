"""WebDataset shards: tar files, read from front to back and never unpacked to disk."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from nearfield.data.pictures import ImageRef
from nearfield.data.readers.base import Row, excerpt, files_at, hash_files, open_bytes
from nearfield.errors import BadInputError

SUFFIXES = tuple(f".tar{packed}" for packed in ("", ".gz", ".xz", ".zst"))
PICTURES = frozenset({"png", "jpg", "jpeg", "webp", "gif", "bmp"})
MAX_PICTURE_BYTES = 256 << 20
MAX_TEXT_BYTES = 16 << 20
Sample = dict[str, bytes | str]
"""What the members of one key hold, by suffix; a string is the reason why a member was not read."""


class WebDataset:
    """The samples of one shard or of a folder of shards, in the order of names."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def inputs(self) -> dict[str, str]:
        return hash_files(files_at(self._path, SUFFIXES, "tar"))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        for file in files_at(self._path, SUFFIXES, "tar"):
            for number, (key, sample) in enumerate(samples(file), start=1):
                yield row_of(file.name, number, key, sample)


def samples(path: Path) -> Iterator[tuple[str, Sample]]:
    """(key, members by suffix) of a shard; members of one key stand side by side.

    Links, devices and folders are passed over: only plain files have content. Names are never used as paths.
    """
    with open_bytes(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|") as archive:
                open_key, sample = "", Sample()
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    stem, dot, suffix = base.partition(".")
                    if not member.isreg() or not dot or not stem:
                        continue
                    key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
                    if key != open_key:
                        if sample:
                            yield open_key, sample
                        open_key, sample = key, {}
                    if suffix in PICTURES or suffix in ("txt", "json", "cls"):
                        sample[suffix] = "stands twice" if suffix in sample else _content(archive, member, suffix)
                if sample:
                    yield open_key, sample
        except (tarfile.TarError, EOFError) as error:
            raise BadInputError(
                f"this tar file is broken or cut short ({error})", where=str(path), hint="Fetch or write it again."
            ) from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> bytes | str:
    limit = MAX_PICTURE_BYTES if suffix in PICTURES else MAX_TEXT_BYTES
    if member.size > limit:
        return f"is over {limit:,} bytes"
    opened = archive.extractfile(member)
    data = b"" if opened is None else opened.read()
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def row_of(file: str, number: int, key: str, sample: Sample) -> Row:
    """A sample as a row, or the reason why it is none."""
    for suffix, data in sample.items():
        if isinstance(data, str):
            return Row(file, number, None, f"the member .{suffix} {data}", excerpt(key))
    pictures = [suffix for suffix in sample if suffix in PICTURES]
    if len(pictures) > 1:
        return Row(file, number, None, "several pictures", excerpt(key))
    values: dict[str, object] = {}
    texts: dict[str, str] = {}
    for suffix, data in sample.items():
        if isinstance(data, bytes) and suffix not in PICTURES:
            try:
                texts[suffix] = data.decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                return Row(file, number, None, f"the member .{suffix} is not UTF-8", excerpt(key))
    if "json" in texts:
        try:
            found = json.loads(texts["json"])
        except (ValueError, RecursionError):
            return Row(file, number, None, "the member .json is not valid JSON", excerpt(texts["json"]))
        if not isinstance(found, dict):
            return Row(file, number, None, "the member .json is not a JSON object", excerpt(texts["json"]))
        values |= found
    values["key"] = key
    if "txt" in texts:
        values["text"] = texts["txt"]
    if "cls" in texts:
        values["cls"] = texts["cls"]
    image = sample[pictures[0]] if pictures else None
    values["image"] = ImageRef(f"{key}.{pictures[0]}", image) if isinstance(image, bytes) else None
    return Row(file, number, values)
