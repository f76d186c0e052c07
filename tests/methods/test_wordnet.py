"""The shipped WordNet data: the bytes, the rules, the splits, and that the script makes them."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.compute as pc
import pytest

from nearfield.data import DataConfig, DataSummary, Store, build_data
from nearfield.methods.wordnet import FOLDER, EmbeddedReader, lemma_rows, read_synsets
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
SHA256 = {
    "synsets.jsonl.xz": "db975a8e0f6dfccb49c61d25c4bd63955f447c854fc787eadd2c05683ce03189",
    "pairs.jsonl.xz": "ca06a2872b7089aa1fbf22d28c744e905e0cd4d087751297933b67a1684981cb",
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_wordnet", ROOT / "scripts" / "build_wordnet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_wordnet"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, DataSummary]:
    out = tmp_path_factory.mktemp("wordnet") / "store"
    summary = build_data(DataConfig.load(ROOT / "data_recipes" / "wordnet.yaml"), out)
    return Store.open(out), summary


def test_the_shipped_files_are_what_they_were() -> None:
    sums = dict(reversed(line.split("  ")) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    for name, value in SHA256.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == value == sums[name]
    assert sum((FOLDER / name).stat().st_size for name in SHA256) < 3_000_000
    assert "Princeton University" in (FOLDER / "LICENSE").read_text()


def test_counts_and_splits(built: tuple[Store, DataSummary]) -> None:
    store, summary = built
    gloss, similarity = summary.sources
    assert (gloss.rows, gloss.examples, gloss.duplicates, gloss.quarantined) == (91_576, 91_576, 0, {})
    assert (similarity.rows, similarity.examples) == (11_080, 11_080)
    conflicts = summary.conflicts
    assert (conflicts.positive_and_negative, conflicts.labels, conflicts.scores) == (0, 0, 0)
    test = store.select("gloss", "test")
    assert len(np.unique(store.examples.column("query").take(test).to_numpy())) >= 1000
    assert pc.count_distinct(store.examples.column("cluster").take(test)).as_py() >= 500
    for split, share in (("train", 0.85), ("validation", 0.05), ("test", 0.10)):
        assert abs(gloss.splits[split] / gloss.rows - share) < 0.02
        assert abs(similarity.splits[split] / similarity.rows - share) < 0.02


def test_no_gloss_is_in_two_splits(built: tuple[Store, DataSummary]) -> None:
    store, _ = built
    sides: dict[str, set[int]] = defaultdict(set)
    glosses = store.examples.filter(pc.equal(store.examples.column("source"), 0))
    pairs = store.examples.filter(pc.equal(store.examples.column("source"), 1))
    for split in ("train", "validation", "test"):
        ours, graded = (table.filter(pc.equal(table.column("split"), split)) for table in (glosses, pairs))
        for column in (ours.column("positives"), ours.column("negatives"), graded.column("positives")):
            sides[split] |= set(pc.list_flatten(column).to_pylist())
        sides[split] |= set(graded.column("query").to_pylist())
    assert not sides["train"] & sides["test"]
    assert not sides["train"] & sides["validation"]
    assert not sides["validation"] & sides["test"]


def test_the_rules_hold(script: ModuleType) -> None:
    synsets = read_synsets(FOLDER / "synsets.jsonl.xz")
    assert len({synset.id for synset in synsets}) == len({synset.gloss for synset in synsets}) == len(synsets)
    for synset in synsets:
        assert len(synset.gloss.split()) >= 4
        assert '"' not in synset.gloss
        for lemma in synset.lemmas:
            assert not (script.words_of(lemma) - script.STOP_WORDS) & script.words_of(synset.gloss)


def test_siblings_are_siblings_and_no_positives() -> None:
    synsets = read_synsets(FOLDER / "synsets.jsonl.xz")
    parents = {synset.gloss: synset.hypernym for synset in synsets}
    positives: dict[str, set[object]] = defaultdict(set)
    rows = list(lemma_rows(synsets))
    for row in rows:
        positives[str(row["lemma"])].add(row["gloss"])
    for row in rows:
        siblings = row["siblings"]
        assert isinstance(siblings, list)
        assert len(siblings) <= 3
        assert all(parents[gloss] == row["hypernym"] for gloss in siblings)
        assert not set(siblings) & positives[str(row["lemma"])]
    assert sum(bool(row["siblings"]) for row in rows) > 80_000


def test_scores_are_shares_and_spread() -> None:
    rows = [row.values for row in EmbeddedReader(name="wordnet/gloss_similarity").rows(("first", "second", "score"))]
    scores = np.array([row["score"] for row in rows if row is not None], dtype=np.float64)
    assert 0 < scores.min() < 0.2
    assert 0.9 < scores.max() <= 1
    ids = [row[name] for row in rows if row is not None for name in ("first_synset", "second_synset")]
    assert len(ids) == len(set(ids))


def test_wu_palmer(script: ModuleType) -> None:
    assert script.wu_palmer(("root", "a", "b"), ("root", "a", "c")) == pytest.approx(2 * 2 / 6)
    assert script.wu_palmer(("root", "a"), ("root", "b", "c")) == pytest.approx(2 * 1 / 5)
    assert script.wu_palmer(("root", "a"), ("root", "a", "c")) == pytest.approx(2 * 2 / 5)


def test_a_line_of_the_dictionary(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(
        "  1 This is the licence.  \n"
        "00003993 03 n 02 congener 0 near_kin 0 002 @ 00003553 n 0000 @i 00000001 n 0000 | "
        'a whole of the same kind; "lard was also used"; "the American"  \n'
    )
    (noun,) = script.read_nouns(tmp_path / "data.noun")
    assert noun == script.Noun("n00003993", ("congener", "near kin"), "n00003553", True, "a whole of the same kind")
    assert script.licence(tmp_path / "data.noun") == "This is the licence.\n"


def test_the_script_makes_the_shipped_bytes(script: ModuleType, tmp_path: Path) -> None:
    dictionary = Path("/usr/share/wordnet")
    if not (dictionary / "data.noun").is_file():
        packages = sorted(Path("/var/cache/apt/archives").glob("wordnet-base*.deb"))
        if not packages:
            if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
                pytest.skip("WordNet's dictionary is not here, and there is no apt-get to fetch it")
            command = ["apt-get", "download", "-q", script.PACKAGE]
            fetched = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=PATIENCE)
            packages = sorted(tmp_path.glob("wordnet-base*.deb"))
            if fetched.returncode or not packages:
                pytest.skip("WordNet's dictionary is not here, and apt-get cannot fetch wordnet-base")
        subprocess.run(["dpkg", "-x", str(packages[-1]), str(tmp_path / "unpacked")], check=True)
        dictionary = tmp_path / "unpacked" / "usr" / "share" / "wordnet"
    assert script.build(dictionary, tmp_path / "out") == SHA256
    for name in ("synsets.jsonl.xz", "pairs.jsonl.xz", "LICENSE", "SHA256SUMS"):
        assert (tmp_path / "out" / name).read_bytes() == (FOLDER / name).read_bytes()
