"""What the launcher started: ranks, the store they share, the process group, and who is still alive.

``torchrun``, ``accelerate launch`` and ``deepspeed`` all say in the environment which rank a process is and where the
ranks meet. The store that they meet at exists before any process group does, so that one rank can prepare data for
hours while the others wait without a collective that could time out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from nearfield.errors import EXIT_FAULT, BadInputError, NearfieldError

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

logger = logging.getLogger("nearfield.training")

BackendName = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]

_BEAT_SECONDS = 3.0
_DEAD_SECONDS = 30.0
_STORE_TIMEOUT = timedelta(days=30)


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher started."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Launch:
        """What the launcher's environment says; one process where there is none."""
        try:
            world = int(os.environ.get("WORLD_SIZE", "1"))
            rank = int(os.environ.get("RANK", "0"))
            local = int(os.environ.get("LOCAL_RANK", "0"))
        except ValueError as error:
            raise BadInputError(f"the launcher's environment is broken: {error}", where="WORLD_SIZE, RANK") from error
        if not 0 <= rank < world:
            raise BadInputError(f"rank {rank} of {world} processes cannot be", where="WORLD_SIZE, RANK")
        return cls(rank, world, local)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @cached_property
    def store(self) -> Store:
        """The store that the ranks share; the launcher's own where it has one, otherwise kept by rank 0."""
        from torch._C._distributed_c10d import PrefixStore, TCPStore

        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if not host or not port:
            raise BadInputError(
                f"the launcher started {self.world_size} processes but did not say where they meet",
                where="MASTER_ADDR, MASTER_PORT",
                hint="Start with `torchrun --nproc-per-node N -m nearfield train RECIPE`, or with `accelerate launch`.",
            )
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        master = self.is_main and not by_agent
        base = TCPStore(host, int(port), self.world_size, master, timeout=_STORE_TIMEOUT, multi_tenant=True)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"nearfield/{attempt}", base)

    def prepare(self, work: Callable[[Callable[[str], None]], str], verify: Callable[[str], None]) -> None:
        """Rank 0 does ``work`` while the others wait for it, however long it takes; then these ``verify`` what it made.

        ``work`` is handed a function that tells the others what goes on, and returns a word for ``verify``. If it fails,
        the others leave with the same message. No process group may exist yet, so that none can time out.
        """
        if self.world_size == 1:
            work(lambda text: None)
            return
        store = self.store
        if self.is_main:
            try:
                word = work(lambda text: store.set("doing", text))
            except BaseException as error:
                store.set("failed", f"{type(error).__name__}: {error}")
                raise
            store.set("ready", word)
        else:
            verify(self._wait("ready"))

    def _wait(self, key: str) -> str:
        began = shown = time.monotonic()
        pause = 0.05
        while True:
            try:
                if self.store.check(["failed"]):
                    reason = self.store.get("failed").decode()
                    raise NearfieldError(f"rank 0 could not prepare the run: {reason}", where=f"rank {self.rank}")
                if self.store.check([key]):
                    return self.store.get(key).decode()
                doing = self.store.get("doing").decode() if self.store.check(["doing"]) else "the run"
            except RuntimeError as error:  # the store went away: so did rank 0, or the launcher
                if isinstance(error, NearfieldError):
                    raise
                raise NearfieldError(
                    "rank 0 died while it prepared the run", where=f"rank {self.rank} of {self.world_size}"
                ) from error
            now = time.monotonic()
            if now - shown >= 10:
                shown = now
                logger.warning("Rank %d waits for rank 0 (%s), %.0f s so far", self.rank, doing, now - began)
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)

    @contextlib.contextmanager
    def process_group(
        self, device: torch.device, timeout_seconds: float, on_dead: Callable[[int], None] = lambda code: None
    ) -> Iterator[Heartbeat | None]:
        """The process group of all ranks (nothing for one process) and the heartbeat that finds dead ones.

        ``on_dead`` is called with a dead rank's exit code before a process ends that hangs in a collective.
        """
        if self.world_size == 1:
            yield None
            return
        import torch
        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore

        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        heartbeat = Heartbeat(self, on_dead)
        heartbeat.start()
        try:
            yield heartbeat
        except NearfieldError as error:
            heartbeat.say_failed(str(error), error.exit_code)
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                # A collective fails on all ranks when one dies: the one that died is what the user wants to know.
                dead = heartbeat.find_dead(_DEAD_SECONDS + 3 * _BEAT_SECONDS if _looks_lost(error) else 0)
                if dead is not None:
                    raise RankDiedError(dead, self.rank) from error
            heartbeat.say_failed(f"{type(error).__name__}: {error}", EXIT_FAULT)
            raise
        finally:
            heartbeat.stop()
            with contextlib.suppress(Exception):
                dist.destroy_process_group()


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


def _looks_lost(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("connection", "peer", "timed out", "timeout", "nccl", "gloo", "socket"))


