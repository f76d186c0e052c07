"""A teacher's vectors of a store's items, on disk, memory-mapped: float32 rows of length 1, by role and item row.

The vectors come from a callable that is handed in, so that this module needs no model. They are made in shards, each a file:
a build that was stopped goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nearfield.checksums import CheckedFile, Sealed, seal
from nearfield.console import track
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, hash_file, read_json, write_json

logger = logging.getLogger("nearfield.data")

Rows = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
EncodeItems = Callable[[str, Rows], npt.NDArray[Any]]
"""(role, item rows) -> vectors [n, d] of any length."""

VERSION = 2
ROLES = ("query", "document")
SHARD = 8_192


@dataclass(frozen=True)
class VectorTable:
    """The vectors of the items of some roles."""

    rows: Rows
    """Item rows, rising."""
    vectors: Vectors
    """[n, d], mapped. Read by :meth:`take`, which checks what it reads."""
    file: CheckedFile | None = None

    def take(self, positions: Rows) -> Vectors:
        """The vectors [n, d] at some places of this table: a view of the map where they lie side by side, else a copy."""
        if len(positions) and (np.diff(positions) == 1).all():
            start, stop = int(positions[0]), int(positions[-1]) + 1
            self.check(np.array([start]), np.array([stop]))
            return self.vectors[start:stop]
        self.check(positions, positions + 1)
        return np.asarray(self.vectors[positions], dtype=np.float32).reshape(len(positions), self.vectors.shape[1])

    def check(self, starts: Rows, stops: Rows) -> None:
        """Check rows from each start to each stop before they are read from the map."""
        if self.file is not None and len(starts):
            width = self.vectors.shape[1] * self.vectors.itemsize
            header = self.file.size - self.vectors.shape[0] * width
            self.file.check(0, header)
            self.file.check_ranges(header + starts * width, header + stops * width)

    def positions(self, rows: Rows) -> Rows:
        """Where items stand in this table; an item that is not there is an error of the caller."""
        rows = np.asarray(rows, dtype=np.int64)
        positions = np.searchsorted(self.rows, rows)
        if len(rows) and (positions.max() >= len(self.rows) or not np.array_equal(self.rows[positions], rows)):
            raise KeyError("items that were not encoded in this role")
        return positions.astype(np.int64)


class ItemVectors:
    """Opened vectors."""

    def __init__(self, path: Path, meta: Mapping[str, Any], tables: Mapping[str, VectorTable]) -> None:
        self.path = path
        self.fingerprint: str = meta["fingerprint"]
        self.dimension: int = meta["dimension"]
        self.about: dict[str, Any] = meta["about"]
        self.tables = dict(tables)

    @classmethod
    def open(cls, path: str | Path) -> ItemVectors:
        """Open a folder of vectors; raise :class:`BadInputError` where there is none or it is of another version."""
        path = Path(path)
        sealed = Sealed(path, "Run the same command again: it encodes anew what is damaged.")
        if sealed.known:
            sealed.file("meta.json", whole=True)
        meta = read_json(path / "meta.json", "folder of vectors")
        version = meta.get("version") if isinstance(meta, dict) else None
        if version != VERSION:
            raise BadInputError(
                f"these vectors have version {version}; {VERSION} is wanted", where=str(path), hint="Delete the folder."
            )
        tables: dict[str, VectorTable] = {}
        for number, roles in enumerate(meta["tables"]):
            file = sealed.file(f"table-{number}.vectors.npy") if sealed.known else None
            if file is not None:
                sealed.file(f"table-{number}.rows.npy", whole=True)
                file.check(0, 1)  # its header
            try:
                rows = np.load(path / f"table-{number}.rows.npy", mmap_mode="r", allow_pickle=False)
                vectors = np.load(path / f"table-{number}.vectors.npy", mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise BadInputError(
                    f"these vectors cannot be read ({error})", where=str(path), hint="Delete the folder."
                ) from error
            tables |= {role: VectorTable(rows, vectors, file) for role in roles}
        return cls(path, meta, tables)

    def table(self, role: str) -> VectorTable:
        """The table of a role."""
        if role not in self.tables:
            raise KeyError(f"no vectors of the role {role!r}; there are {', '.join(self.tables)}")
        return self.tables[role]

    def of(self, role: str, item_rows: Rows) -> Vectors:
        """The unit vectors [n, d] of items in a role, in the order asked for.

        A view of the map where the items lie side by side in it, else a copy.
        """
        table = self.table(role)
        return table.take(table.positions(item_rows))


def build_vectors(
    wanted: Mapping[str, Rows],
    encode: EncodeItems,
    out: Path,
    fingerprint: str,
    about: Mapping[str, Any] | None = None,
    *,
    shared: bool = False,
    shard: int = SHARD,
    divide: Callable[[Callable[[int], None]], None] | None = None,
    zeros: bool = False,
) -> ItemVectors:
    """Encode the wanted item rows of each role into the folder ``out``.

    ``divide`` is called with a function that encodes the first of so many shares of the shards; it returns once others have
    called :func:`encode_share` for the rest.

    ``shared`` says that a vector does not depend on the role: then each item is encoded once. ``about`` is kept in
    ``meta.json``. Vectors are brought to length 1; one that is not finite, or is zero unless ``zeros`` may be, is an error that
    names its item.
    """
    tables = _tables(wanted, shared)
    parts, plan = _parts(out), _plan(tables, fingerprint, shard)
    if not _begun(parts, plan):
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        write_json(parts / "plan.json", plan)
    if divide is not None:
        divide(lambda ranks: _encode(tables, encode, parts, shard, (0, ranks), zeros))
    _drop_damaged(parts)
    # All of it, or what others were asked for and could not put here.
    _encode(tables, encode, parts, shard, (0, 1), zeros)
    dimension = 0
    with atomic_path(out) as aside:
        aside.mkdir()
        for number, (_, rows) in enumerate(tables):
            files = [parts / f"{number}-{start}.npy" for start in range(0, len(rows), shard)]
            shards = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
            widths = {part.shape[1] for part in shards} | ({dimension} if dimension else set())
            if len(widths) > 1:
                raise BadInputError(f"the teacher gave vectors of {sorted(widths)} dimensions")
            dimension = widths.pop() if widths else dimension
            np.save(aside / f"table-{number}.rows.npy", rows)
            target = aside / f"table-{number}.vectors.npy"
            if not len(rows):
                np.save(target, np.empty((0, dimension), dtype=np.float32))
                continue
            written = np.lib.format.open_memmap(target, mode="w+", dtype=np.float32, shape=(len(rows), dimension))
            for start, part in zip(range(0, len(rows), shard), shards, strict=True):
                written[start : start + shard] = part
            written.flush()
        meta = {
            "version": VERSION,
            "fingerprint": fingerprint,
            "dimension": dimension,
            "tables": [list(roles) for roles, _ in tables],
            "items": [len(rows) for _, rows in tables],
            "about": dict(about or {}),
        }
        write_json(aside / "meta.json", meta)
        seal(aside)
    shutil.rmtree(parts, ignore_errors=True)
    return ItemVectors.open(out)


def encode_share(
    wanted: Mapping[str, Rows],
    encode: EncodeItems,
    out: Path,
    fingerprint: str,
    *,
    share: tuple[int, int],
    shared: bool = False,
    shard: int = SHARD,
    zeros: bool = False,
) -> None:
    """Encode every n-th shard, from the m-th on, for a :func:`build_vectors` of another process; ``share`` is (m, n).

    Does nothing where that build has left no sign in the folder, as on a machine that does not share its file system.
    """
    tables = _tables(wanted, shared)
    if _begun(_parts(out), _plan(tables, fingerprint, shard)):
        _encode(tables, encode, _parts(out), shard, share, zeros)


def _tables(wanted: Mapping[str, Rows], shared: bool) -> list[tuple[Sequence[str], Rows]]:
    if shared:
        return [(sorted(wanted), np.unique(np.concatenate(list(wanted.values()))))]
    return [((role,), np.unique(rows)) for role, rows in sorted(wanted.items())]


def _parts(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def _plan(tables: Sequence[tuple[Sequence[str], Rows]], fingerprint: str, shard: int) -> dict[str, Any]:
    return {"version": VERSION, "fingerprint": fingerprint, "shard": shard, "items": [len(rows) for _, rows in tables]}


def _begun(parts: Path, plan: dict[str, Any]) -> bool:
    return (parts / "plan.json").is_file() and read_json(parts / "plan.json") == plan


def _encode(
    tables: Sequence[tuple[Sequence[str], Rows]],
    encode: EncodeItems,
    parts: Path,
    shard: int,
    share: tuple[int, int],
    zeros: bool,
) -> None:
    """Make the shards of a share that are not there yet."""
    pieces = [(n, start) for n, (_, rows) in enumerate(tables) for start in range(0, len(rows), shard)]
    missing = [piece for piece in pieces[share[0] :: share[1]] if not (parts / f"{piece[0]}-{piece[1]}.npy").is_file()]
    total = sum(min(shard, len(tables[number][1]) - start) for number, start in missing)
    for number, start in track(missing, f"Encoding {total:,} items in shards of {shard:,}"):
        roles, rows = tables[number]
        chosen = rows[start : start + shard]
        vectors = unit(np.asarray(encode(roles[0], chosen)), chosen, zeros=zeros)
        with atomic_path(parts / f"{number}-{start}.npy") as aside, aside.open("wb") as stream:
            np.save(stream, vectors)
            stream.flush()
            # Behind the array, where its readers do not look: a shard may wait for long until a build goes on.
            stream.write(bytes.fromhex(hash_file(aside)))


def _drop_damaged(parts: Path) -> None:
    """Remove the shards of a build that do not have their checksum: they are encoded anew."""
    for file in parts.glob("*.npy"):
        content = file.read_bytes()
        if hashlib.blake2b(content[:-16], digest_size=16).digest() != content[-16:]:
            logger.warning("%s is damaged, and its items are encoded again", file)
            file.unlink()


def unit(vectors: npt.NDArray[Any], item_rows: Rows, *, zeros: bool = False) -> Vectors:
    """Vectors [n, d] brought to length 1, as float32; raise :class:`BadInputError` where one has no direction, unless ``zeros``
    may stay what they are."""
    if vectors.ndim != 2 or len(vectors) != len(item_rows):
        raise BadInputError(f"the teacher gave an array of shape {vectors.shape} for {len(item_rows):,} items")
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if zeros:
        lengths[lengths == 0] = 1
    wrong = ~np.isfinite(lengths) | (lengths == 0)
    if wrong.any():
        row = int(item_rows[np.flatnonzero(wrong)[0]])
        counted = "" if wrong.sum() == 1 else f" (as {int(wrong.sum()):,} of {len(wrong):,} are)"
        raise BadInputError(
            f"the teacher's vector of item {row} is zero or not finite{counted}",
            hint="`nearfield data show` prints the item's text; is the teacher in order?",
        )
    scaled: Vectors = (vectors / lengths[:, None]).astype(np.float32)
    return scaled
