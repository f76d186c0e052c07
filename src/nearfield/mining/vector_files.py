"""Vectors that other programs made, keyed by item ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nearfield.data.store import Store
from nearfield.errors import BadInputError
from nearfield.mining.config import VectorsTeacher
from nearfield.mining.documents import Rows

_SHOWN = 200


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
        self.order = np.argsort(ids)
        self.ids = ids[self.order]
        if len(ids) and (self.ids[1:] == self.ids[:-1]).any():
            twice = self.ids[1:][self.ids[1:] == self.ids[:-1]][0]
            raise BadInputError(f"the id {bytes(twice).hex()} stands twice", where=str(path))

    def of(self, store: Store, item_rows: Rows) -> npt.NDArray[Any]:
        """The vectors of items, in their order; raise :class:`BadInputError` where one is missing."""
        wanted = _as_ids(store.items.column("id").take(item_rows).to_pylist())
        place = np.searchsorted(self.ids, wanted)
        place[place == len(self.ids)] = 0
        missing = self.ids[place] != wanted if len(self.ids) else np.ones(len(wanted), dtype=bool)
        if missing.any():
            first = int(np.flatnonzero(missing)[0])
            text = store.shown(item_rows[first : first + 1])[0][:_SHOWN]
            raise BadInputError(
                f"{int(missing.sum()):,} of {len(wanted):,} items have no vector here, the first is "
                f"{bytes(wanted[first]).hex()} ({text!r})",
                where=str(self.path),
                hint="Item ids are nearfield.data.items.item_id of the text; the store's items.arrow lists them.",
            )
        return self.vectors[self.order[place]]


def read_vectors(config: VectorsTeacher, store: Store) -> Any:
    """The callable (role, item rows) -> vectors that :func:`nearfield.data.vectors.build_vectors` wants."""
    documents = VectorFile(config.documents)
    queries = documents if config.queries is None else VectorFile(config.queries)
    return lambda role, rows: (queries if role == "query" else documents).of(store, rows)


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
