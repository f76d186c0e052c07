"""The processes that a launcher started: their ranks, the store they share, the process group and small messages in it, signals,
and who is still alive.

``torchrun``, ``accelerate launch`` and ``deepspeed`` all say in the environment which rank a process is and where the
ranks meet. The store that they meet at exists before any process group does, so that one rank can prepare data for
hours while the others wait without a collective that could time out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from nearfield.errors import EXIT_FAULT, BadInputError, NearfieldError, Notice
from nearfield.files import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import Store  # type: ignore[attr-defined]


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


_SECONDS_TO_STOP = 10.0
"""A call of the store takes milliseconds; of one whose process is gone, seconds."""


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
        # A thread that is inside the store while the interpreter ends takes the process down with SIGABRT.
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_SECONDS_TO_STOP)

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


BackendName = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]

_STORE_TIMEOUT = timedelta(days=30)
_SAY_SECONDS = 10.0
_HEAR_SECONDS = 3.0
_SPEAK_SECONDS = 2.0
_OPENED: dict[tuple[str, str, int, int], tuple[Store, Iterator[int]]] = {}
"""Meeting place and rank -> the store there, and the numbers of what its processes do one after the other."""


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher started."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Launch:
        """The launch that the launcher's environment describes; one process where there is none."""
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
    def device(self) -> str | None:
        """A GPU for each process of a node, as far as there are some, for what is done beside training."""
        import torch

        return f"cuda:{self.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @cached_property
    def store(self) -> Store:
        """The store that the ranks share; the launcher's own where it has one, otherwise kept by rank 0.

        Processes may do several things one after the other, as a sweep does: each has words of its own. All ranks do them in
        one order, so their number is the same everywhere.
        """
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if not host or not port:
            raise BadInputError(
                f"the launcher started {self.world_size} processes but did not say where they meet",
                where="MASTER_ADDR, MASTER_PORT",
                hint="Start with `torchrun --nproc-per-node N -m nearfield train RECIPE`, or with `accelerate launch`.",
            )
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        master = self.is_main and not by_agent
        place = (host, port, self.rank, self.world_size)
        if place not in _OPENED:
            # Kept as long as the process lives: where rank 0 holds the store, the others must find it again.
            base = TCPStore(host, int(port), self.world_size, master, timeout=_STORE_TIMEOUT, multi_tenant=True)
            _OPENED[place] = base, itertools.count()
        met, numbers = _OPENED[place]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"nearfield/{attempt}/{next(numbers)}", met)

    def within(self, name: str) -> Launch:
        """The same processes in a part of the work with words of its own, so that they can meet there once more."""
        if self.world_size == 1:
            return self
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        part = replace(self)
        # In place of the cached property, which would open another connection.
        part.__dict__["store"] = PrefixStore(name, self.store)
        return part

    def prepare(
        self,
        work: Callable[[Callable[[str], None]], str],
        verify: Callable[[str], None],
        help: Callable[[str], None] | None = None,
    ) -> None:
        """Rank 0 does ``work`` while the others wait for it, however long it takes; then these ``verify`` what it made.

        ``work`` is handed a function that tells the others what goes on, and returns a word for ``verify``. While they wait
        the others do with ``help`` their part of each task that ``work`` divides (:meth:`divide`). If one of them fails, all
        leave, with the same exit code. No process group may exist yet, so that none can time out.
        """
        if self.world_size == 1:
            work(lambda text: None)
            return
        store = self.store
        try:
            if self.is_main:
                store.set("ready", work(lambda text: store.set("doing", text)))
                for rank in range(1, self.world_size):
                    self._wait(f"verified/{rank}", rank)
                store.set("go", "")
            else:
                verify(self._wait("ready", 0, help))
                store.set(f"verified/{self.rank}", "")
                self._wait("go", 0)
        except PreparationFailedError:
            raise
        except BaseException as error:
            self._tell_failure(error)
            raise

    def divide(self, task: str, local_part: Callable[[], None]) -> None:
        """Within the work of :meth:`prepare`: rank 0 does its ``local_part`` of a task while the others do theirs."""
        if self.world_size == 1:
            local_part()
            return
        number = self.store.add("tasks", 1)
        self.store.set(f"task/{number}", task)
        local_part()
        for rank in range(1, self.world_size):
            self._wait(f"task/{number}/{rank}", rank)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what ends in a process group: a rank that fails before it is made ends those that wait for it there."""
        try:
            yield
        except PreparationFailedError:
            raise
        except BaseException as error:
            if self.world_size > 1:
                with contextlib.suppress(Exception):
                    if not self.store.check([f"joined/{rank}" for rank in range(self.world_size)]):
                        self._tell_failure(error)
            raise

    def _meet(self) -> None:
        """Wait until all ranks are here. Not in the process group's own making, which would wait in silence."""
        self.store.set(f"joined/{self.rank}", "")
        for rank in range(self.world_size):
            self._wait(f"joined/{rank}", rank)

    def let_speak(self, rank: int = 0) -> None:
        """Wait before this rank ends because of what ``rank`` has found too.

        A launcher ends all ranks of its node when it sees the first end: the one that says why should be that one. Later
        the others say it as well.
        """
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        time.sleep(_SPEAK_SECONDS * (5 if rank // per_node == self.rank // per_node or self.local_rank else 1))

    def _tell_failure(self, error: BaseException) -> None:
        """Let the others leave too, and give them a moment to hear of it where this process keeps their store."""
        code = error.exit_code if isinstance(error, NearfieldError) else EXIT_FAULT
        what = str(error) if isinstance(error, NearfieldError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            self.store.set("failed", json.dumps({"rank": self.rank, "what": what, "exit_code": code}))
            others = [f"heard/{rank}" for rank in range(self.world_size) if rank != self.rank]
            deadline = time.monotonic() + _HEAR_SECONDS
            while self.is_main and time.monotonic() < deadline and not self.store.check(others):
                time.sleep(0.05)

    def _wait(self, key: str, rank: int, help: Callable[[str], None] | None = None) -> str:
        """The value of a key that ``rank`` sets, whenever that is; tasks that come meanwhile are helped with."""
        began = shown = time.monotonic()
        pause, helped = 0.05, 0
        while True:
            try:
                if self.store.check(["failed"]):
                    self.store.set(f"heard/{self.rank}", "")
                    error = PreparationFailedError(json.loads(self.store.get("failed")), self.rank)
                    self.let_speak(error.rank)
                    raise error
                if self.store.check([key]):
                    return self.store.get(key).decode()
                task = None
                if help is not None and self.store.check([f"task/{helped + 1}"]):
                    task = self.store.get(f"task/{helped + 1}").decode()
                doing = self.store.get("doing").decode() if self.store.check(["doing"]) else "it has not begun"
            except NearfieldError:
                raise
            except RuntimeError as lost:  # the store went away: so did rank 0, or the launcher
                raise NearfieldError(
                    "rank 0 died while it prepared the run", where=f"rank {self.rank} of {self.world_size}"
                ) from lost
            if help is not None and task is not None:
                help(task)
                helped += 1
                self.store.set(f"task/{helped}/{self.rank}", "")
                pause = 0.05
                continue
            now = time.monotonic()
            if now - shown >= _SAY_SECONDS:
                shown = now
                what = f" ({doing})" if key == "ready" else ""
                logger.warning("Rank %d waits for rank %d%s, %.0f s so far", self.rank, rank, what, now - began)
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
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._meet()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        # A connection of its own: a store's client serves one call at a time.
        heartbeat = Heartbeat(self.store.clone(), self.rank, self.world_size, on_dead)  # type: ignore[attr-defined]
        heartbeat.start()
        try:
            yield heartbeat
        except NearfieldError as error:
            heartbeat.say_failed(str(error), error.exit_code)
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                # A collective fails on all ranks when one dies: the one that died is what the user wants to know.
                dead = heartbeat.find_dead(patiently=_looks_lost(error))
                if dead is not None:
                    raise RankDiedError(dead, self.rank) from error
            heartbeat.say_failed(f"{type(error).__name__}: {error}", EXIT_FAULT)
            raise
        finally:
            # In this order: should the group's end hang on a dead rank, the heartbeat ends this one.
            with contextlib.suppress(Exception):
                # DeepSpeed keeps groups of its own, which a later training in these processes would find dead.
                deepspeed = sys.modules.get("deepspeed.comm")
                owner = deepspeed if deepspeed is not None and deepspeed.is_initialized() else dist
                owner.destroy_process_group()
            heartbeat.stop()


class PreparationFailedError(NearfieldError):
    """Another rank could not prepare the run, or did not hold what rank 0 prepared; this one ends too."""

    def __init__(self, failure: dict[str, Any], here: int) -> None:
        self.rank: int = failure["rank"]
        super().__init__(f"rank {self.rank} could not prepare the run: {failure['what']}", where=f"rank {here}")
        self.exit_code = failure["exit_code"]


def _looks_lost(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("connection", "peer", "timed out", "timeout", "nccl", "gloo", "socket"))


def check_launch(configured: str, launch: Launch) -> BackendName:
    """Refuse, before any work, what can never train: a launcher and a recipe that contradict each other."""
    name = asked_backend(configured, launch.world_size)
    if launch.world_size == 1 and name != "single":
        raise wants_several(name)
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launch.is_main and mixed not in ("no", ""):
        logger.warning("The launcher's mixed precision (%s) is not used: training.precision says what is", mixed)
    return name


def wants_several(name: BackendName) -> BadInputError:
    """The message about a backend that was asked for in one process."""
    return BadInputError(
        f"{name} spreads a {'batch' if name == 'ddp' else 'model'} over several processes, and there is one",
        where="training.backend",
        hint=f"Start with `accelerate launch --config_file training/accelerate/{name}.yaml -m nearfield train RECIPE`.",
    )


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
    return cast(BackendName, configured)


def _deepspeed_stage() -> BackendName:
    stage: object = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file and file != "none":
        if not Path(file).is_file():
            raise BadInputError(
                "this DeepSpeed configuration does not exist",
                where=file,
                hint=f"deepspeed_config_file counts from the folder that the command is started in, now {Path.cwd()}. "
                "Start in the project's folder, or give the whole path.",
            )
        stage = read_json(Path(file), "DeepSpeed configuration").get("zero_optimization", {}).get("stage", 0)
    stages: dict[str, BackendName] = {"1": "zero1", "2": "zero2", "3": "zero3"}
    if str(stage) not in stages:
        raise BadInputError(
            f"the launcher asks for DeepSpeed with ZeRO stage {stage}; 1, 2 or 3 is wanted",
            where=file or "accelerate's configuration",
            hint="Use training/accelerate/zero1.yaml, zero2.yaml or zero3.yaml; without ZeRO, ddp.yaml.",
        )
    return stages[str(stage)]


class StopRequest:
    """Inside the ``with`` block a first signal sets ``received``; a second one acts as it would outside.

    A launcher of several ranks sends SIGTERM on its own, also again, once a rank has ended: with ``launched`` a rank that
    is about to end for a reason of its own says that reason by its exit code. A launcher also hands Ctrl-C on to ranks
    that the terminal has sent it to already: there a second one acts only if it comes two seconds after the first.
    """

    def __init__(self, launched: bool = False) -> None:
        self.launched = launched
        self.received: str | None = None
        self._previous: dict[int, Any] = {}
        self._first: float | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if not self.launched:
            signal.signal(number, self._previous[number])
        elif number == signal.SIGINT:
            now = time.monotonic()
            self._first = now if self._first is None else self._first
            if now - self._first >= 2:
                signal.signal(number, self._previous[number])
                signal.raise_signal(number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            ending = self.launched and error is not None and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if ending else previous)


def _in_group() -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def min_over_ranks(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The least of each number over all ranks; *collective*."""
    import torch
    import torch.distributed as dist

    if not _in_group():
        return list(numbers)
    least = torch.tensor(list(numbers), dtype=torch.float64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return [float(number) for number in least.tolist()]


def any_rank(here: bool, device: torch.device) -> bool:
    """Whether something is so on any rank; *collective*."""
    return min_over_ranks([-float(here)], device)[0] < 0


def all_equal(number: float, device: torch.device) -> bool:
    """Whether all ranks hold the same number; *collective*."""
    least, greatest = min_over_ranks([number, -number], device)
    return least == -greatest


def broadcast_json(value: Any, device: torch.device) -> Any:
    """A value of rank 0 -> the same on all ranks; *collective*."""
    import torch
    import torch.distributed as dist

    if not _in_group():
        return value
    main = dist.get_rank() == 0
    text = json.dumps(value).encode() if main else b""
    size = torch.tensor([len(text)], device=device)
    dist.broadcast(size, 0)
    data = torch.empty(int(size), dtype=torch.uint8, device=device)
    if main:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(data, 0)
    return json.loads(bytes(data.cpu().tolist()))


def broadcast_notices(make: Callable[[], Iterable[Notice]], device: torch.device) -> list[Notice]:
    """The notices that rank 0 found, on all ranks; the others do not look. *Collective*."""
    import torch.distributed as dist

    main = not dist.is_initialized() or dist.get_rank() == 0
    return [Notice.from_json(one) for one in broadcast_json([n.to_json() for n in make()] if main else None, device)]


def broadcast_tensors(tensors: Mapping[str, Tensor] | None, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of rank 0, which alone brings them -> the same on all ranks, one at a time, on ``device``; *collective*."""
    import torch
    import torch.distributed as dist

    if not _in_group():
        for name, tensor in (tensors or {}).items():
            yield name, tensor.to(device)
        return
    main = dist.get_rank() == 0
    entries = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in (tensors or {}).items()]
    for name, shape, dtype in broadcast_json(entries, device):
        if main and tensors is not None:
            tensor = tensors[name].to(device).contiguous()
        else:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        dist.broadcast(tensor, 0)
        yield name, tensor
