"""Files are written aside; hashes follow the content; paths stay inside."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearfield.errors import BadInputError, NearfieldError
from nearfield.files import atomic_path, fingerprint, hash_file, inside, read_json, write_json, write_text
from nearfield.randomness import derive_seed, generator


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic_path(path) as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    assert [file.name for file in path.iterdir()] == ["two"]
    with pytest.raises(RuntimeError), atomic_path(path) as aside:
        aside.mkdir()
        raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [path]


def test_fingerprints(tmp_path: Path) -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert len(fingerprint(None)) == 32
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert hash_file(file, "sha256") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert len(hash_file(file)) == 32


def test_json_and_paths(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": "é"})
    assert read_json(tmp_path / "a.json") == {"x": "é"}
    with pytest.raises(BadInputError, match="this thing does not exist"):
        read_json(tmp_path / "b.json", "thing")
    assert inside(tmp_path, "a/../b") == tmp_path.resolve() / "b"
    for path in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(BadInputError, match="leaves its folder"):
            inside(tmp_path, path)


def test_messages_have_three_parts() -> None:
    error = NearfieldError("it is broken", where="file:3", hint="Mend it.")
    assert str(error) == "file:3: it is broken\n  -> Mend it."
    assert str(NearfieldError("it is broken")) == "it is broken"


def test_seeds_depend_on_every_name() -> None:
    seeds = {
        derive_seed(0),
        derive_seed(1),
        derive_seed(0, "a"),
        derive_seed(0, "b"),
        derive_seed(0, "a", 1),
        derive_seed(0, "a", "1"),
        derive_seed(0, "a1"),
    }
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert generator(0, "a").random() == generator(0, "a").random() != generator(0, "b").random()
