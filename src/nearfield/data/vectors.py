"""The store of vectors: a folder of shards, each some keys and their vectors with checksums, found by key::

    about.json            version of this layout, and what the vectors are of
    SHARD/keys.npy        (n,) rising: item rows (int64), or the hex digits of a text's hash (S32)
    SHARD/vectors.npy     (n, d) float32, memory-mapped and checked as it is read
    SHARD/checksums.json  of the two; of a finished set of item vectors it lies in the folder above, for all shards

Shards are written aside and renamed, so several processes may add to a store at once, and one that was killed loses the shard in
hand alone. The vectors come from callables that are handed in: this module needs no model. Vectors that cannot be used, with rows that are not
finite, are refused here, by the name of their source.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nearfield.arrays import Index, Rows, Vectors
from nearfield.console import track
from nearfield.errors import BadInputError
from nearfield.files import CheckedFile, DamagedError, Sealed, atomic_path, read_json, seal, write_json

if TYPE_CHECKING:
    from nearfield.data.store import Store

logger = logging.getLogger("nearfield.data")

Keys = npt.NDArray[Any]
EncodeItems = Callable[[str, Rows], npt.NDArray[Any]]
"""(role, item rows) -> vectors [n, d] of any length."""

VERSION = 3
ROLES = ("query", "document")
SHARD = 8_192
KEEP_SECONDS = 20.0
"""How much of the encoding of a shard a kill may lose, where it comes in chunks."""
ABOUT, KEYS, VECTORS = "about.json", "keys.npy", "vectors.npy"
_SHOWN = 200


@dataclass(frozen=True)
class VectorTable:
    """Keys and their vectors, as one shard holds them."""

    keys: Keys
    """(n,), rising."""
    vectors: Vectors
    """[n, d], mapped. Read by :meth:`take`, which checks what it reads."""
    file: CheckedFile | None = None

    @staticmethod
    def write(folder: Path, keys: Keys, parts: Sequence[npt.NDArray[Any]]) -> None:
        """Write a table that a few arrays make up, one after the other, into a new folder; the keys must rise."""
        folder.mkdir()
        np.save(folder / KEYS, keys)
        shape = (len(keys), parts[0].shape[1] if parts else 0)
        # Not by a map of the file: on a disk that is full, writing to one ends the process without a word.
        with (folder / VECTORS).open("wb") as file:
            kind = np.lib.format.dtype_to_descr(np.dtype(np.float32))
            header = {"descr": kind, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in filter(len, parts):
                file.write(np.ascontiguousarray(part, dtype=np.float32).data)

    @classmethod
    def open(cls, sealed: Sealed, name: str = "") -> VectorTable:
        """Open the table in the folder ``name`` of a sealed one: its keys are checked now, its vectors as they are read.

        Raises :class:`DamagedError`, or :class:`ValueError` or :class:`OSError` where it was sealed so or has no checksums.
        """
        places = [str(Path(name) / part) for part in (KEYS, VECTORS)]
        file = None
        if sealed.known:
            sealed.file(places[0], whole=True)
            file = sealed.file(places[1])
            file.check(0, 1)  # its header
        keys = np.load(sealed.folder / places[0], mmap_mode="r", allow_pickle=False)
        vectors = np.load(sealed.folder / places[1], mmap_mode="r", allow_pickle=False)
        if keys.ndim != 1 or vectors.ndim != 2 or len(keys) != len(vectors):
            raise ValueError("its keys do not fit its vectors")
        return cls(keys, vectors, file)

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

    @cached_property
    def index(self) -> Index:
        """Where each key stands in this table."""
        return Index(self.keys, rising=True)

    def positions(self, keys: Keys) -> Rows:
        """Where keys stand in this table; one that is not there is an error of the caller."""
        return self.index.rows(keys, "items that were not encoded in this role")


def write_shard(folder: Path, keys: Keys, vectors: npt.NDArray[Any]) -> None:
    """Write keys, in any order, and their vectors into a folder with their checksums."""
    order = np.argsort(keys, kind="stable")
    with atomic_path(folder) as aside:
        VectorTable.write(aside, keys[order], [vectors[order]])
        seal(aside)


class VectorStore:
    """Shards of vectors that are added at any time. A shard that is damaged is removed: what it held is to be encoded again."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Opened when it is first read; the folder is made with the first shard, and ``about`` kept in it."""
        self.folder, self.about = folder, dict(about)
        self._shards: list[tuple[Path, VectorTable]] | None = None

    def has(self, name: str) -> bool:
        """Whether there is a shard of this name."""
        return (self.folder / name).is_dir()

    def append(self, keys: Keys, vectors: npt.NDArray[Any], name: str | None = None) -> None:
        """Add a shard. Readers that have opened the store already do not see it."""
        if not (self.folder / ABOUT).is_file():
            write_json(self.folder / ABOUT, self.about)
        write_shard(self.folder / (name or uuid.uuid4().hex), keys, vectors)

    def find(self, keys: Keys) -> Iterable[tuple[Rows, Vectors]]:
        """Those of some keys that are here, with their vectors, shard by shard; of a key in several shards the last is right."""
        if self._shards is None:
            folders = [file.parent for file in sorted(self.folder.glob(f"*/{KEYS}"))]
            self._shards = [
                (folder, table) for folder in folders if (table := self.open_shard(folder.name)) is not None
            ]
        for folder, table in list(self._shards):
            positions = table.index.find(keys)
            known = np.flatnonzero(positions >= 0)
            try:
                yield known, table.take(positions[known])
            except DamagedError as error:
                self._drop(folder, error)
                self._shards.remove((folder, table))

    def open_shard(self, name: str, *, whole: bool = False) -> VectorTable | None:
        """A shard, of which ``whole`` checks all vectors too; None for one that is damaged, which is removed then."""
        folder = self.folder / name
        try:
            sealed = Sealed(folder, "")
            if not sealed.known:
                raise ValueError("it has no checksums")
            table = VectorTable.open(sealed)
            if whole:
                sealed.check_all()
        except (DamagedError, OSError, ValueError, EOFError) as error:
            self._drop(folder, error)
            return None
        return table

    def _drop(self, folder: Path, error: Exception) -> None:
        reason = str(error).splitlines()[0]
        logger.warning("%s is damaged, and what it held is encoded again (%s)", folder, reason)
        shutil.rmtree(folder, ignore_errors=True)


