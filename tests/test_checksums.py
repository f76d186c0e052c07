"""Checksums: a flipped bit anywhere is found by the first read of its block in a process, and by nothing before it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from nearfield import files
from nearfield.files import BLOCK, SUMS, CheckedFile, DamagedError, Sealed, damage, seal


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """Two files, one of several blocks, and one in a subfolder."""
    random = np.random.default_rng(0)
    (tmp_path / "sealed" / "below").mkdir(parents=True)
    (tmp_path / "sealed" / "big").write_bytes(random.bytes(3 * BLOCK + 17))
    (tmp_path / "sealed" / "empty").write_bytes(b"")
    (tmp_path / "sealed" / "below" / "small").write_bytes(b"abc")
    seal(tmp_path / "sealed")
    return tmp_path / "sealed"


def flip(file: Path, place: int, bit: int = 1) -> None:
    """As a disk would: nothing but the byte changes."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[place] ^= bit
    file.write_bytes(bytes(content))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def reads() -> list[int]:
    return [int(done.sum()) for done in files._checked.values()]


def test_blocks_are_checked_when_they_are_read_and_once(folder: Path) -> None:
    files._checked.clear()
    file = Sealed(folder, "").file("big")
    assert reads() == [0]
    file.check(BLOCK - 1, BLOCK)
    assert reads() == [1]
    file.check(BLOCK - 1, BLOCK + 1)
    file.check_ranges(np.array([5, 6]), np.array([6, 7]))
    assert reads() == [2]
    file.check_outside(np.array([BLOCK + 1]), np.array([3 * BLOCK]))  # all but the third
    assert reads() == [3]
    again = Sealed(folder, "").file("big")
    flip(folder / "big", 10)
    again.check(0, 100)  # this process has read it before
    flip(folder / "big", 2 * BLOCK + 5)
    with pytest.raises(DamagedError, match="2,097,152 on"):
        again.check_ranges(np.array([0, 2 * BLOCK + 4]), np.array([1, 2 * BLOCK + 6]))


@pytest.mark.parametrize("name", ["big", "below/small", SUMS])
def test_a_bit_anywhere_is_found(folder: Path, name: str) -> None:
    assert damage(folder) is None
    size = (folder / name).stat().st_size
    for place in sorted({0, size // 3, size // 2, size - 2, size - 1}):
        for bit in (1, 128):
            files._checked.clear()
            flip(folder / name, place, bit)
            assert damage(folder) is not None, (place, bit)
            flip(folder / name, place, bit)
    files._checked.clear()
    assert damage(folder) is None


def test_other_sizes_missing_files_and_lists_are_damage(folder: Path) -> None:
    (folder / "below" / "small").write_bytes(b"abcd")
    assert "has 4 bytes where 3 were written" in str(damage(folder))
    (folder / "below" / "small").unlink()
    assert "is missing" in str(damage(folder))
    assert "other is not in its list" in str(damage(folder, ["other"]))
    (folder / SUMS).write_text("[]")
    with pytest.raises(DamagedError, match="list of checksums is damaged"):
        Sealed(folder, "")
    (folder / SUMS).unlink()
    assert "an earlier version" in str(damage(folder))
    assert not Sealed(folder, "").known
    CheckedFile(folder / "big", 0, None, "").check(0, 10**9)  # nothing to compare with
