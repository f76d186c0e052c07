"""Hugging Face data sets: a folder written by ``save_to_disk``, or a name and a revision on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nearfield.data.readers.base import Row, hash_files
from nearfield.data.readers.delimited import check_header
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.data.text_readers import HubReader


class HubDataset:
    """The rows of one split of a data set. No code of the data set is ever run."""

    def __init__(self, config: HubReader) -> None:
        self._config = config

    def inputs(self) -> dict[str, str]:
        config = self._config
        if config.path is None:
            return {f"{config.name}/{config.subset or ''}/{config.split}": str(config.revision)}
        if not config.path.is_dir():
            raise BadInputError(
                "this folder does not exist", where=str(config.path), hint="Write it with save_to_disk."
            )
        return hash_files(sorted(file for file in config.path.rglob("*") if file.suffix in (".arrow", ".json")))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        from datasets import Dataset, Image

        data = self._load()
        if not isinstance(data, Dataset):
            raise BadInputError("this is not a data set with rows", where=self._where())
        check_header(data.column_names, columns, self._where())
        for column, feature in data.features.items():
            if isinstance(feature, Image):
                # Pictures come as bytes: they are checked before they are decoded.
                data = data.cast_column(column, Image(decode=False))
        name = self._config.name or (self._config.path or Path()).name
        for index, values in enumerate(data.select_columns(list(columns) or data.column_names)):
            yield Row(name, index + 1, values)

    def _where(self) -> str:
        config = self._config
        return str(config.path) if config.path else f"{config.name}@{config.revision} ({config.split})"

    def _load(self) -> object:
        from datasets import DatasetDict, load_dataset, load_from_disk

        config = self._config
        try:
            if config.path is None:
                return load_dataset(config.name, config.subset, revision=config.revision, split=config.split)
            data = load_from_disk(str(config.path))
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            # Covers a missing name or revision, no network, an unknown split and a folder that is no data set.
            message = (str(error).splitlines() or [type(error).__name__])[0][:300]
            hint = "Check the folder." if config.path else "Check name, revision and split; offline, fetch it first."
            raise BadInputError(
                f"this data set cannot be loaded ({message})", where=self._where(), hint=hint
            ) from error
        if isinstance(data, DatasetDict):
            if config.split not in data:
                hint = f"Splits here: {', '.join(data)}."
                raise BadInputError(f"there is no split {config.split!r}", where=str(config.path), hint=hint)
            return data[config.split]
        return data
