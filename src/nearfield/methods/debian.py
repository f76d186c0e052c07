"""Descriptions of Debian packages: the short one asks for the long one. Built on demand from apt's lists."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from nearfield.errors import BadInputError
from nearfield.methods.on_demand import HINT, OnDemandReader, cache_folder, kept_file, own_lists, run_apt

MIN_WORDS = 4
_CAT = Path("/usr/lib/apt/apt-helper")
Stanza = Mapping[str, str]

logger = logging.getLogger("nearfield.data")


class DebianReader(OnDemandReader):
    """Short and long descriptions of Debian packages, one a source package, built on demand from apt's lists.

    Columns: short, long, source (package), package, section.
    """

    kind: Literal["debian_descriptions"] = "debian_descriptions"
    max_repeats: int = Field(default=50, ge=1)
    """A sentence that occurs in more descriptions than this says nothing about a package and is dropped."""

    def find(self) -> Path:
        path = cache_folder(self.cache) / f"debian-descriptions-{self.max_repeats}.jsonl.gz"
        return kept_file(path, lambda: build_rows(self.max_repeats))


def build_rows(max_repeats: int) -> list[dict[str, str]]:
    """Read apt's lists (fetching them into a temporary folder where there are none) and put the rows together."""
    if shutil.which("apt-get") is None or not _CAT.exists():
        raise BadInputError("there is no apt here, so the Debian descriptions cannot be built", hint=HINT)
    packages, translations = _lists([])
    if packages and translations:
        return _read(packages, translations, max_repeats)
    with tempfile.TemporaryDirectory(prefix="nearfield-apt-") as folder:
        logger.info("Fetching the package lists with apt-get into a temporary folder")
        options = own_lists(Path(folder))
        run_apt(["apt-get", "update", "-q", *options], check=False)
        packages, translations = _lists(options)
        if not packages or not translations:
            raise BadInputError("apt-get could not fetch Debian's Packages and Translation-en lists", hint=HINT)
        return _read(packages, translations, max_repeats)


def _lists(options: list[str]) -> tuple[list[Path], list[Path]]:
    """The files of the Packages and the Translation-en lists of Debian's main component that apt has."""
    form = "$(CREATED_BY)\t$(ORIGIN)\t$(COMPONENT)\t$(LANGUAGE)\t$(FILENAME)"
    packages: list[Path] = []
    translations: list[Path] = []
    for line in run_apt(["apt-get", "indextargets", *options, "--format", form]).splitlines():
        kind, origin, component, language, name = (line.split("\t") + [""] * 5)[:5]
        if origin != "Debian" or component != "main" or not name or not Path(name).is_file():
            continue
        if kind == "Packages":
            packages.append(Path(name))
        elif kind == "Translations" and language == "en":
            translations.append(Path(name))
    return sorted(packages), sorted(translations)


def _read(packages: list[Path], translations: list[Path], max_repeats: int) -> list[dict[str, str]]:
    def stanzas(files: list[Path]) -> Iterator[Stanza]:
        for file in files:
            yield from parse_stanzas(run_apt([str(_CAT), "cat-file", str(file)]).splitlines())

    return description_rows(stanzas(packages), stanzas(translations), max_repeats)


def parse_stanzas(lines: Iterable[str]) -> Iterator[Stanza]:
    """The stanzas of a Debian control file: fields, with continuation lines joined by line ends."""
    fields: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        if not line.strip():
            if fields:
                yield {name: "\n".join(parts) for name, parts in fields.items()}
            fields = {}
        elif line[0] in " \t":
            current.append(line[1:])
        else:
            name, _, value = line.partition(":")
            current = fields[name] = [value.strip()]
    if fields:
        yield {name: "\n".join(parts) for name, parts in fields.items()}


def description_rows(
    packages: Iterable[Stanza], translations: Iterable[Stanza], max_repeats: int
) -> list[dict[str, str]]:
    """One row a source package, sorted; of its packages the one that bears its name, else the first by name."""
    described: dict[str, tuple[str, str]] = {}
    for stanza in translations:
        name = stanza.get("Package", "")
        if name and name not in described:
            short, _, long = stanza.get("Description-en", "").partition("\n")
            described[name] = (short.strip(), long)
    chosen: dict[str, Stanza] = {}
    for stanza in packages:
        name = stanza.get("Package", "")
        source = _source(stanza)
        best = chosen.get(source)
        if name in described and (
            best is None or (name != source, name) < (best["Package"] != source, best["Package"])
        ):
            chosen[source] = stanza
    sentences = {name: _paragraphs(long) for name, (_, long) in described.items()}
    repeats = Counter(s for paragraphs in sentences.values() for s in {s for p in paragraphs for s in p})
    rows = []
    for source, stanza in sorted(chosen.items()):
        name = stanza["Package"]
        short = described[name][0]
        telling = [" ".join(s for s in paragraph if repeats[s] <= max_repeats) for paragraph in sentences[name]]
        long = "\n".join(paragraph for paragraph in telling if paragraph)
        if short and len(long.split()) >= MIN_WORDS and long != short:
            section = stanza.get("Section", "unknown").rpartition("/")[2]
            rows.append({"short": short, "long": long, "source": source, "package": name, "section": section})
    return rows


def _source(stanza: Stanza) -> str:
    return stanza.get("Source", stanza.get("Package", "")).split(" ")[0]


def _paragraphs(long: str) -> list[list[str]]:
    """The sentences of each paragraph; a line ``.`` parts paragraphs, and an indented line stands alone."""
    paragraphs: list[list[str]] = []
    text = ""
    for line in [*long.split("\n"), "."]:
        if line.strip() == "." or line.startswith((" ", "\t")):
            if text:
                paragraphs.append(re.split(r"(?<=[.!?])\s+", text))
            text = ""
            if line.strip() != ".":
                paragraphs.append([line.strip()])
        else:
            text = f"{text} {line.strip()}".strip()
    return [paragraph for paragraph in paragraphs if any(paragraph)]
