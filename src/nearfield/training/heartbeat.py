"""Who is still alive: each rank counts up in the store that all share, and watches the others do so."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nearfield.errors import EXIT_FAULT, NearfieldError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

logger = logging.getLogger("nearfield.training")

_BEAT_SECONDS = 3.0
_DEAD_SECONDS = 30.0
_GRACE_SECONDS = 15.0


class RankDiedError(NearfieldError):
    """Another rank is gone; this one ends too."""

    def __init__(self, dead: DeadRank, rank: int) -> None:
        super().__init__(
            f"{dead.text}; the other ranks end too",
            where=f"rank {rank}",
            hint="Look at that rank's own output. The same command goes on from the newest checkpoint.",
        )
        self.exit_code = dead.exit_code


@dataclass(frozen=True)
class DeadRank:
    """A rank that is gone: what to say of it, and the exit code that its end asks for."""

    text: str
    exit_code: int = EXIT_FAULT


class Heartbeat:
    """Each rank counts up a number in the store; one that stops counting, or says that it failed, is dead.

    So is one whose process is gone, which ranks of the same machine can see at once. A thread watches, since the main
    thread may sit in a collective that will never end: when a rank has been silent for 30 seconds and this one could not
    end by itself, the thread ends the process.
    """

    def __init__(self, store: Store, rank: int, world_size: int, on_dead: Callable[[int], None]) -> None:
        self.rank = rank
        self.world_size = world_size
        self.on_dead = on_dead
        self._store = store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nearfield-heartbeat", daemon=True)
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self.dead: DeadRank | None = None

    def start(self) -> None:
        """Begin to beat and to watch."""
        self._store.set(f"process/{self.rank}", json.dumps([socket.gethostname(), os.getpid(), _process_space()]))
        self._beat(0)
        self._thread.start()

    def _beat(self, count: int) -> None:
        self._store.set(f"beat/{self.rank}", str(count))

    def say_failed(self, reason: str, exit_code: int) -> None:
        """Tell the others why this rank ends."""
        text = json.dumps({"reason": (reason.splitlines() or [""])[0], "exit_code": exit_code})
        with self._lock, contextlib.suppress(Exception):
            self._store.set(f"left/{self.rank}", text)

    def stop(self) -> None:
        """Stop beating and watching; a rank that did not say that it failed has left in peace."""
        self._stop.set()
        with self._lock, contextlib.suppress(Exception):
            key = f"left/{self.rank}"
            if not self._store.check([key]):
                self._store.set(key, "{}")

    def _look(self) -> DeadRank | None:
        now = time.monotonic()
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            left = f"left/{rank}"
            if self._store.check([left]):
                how = json.loads(self._store.get(left))
                if how:
                    return DeadRank(f"{self._name(rank)} failed: {how['reason']}", how["exit_code"])
                continue
            # Looked at in this order: it may leave in peace between the two.
            if self._is_gone(rank) and not self._store.check([left]):
                return DeadRank(f"{self._name(rank)} was killed: its process is gone")
            beat = self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else b""
            old = self._seen.get(rank)
            if old is None or old[0] != beat:
                self._seen[rank] = (beat, now)
            elif now - old[1] > _DEAD_SECONDS:
                return DeadRank(f"{self._name(rank)} has been silent for {now - old[1]:.0f} s")
        return None

    def _process(self, rank: int) -> tuple[str, int, str] | None:
        """Host, process number, and the space that this number is of."""
        key = f"process/{rank}"
        if not self._store.check([key]):
            return None
        host, number, space = json.loads(self._store.get(key))
        return host, number, space

    def _is_gone(self, rank: int) -> bool:
        """Whether the rank's process is on this machine and has ended."""
        process = self._process(rank)
        if process is None or not process[2] or process[2] != _process_space():
            return False
        try:
            # The state follows the name in brackets; a dead process stays a zombie until its parent has looked.
            state = Path(f"/proc/{process[1]}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return True
        return state in "ZX"

    def _name(self, rank: int) -> str:
        process = self._process(rank)
        where = f"on {process[0]}, process {process[1]}" if process else "on an unknown host"
        return f"rank {rank} of {self.world_size} ({where})"

    def find_dead(self, patiently: bool) -> DeadRank | None:
        """The rank that died; with ``patiently`` looked for until a silent one must have been found."""
        deadline = time.monotonic() + (_DEAD_SECONDS + 3 * _BEAT_SECONDS if patiently else 0)
        while True:
            with self._lock, contextlib.suppress(Exception):
                self.dead = self.dead or self._look()
            if self.dead is not None or time.monotonic() >= deadline:
                return self.dead
            time.sleep(0.5)

    def _run(self) -> None:
        count = 0
        died_at: float | None = None
        while not self._stop.wait(_BEAT_SECONDS):
            count += 1
            try:
                with self._lock:
                    self._beat(count)
                    self.dead = self.dead or self._look()
            except Exception:
                self.dead = self.dead or DeadRank("rank 0 or the launcher, which keep the ranks' store, died")
            if self.dead is not None:
                died_at = died_at or time.monotonic()
                # The main thread gets the failed collective first; if it cannot, nothing else will end this process.
                if time.monotonic() - died_at > _GRACE_SECONDS:
                    logger.error("nearfield: rank %d: %s; this rank ends too", self.rank, self.dead.text)
                    with contextlib.suppress(Exception):
                        self.on_dead(self.dead.exit_code)
                    logging.shutdown()
                    os._exit(self.dead.exit_code)


def _process_space() -> str:
    """Names what process numbers are unique in: a boot of a machine, and in it a container. Empty where it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