class ItemVectors:
    """A finished set of vectors of a store's items, of length 1: one shard a role, or one for both."""

    def __init__(self, path: Path, about: Mapping[str, Any], tables: Mapping[str, VectorTable]) -> None:
        self.path = path
        self.fingerprint: str = about["fingerprint"]
        self.dimension: int = about["dimension"]
        self.about: dict[str, Any] = about["about"]
        self.tables = dict(tables)

    @classmethod
    def open(cls, path: str | Path) -> ItemVectors:
        """Open a folder of vectors; raise :class:`BadInputError` where there is none or it is of another version."""
        path = Path(path)
        sealed = Sealed(path, "Run the same command again: it encodes anew what is damaged.")
        if sealed.known:
            sealed.file(ABOUT, whole=True)
        about = read_json(path / ABOUT, "folder of vectors")
        version = about.get("version") if isinstance(about, dict) else None
        if version != VERSION:
            raise BadInputError(
                f"these vectors have version {version}; {VERSION} is wanted", where=str(path), hint="Delete the folder."
            )
        tables: dict[str, VectorTable] = {}
        for roles in about["tables"]:
            try:
                tables |= dict.fromkeys(roles, VectorTable.open(sealed, "+".join(roles)))
            except (OSError, ValueError) as error:
                raise BadInputError(
                    f"these vectors cannot be read ({error})", where=str(path), hint="Delete the folder."
                ) from error
        return cls(path, about, tables)

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