class Heartbeat:
    """Each rank counts up a number in the store; one that stops counting, or says that it failed, is dead.

    A thread watches, since the main thread may sit in a collective that will never end: when a rank has been silent
    for 30 seconds and this one could not end by itself, the thread ends the process.
    """

    def __init__(self, launch: Launch, on_dead: Callable[[int], None]) -> None:
        self.launch = launch
        self.on_dead = on_dead
        # A connection of its own: a store's client serves one call at a time.
        self._store: Store = launch.store.clone()  # type: ignore[attr-defined]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nearfield-heartbeat", daemon=True)
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self.dead: DeadRank | None = None

    def start(self) -> None:
        """Begin to beat and to watch."""
        self._store.set(f"host/{self.launch.rank}", socket.gethostname())
        self._beat(0)
        self._thread.start()

    def _beat(self, count: int) -> None:
        self._store.set(f"beat/{self.launch.rank}", str(count))

    def say_failed(self, reason: str, exit_code: int) -> None:
        """Tell the others why this rank ends."""
        text = json.dumps({"reason": (reason.splitlines() or [""])[0], "exit_code": exit_code})
        with self._lock, contextlib.suppress(Exception):
            self._store.set(f"left/{self.launch.rank}", text)

    def stop(self) -> None:
        """Stop beating and watching; a rank that did not say that it failed has left in peace."""
        self._stop.set()
        with self._lock, contextlib.suppress(Exception):
            key = f"left/{self.launch.rank}"
            if not self._store.check([key]):
                self._store.set(key, "{}")

    def _look(self) -> DeadRank | None:
        now = time.monotonic()
        for rank in range(self.launch.world_size):
            if rank == self.launch.rank:
                continue
            left = f"left/{rank}"
            if self._store.check([left]):
                how = json.loads(self._store.get(left))
                if how:
                    return DeadRank(f"{self._name(rank)} failed: {how['reason']}", how["exit_code"])
                continue
            beat = self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else b""
            old = self._seen.get(rank)
            if old is None or old[0] != beat:
                self._seen[rank] = (beat, now)
            elif now - old[1] > _DEAD_SECONDS:
                return DeadRank(f"{self._name(rank)} has been silent for {now - old[1]:.0f} s")
        return None

    def _name(self, rank: int) -> str:
        key = f"host/{rank}"
        host = self._store.get(key).decode() if self._store.check([key]) else "an unknown host"
        return f"rank {rank} of {self.launch.world_size} (on {host})"

    def find_dead(self, patience: float) -> DeadRank | None:
        """The rank that died, looked for during at most ``patience`` seconds."""
        deadline = time.monotonic() + patience
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
                if time.monotonic() - died_at > 15:
                    logger.error("nearfield: rank %d: %s; this rank ends too", self.launch.rank, self.dead.text)
                    with contextlib.suppress(Exception):
                        self.on_dead(self.dead.exit_code)
                    logging.shutdown()
                    os._exit(self.dead.exit_code)


def asked_backend(configured: str, world_size: int) -> BackendName:
    """The backend that the launcher and the recipe ask for; the two must agree.

    ``accelerate launch`` says in the environment what its configuration file asks for.
    """
    by_launcher: BackendName | None = None
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        by_launcher = _deepspeed_stage()
    elif os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        if os.environ.get("FSDP_VERSION", "2") == "1":
            raise BadInputError(
                "the launcher asks for FSDP 1; nearfield trains with FSDP 2",
                where="accelerate's configuration",
                hint="Set fsdp_version: 2, or use training/accelerate/fsdp2.yaml.",
            )
        by_launcher = "fsdp2"
    if configured == "auto":
        return by_launcher or ("ddp" if world_size > 1 else "single")
    if by_launcher is not None and by_launcher != configured:
        raise BadInputError(
            f"the launcher asks for {by_launcher}, the recipe for {configured}",
            where="training.backend",
            hint="Set training.backend=auto to follow the launcher.",
        )
    if configured == "single" and world_size > 1:
        raise BadInputError(
            f"training.backend is single, and the launcher started {world_size} processes", where="training.backend"
        )
    names: dict[str, BackendName] = {
        "single": "single",
        "ddp": "ddp",
        "fsdp2": "fsdp2",
        "zero1": "zero1",
        "zero2": "zero2",
        "zero3": "zero3",
    }
    return names[configured]


def _deepspeed_stage() -> BackendName:
    from nearfield.files import read_json

    stage: object = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file and file != "none":
        from pathlib import Path

        stage = read_json(Path(file), "DeepSpeed configuration").get("zero_optimization", {}).get("stage", 0)
    stages: dict[str, BackendName] = {"1": "zero1", "2": "zero2", "3": "zero3"}
    if str(stage) not in stages:
        raise BadInputError(
            f"the launcher asks for DeepSpeed with ZeRO stage {stage}; 1, 2 or 3 is wanted",
            where=file or "accelerate's configuration",
            hint="Use training/accelerate/zero1.yaml, zero2.yaml or zero3.yaml; without ZeRO, ddp.yaml.",
        )
    return stages[str(stage)]
