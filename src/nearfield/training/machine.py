"""What this machine has: memory in use, memory that can still be had, space on a disk."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from types import TracebackType

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def resident_bytes(status: str | None = None) -> int:
    """Main memory that this process holds now; 0 where the system does not say."""
    return _status_bytes("VmRSS", status)


def peak_resident_bytes(status: str | None = None) -> int:
    """The most main memory that this process has held since :func:`reset_peak_resident` or its start."""
    return _status_bytes("VmHWM", status)


def _status_bytes(key: str, status: str | None) -> int:
    if status is None:
        try:
            status = (_PROC / "self" / "status").read_text()
        except OSError:
            return 0
    for line in status.splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak_resident() -> bool:
    """Let the peak begin anew at what is held now; whether the system allows that."""
    try:
        (_PROC / "self" / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


class ResidentPeak:
    """While it is open, the most main memory that this process holds: read from the kernel, else by looking often."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ResidentPeak:
        self.bytes = resident_bytes()
        if not reset_peak_resident():
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            self.bytes = max(self.bytes, peak_resident_bytes())
            return
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident_bytes())

    def _look(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, resident_bytes())


def available_main_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """Bytes of main memory that can still be had: what the system has left, or less where a container limits it.

    None where the system does not say.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    found += _cgroup_rooms(proc, cgroup)
    return min(found) if found else None


def _cgroup_rooms(proc: Path, cgroup: Path) -> list[int]:
    """What each control group that this process is in has left, from its own up to the root (cgroup 2 and 1)."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, cached = cgroup, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root = cgroup / "memory"
            limit, used, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        folder = root / path.lstrip("/")
        while True:
            room = _room(folder, limit, used, cached)
            if room is not None:
                rooms.append(room)
            if folder == root:
                break
            folder = folder.parent
    return rooms


def _room(folder: Path, limit: str, used: str, cached: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        held = int((folder / used).read_text())
        if most == "max" or int(most) >= 1 << 60:
            return None
        counts = dict(line.split()[:2] for line in (folder / "memory.stat").read_text().splitlines() if line)
    except (OSError, ValueError):
        return None
    # Pages of files that were read are counted as used, and are given back when memory is wanted.
    return max(0, int(most) - held + int(counts.get(cached, 0)))


def local_processes() -> int:
    """Ranks that share this machine, as the launcher says; 1 without one."""
    try:
        return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        return 1


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is, or will be."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