@dataclass(frozen=True)
class VectorJob:
    """Item rows to encode into one folder, in shards that several processes may share.

    Vectors are brought to length 1; one that is not finite, or is zero unless ``zeros`` may be, is an error that names its item.
    """

    wanted: Mapping[str, Rows]
    """Role -> item rows."""
    encode: EncodeItems
    out: Path
    fingerprint: str
    shared: bool = False
    """Whether a vector does not depend on the role: then each item is encoded once."""
    zeros: bool = False
    """Whether a vector of zeros says that an item has none, rather than that something is wrong."""
    shard: int = SHARD
    """Items of a shard."""

    def run(
        self,
        about: Mapping[str, Any] | None = None,
        divide: Callable[[Callable[[int], None]], None] | None = None,
    ) -> ItemVectors:
        """Encode all that is not there yet, and put the shards together.

        ``divide`` is called with a function that encodes the first of so many shares; it returns once others have done
        the rest (:meth:`do_share`). ``about`` is kept with the vectors.
        """
        tables, store = self._tables(), self._store()
        if not self._begun():
            for folder in (store.folder, self._pieces_folder):
                shutil.rmtree(folder, ignore_errors=True)
            store.folder.mkdir(parents=True)
            write_json(store.folder / ABOUT, store.about)
        if divide is not None:
            divide(lambda ranks: self._encode((0, ranks)))
        for folder in list(store.folder.iterdir()):
            if folder.is_dir():
                store.open_shard(folder.name, whole=True)
        # All of it, or what others were asked for and could not put here.
        self._encode((0, 1))
        shards = {number: self._shards_of(number) for number in range(len(tables))}
        widths = {part.shape[1] for parts in shards.values() for part in parts}
        if len(widths) > 1:
            raise BadInputError(f"the teacher gave vectors of {sorted(widths)} dimensions")
        dimension = widths.pop() if widths else 0
        with atomic_path(self.out) as aside:
            aside.mkdir()
            for number, (roles, rows) in enumerate(tables):
                parts = shards[number] or [np.empty((0, dimension), dtype=np.float32)]
                VectorTable.write(aside / "+".join(roles), rows, parts)
            described = {
                "version": VERSION,
                "fingerprint": self.fingerprint,
                "dimension": dimension,
                "tables": [list(roles) for roles, _ in tables],
                "items": [len(rows) for _, rows in tables],
                "about": dict(about or {}),
            }
            write_json(aside / ABOUT, described)
            seal(aside)
        for folder in (store.folder, self._pieces_folder):
            shutil.rmtree(folder, ignore_errors=True)
        return ItemVectors.open(self.out)

    def do_share(self, share: tuple[int, int]) -> None:
        """Encode every n-th shard, from the m-th on, for a :meth:`run` in another process; ``share`` is (m, n).

        Does nothing where that has left no sign in the folder, as on a machine that does not share its file system.
        """
        if self._begun():
            self._encode(share)

    def _tables(self) -> list[tuple[Sequence[str], Rows]]:
        if self.shared:
            return [(sorted(self.wanted), np.unique(np.concatenate(list(self.wanted.values()))))]
        return [((role,), np.unique(rows)) for role, rows in sorted(self.wanted.items())]

    def _store(self) -> VectorStore:
        """The shards that are made so far, beside the folder of the finished ones."""
        items = [len(rows) for _, rows in self._tables()]
        plan = {"version": VERSION, "fingerprint": self.fingerprint, "shard": self.shard, "items": items}
        return VectorStore(self.out.with_name(f"{self.out.name}.parts"), plan)

    def _begun(self) -> bool:
        store = self._store()
        return (store.folder / ABOUT).is_file() and read_json(store.folder / ABOUT) == store.about

    def _encode(self, share: tuple[int, int]) -> None:
        """Make the shards of a share that are not there yet."""
        tables, store = self._tables(), self._store()
        shards = [(n, start) for n, (_, rows) in enumerate(tables) for start in range(0, len(rows), self.shard)]
        missing = [shard for shard in shards[share[0] :: share[1]] if not store.has(_shard_name(*shard))]
        total = sum(min(self.shard, len(tables[number][1]) - start) for number, start in missing)
        for number, start in track(missing, f"Encoding {total:,} items in shards of {self.shard:,}"):
            roles, rows = tables[number]
            chosen = rows[start : start + self.shard]
            pieces = self._pieces(number, start)
            vectors = unit(encode_in_pieces(self.encode, roles[0], chosen, pieces), chosen, zeros=self.zeros)
            store.append(chosen, vectors, _shard_name(number, start))
            shutil.rmtree(pieces.folder, ignore_errors=True)

    def _pieces(self, number: int, start: int) -> VectorStore:
        """The part that is made so far of a shard that is not whole."""
        return VectorStore(self._pieces_folder / _shard_name(number, start), {"version": VERSION})

    @property
    def _pieces_folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}.pieces")

    def _shards_of(self, number: int) -> list[Vectors]:
        """The vectors of a table's shards, in their order; they were checked just now."""
        store, (_, rows) = self._store(), self._tables()[number]
        names = [_shard_name(number, start) for start in range(0, len(rows), self.shard)]
        return [np.load(store.folder / name / VECTORS, mmap_mode="r", allow_pickle=False) for name in names]


def encode_in_pieces(encode: EncodeItems, role: str, rows: Rows, vector_store: VectorStore) -> npt.NDArray[Any]:
    """The vectors [n, d] of items in a role.

    Those of an encoder that has a method ``by_chunks`` are kept every :data:`KEEP_SECONDS`: a process that is killed loses no more.
    It goes on with the chunks that are missing, which are the same without the others.
    """
    by_chunks = getattr(encode, "by_chunks", None)
    if by_chunks is None:
        return np.asarray(encode(role, rows))
    done, new = np.zeros(len(rows), dtype=np.bool_), np.zeros(len(rows), dtype=np.bool_)
    result: npt.NDArray[Any] | None = None

    def take(places: Rows, vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
        taken = np.empty((len(rows), vectors.shape[1]), dtype=np.float32) if result is None else result
        taken[places], done[places] = vectors, True
        return taken

    def keep() -> None:
        if result is not None and new.any():
            places = np.flatnonzero(new)
            vector_store.append(places, result[places])
            new[:] = False

    for places, vectors in vector_store.find(np.arange(len(rows))):
        result = take(places, vectors) if len(places) else result
    written = time.monotonic()
    try:
        for places, vectors in by_chunks(role, rows, done.copy()):
            result = take(places, vectors)
            new[places] = True
            if time.monotonic() - written >= KEEP_SECONDS:
                keep()
                written = time.monotonic()
    except BaseException:
        keep()
        raise
    assert result is not None and done.all()
    return result


def _shard_name(table: int, start: int) -> str:
    return f"{table}-{start}"


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


class VectorFile:
    """Vectors of a ``.npy`` file (mapped) or a Parquet file (read whole), found by item id."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise BadInputError("this file of vectors does not exist", where=str(path))
        ids, self.vectors = _read_parquet(path) if path.suffix == ".parquet" else _read_npy(path)
        if self.vectors.ndim != 2 or self.vectors.dtype.kind != "f":
            raise BadInputError(
                f"these vectors are {self.vectors.dtype} of shape {self.vectors.shape}; floats [n, dimensions] are wanted",
                where=str(path),
            )
        if len(ids) != len(self.vectors):
            raise BadInputError(f"{len(ids):,} ids for {len(self.vectors):,} vectors", where=str(path))
        self.index = Index(ids)
        twice = np.flatnonzero(self.index.find(ids) != np.arange(len(ids)))
        if len(twice):
            raise BadInputError(f"the id {bytes(ids[twice[0]]).hex()} stands twice", where=str(path))

    def of(self, store: Store, item_rows: Rows) -> npt.NDArray[Any]:
        """The vectors of items, in their order; raise :class:`BadInputError` where one is missing."""
        wanted = _as_ids(store.items.column("id").take(item_rows).to_pylist())
        rows = self.index.find(wanted)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            first = int(missing[0])
            text = store.shown(item_rows[first : first + 1])[0][:_SHOWN]
            raise BadInputError(
                f"{len(missing):,} of {len(wanted):,} items have no vector here, the first is "
                f"{bytes(wanted[first]).hex()} ({text!r})",
                where=str(self.path),
                hint="Item ids are nearfield.data.items.item_id of the text; the store's items.arrow lists them.",
            )
        return self.vectors[rows]


def read_vectors(store: Store, documents: Path, queries: Path | None = None) -> EncodeItems:
    """The vectors of a store's items in files of other programs; without a file of queries, those of documents serve both."""
    files = {role: VectorFile(path or documents) for role, path in (("query", queries), ("document", documents))}
    return lambda role, rows: files[role].of(store, rows)


def _as_ids(ids: list[bytes]) -> npt.NDArray[np.void]:
    # As V16: comparisons of byte strings would drop zeros at the end.
    return np.frombuffer(b"".join(ids), dtype="V16") if ids else np.empty(0, dtype="V16")


def _read_npy(path: Path) -> tuple[npt.NDArray[np.void], npt.NDArray[Any]]:
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInputError(f"this is no .npy or .parquet file of vectors ({error})", where=str(path)) from error
    listed = path.with_suffix(".ids.txt")
    try:
        lines = listed.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(
            "the ids of these vectors are missing: a text file with 32 hex digits a line", where=str(listed)
        ) from error
    return _as_ids([_id(line, listed, number) for number, line in enumerate(lines, start=1)]), vectors


def _read_parquet(path: Path) -> tuple[npt.NDArray[np.void], npt.NDArray[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["id", "vector"]).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(f"this Parquet file has no columns id and vector ({error})", where=str(path)) from error
    column = table["vector"].combine_chunks()
    lengths = set(column.value_lengths().to_pylist())
    if len(lengths) > 1 or None in lengths:
        raise BadInputError(f"the vectors have lengths {sorted(map(str, lengths))}; one is wanted", where=str(path))
    flat = column.flatten().to_numpy(zero_copy_only=False)
    vectors = flat.reshape(len(column), -1 if len(column) else 0)
    ids = [_id(value, path, number) for number, value in enumerate(table["id"].to_pylist(), start=1)]
    return _as_ids(ids), vectors


def _id(value: object, path: Path, number: int) -> bytes:
    if isinstance(value, str):
        try:
            value = bytes.fromhex(value)
        except ValueError:
            value = None
    if not isinstance(value, bytes) or len(value) != 16:
        raise BadInputError("this is no item id (16 bytes, or 32 hex digits)", where=f"{path}:{number}")
    return value


# Vectors that cannot be used as they are

_BLOCK = 65_536
_QUOTED = 60


def not_finite(vectors: npt.NDArray[Any]) -> Rows:
    """The rows of (n, d) vectors that hold a value that is not a finite number."""
    parts = [
        start + np.flatnonzero(~np.isfinite(vectors[start : start + _BLOCK]).all(axis=1))
        for start in range(0, len(vectors), _BLOCK)
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64)


SHORTEST = 1e-12
"""The least length that torch and mteb divide a vector by when they bring it to unit length."""


def zeros(vectors: npt.NDArray[Any]) -> Rows:
    """The rows of (n, d) vectors without a direction, alike to nothing: those that are zero in every dimension, and those whose
    length float32 cannot hold, of which a cosine makes zeros."""
    parts = []
    with np.errstate(over="ignore"):
        for start in range(0, len(vectors), _BLOCK):
            lengths = np.linalg.norm(vectors[start : start + _BLOCK].astype(np.float32), axis=1)
            parts.append(start + np.flatnonzero((lengths < SHORTEST) | np.isinf(lengths)))
    return np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64)


def shown(text: object) -> str:
    """A text as messages quote it: short, on one line; a thing that is no text is said to be an image."""
    if not isinstance(text, str):
        return "an image"
    line = " ".join(text.split())
    return repr(line if len(line) <= _QUOTED else line[: _QUOTED - 1] + "…")


def require_finite(vectors: npt.NDArray[Any], item: Callable[[int], object], where: str, things: str = "texts") -> None:
    """Raise :class:`BadInputError` with their number where vectors (n, d) are not finite; ``item`` gives what a row is of."""
    bad = not_finite(vectors)
    if len(bad):
        verb = "a vector that is" if len(bad) == 1 else "vectors that are"
        raise BadInputError(
            f"{len(bad):,} of {len(vectors):,} {things} have {verb} not finite (NaN or infinity); "
            f"the first is {shown(item(int(bad[0])))}",
            where=where,
            hint="Look for weights that are not finite, or for a precision in which the model overflows.",
        )
