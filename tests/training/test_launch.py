"""A launcher's environment as it is read, and what is refused of it; all in one process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nearfield.errors import BadInputError
from nearfield.training import launch
from nearfield.training.backends.zero import _lossy_sums, deepspeed_config
from nearfield.training.launch import (
    BackendName,
    DeadRank,
    Launch,
    PreparationFailedError,
    RankDiedError,
    asked_backend,
)
from tests.patience import PATIENCE

VARIABLES = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "FSDP_VERSION",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def setenv(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "expected", "main"),
    [
        ({}, Launch(0, 1, 0), True),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, Launch(3, 4, 1), False),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, Launch(0, 2, 0), True),
    ],
    ids=str,
)
def test_ranks(variables: dict[str, str], expected: Launch, main: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, variables)
    launch = Launch.from_environment()
    assert launch == expected
    assert launch.is_main == main


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "two"}, "environment is broken: invalid literal"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "environment is broken: invalid literal"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "environment is broken: invalid literal"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "rank 2 of 2 processes cannot be"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "rank -1 of 2 processes cannot be"),
        ({"WORLD_SIZE": "0"}, "rank 0 of 0 processes cannot be"),
        ({"RANK": "1"}, "rank 1 of 1 processes cannot be"),
    ],
    ids=str,
)
def test_an_environment_that_cannot_be(variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, variables)
    with pytest.raises(BadInputError, match=words) as error:
        Launch.from_environment()
    assert error.value.where == "WORLD_SIZE, RANK"


@pytest.mark.parametrize("variables", [{}, {"MASTER_ADDR": "localhost"}, {"MASTER_PORT": "29500"}], ids=str)
def test_ranks_that_cannot_meet(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, variables)
    with pytest.raises(BadInputError, match="started 2 processes but did not say where they meet") as error:
        _ = Launch(1, 2, 1).store
    assert error.value.where == "MASTER_ADDR, MASTER_PORT"
    assert error.value.hint is not None and "torchrun --nproc-per-node N -m nearfield train" in error.value.hint


def test_one_process_prepares_for_itself() -> None:
    done: list[str] = []

    def work(tell: Any) -> str:
        tell("data")
        done.append("work")
        return "word"

    def verify(word: str) -> None:
        raise AssertionError("nobody else to look")

    Launch().prepare(work, verify)
    assert done == ["work"]

    def fails(tell: Any) -> str:
        raise BadInputError("no data")

    with pytest.raises(BadInputError, match="no data"):
        Launch().prepare(fails, verify)


def test_one_process_needs_no_group() -> None:
    import torch

    with Launch().process_group(torch.device("cpu"), 30) as heartbeat:
        assert heartbeat is None
        assert not torch.distributed.is_initialized()


def test_who_ends_because_of_another_ends_with_its_code() -> None:
    error = RankDiedError(DeadRank("rank 1 of 2 (on here) failed: memory ran out", 75), 0)
    assert error.exit_code == 75
    assert error.what == "rank 1 of 2 (on here) failed: memory ran out; the other ranks end too"
    assert error.where == "rank 0"


def zero(stage: int) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
NAMES: tuple[BackendName, ...] = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")


@pytest.mark.parametrize(
    ("variables", "world", "expected"),
    [
        ({}, 1, "single"),
        ({}, 2, "ddp"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "false"}, 2, "ddp"),
        (FSDP, 2, "fsdp2"),
        ({"ACCELERATE_USE_FSDP": "1"}, 2, "fsdp2"),
        (FSDP, 1, "fsdp2"),
        (zero(1), 2, "zero1"),
        (zero(2), 2, "zero2"),
        (zero(3), 4, "zero3"),
        ({**zero(3), "ACCELERATE_USE_DEEPSPEED": "1", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}, 2, "zero3"),
    ],
    ids=str,
)
def test_auto_follows_the_launcher(
    variables: dict[str, str], world: int, expected: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    setenv(monkeypatch, variables)
    assert asked_backend("auto", world) == expected
    assert asked_backend(expected, world) == expected, "to ask for the same by name is no contradiction"
    if expected not in ("single", "ddp"):
        for other in NAMES:
            if other != expected:
                with pytest.raises(BadInputError) as error:
                    asked_backend(other, world)
                assert error.value.what == f"the launcher asks for {expected}, the recipe for {other}"
                assert error.value.where == "training.backend"
                assert error.value.hint == "Set training.backend=auto to follow the launcher."


@pytest.mark.parametrize("name", NAMES)
def test_without_a_launchers_word_the_recipes_holds(name: BackendName) -> None:
    assert asked_backend(name, 1) == name
    if name == "single":
        with pytest.raises(BadInputError, match="is single, and the launcher started 2 processes"):
            asked_backend(name, 2)
    else:
        assert asked_backend(name, 2) == name


def test_fsdp_of_version_1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"})
    with pytest.raises(BadInputError, match="asks for FSDP 1") as error:
        asked_backend("auto", 2)
    assert error.value.hint == "Set fsdp_version: 2, or use training/accelerate/fsdp2.yaml."


@pytest.mark.parametrize("stage", [0, 4, None])
def test_deepspeed_without_zero_is_refused(stage: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, {"ACCELERATE_USE_DEEPSPEED": "true"} if stage is None else zero(stage))
    with pytest.raises(BadInputError, match=f"ZeRO stage {stage}; 1, 2 or 3 is wanted") as error:
        asked_backend("auto", 2)
    assert error.value.where == "accelerate's configuration"


def test_the_stage_is_that_of_deepspeeds_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ds.json"
    setenv(monkeypatch, {**zero(3), "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    with pytest.raises(BadInputError, match="this DeepSpeed configuration does not exist"):
        asked_backend("auto", 2)
    file.write_text("{")
    with pytest.raises(BadInputError, match="not valid JSON"):
        asked_backend("auto", 2)
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert asked_backend("auto", 2) == "zero2"
    file.write_text("{}")
    with pytest.raises(BadInputError, match="ZeRO stage 0; 1, 2 or 3 is wanted") as error:
        asked_backend("auto", 2)
    assert error.value.where == str(file)


# The configuration that is handed to DeepSpeed.


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_shipped_file_of_a_stage_with_what_the_recipe_decides(stage: int, bf16: bool) -> None:
    names: dict[int, BackendName] = {1: "zero1", 2: "zero2", 3: "zero3"}
    config = deepspeed_config(names[stage], bf16, 4, 0.5)
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_batch_size"] == 4
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == 0.5
    assert config["managed_gradient_accumulation"] is False
    assert config["bf16"]["enabled"] is bf16
    assert config["bf16"].get("check_grad_overflow", False) is bf16
    assert not {"optimizer", "scheduler", "fp16"} & set(config)
    assert deepspeed_config(names[stage], bf16, 4, None)["gradient_clipping"] == 0.0


def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any) -> Path:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    return file


def test_the_launchers_file_is_kept_but_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 17, "offload_param": {"device": "nvme"}},
        "wall_clock_breakdown": True,
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }
    write(tmp_path, monkeypatch, mine)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    config = deepspeed_config("zero3", False, 2, 1.0)
    assert config["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 17,
        "offload_param": {"device": "nvme"},
        "offload_optimizer": {"device": "cpu"},
    }
    assert config["wall_clock_breakdown"] is True
    assert (config["train_batch_size"], config["gradient_clipping"]) == (2, 1.0)


@pytest.mark.parametrize(
    "more", [{}, {"data_types": None}, {"data_types": {}, "communication_data_type": "auto"}], ids=str
)
def test_gradients_are_added_in_float32_also_by_files_that_do_not_say_so(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, monkeypatch, {"zero_optimization": {"stage": 1}, **more})
    config = deepspeed_config("zero1", True, 2, 1.0)
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
    assert _lossy_sums(config) == []


def test_a_file_that_asks_for_less_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "fp16"}
    write(tmp_path, monkeypatch, {"zero_optimization": {"stage": 1}, **asked})
    found = _lossy_sums(deepspeed_config("zero1", True, 2, 1.0))
    assert found == ["grad_accum_dtype: bf16", "communication_data_type: fp16"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([1], "is not an object"),
        ({"data_types": "fp32"}, "data_types of this DeepSpeed configuration is not an object"),
        ({}, "has stage None, and zero2 was asked for"),
        ({"zero_optimization": {"stage": 3}}, "has stage 3, and zero2 was asked for"),
        ({"optimizer": {"type": "AdamW"}}, "sets 'optimizer', which is the recipe's to say"),
        ({"scheduler": {}}, "sets 'scheduler', which is the recipe's to say"),
        ({"fp16": {"enabled": True}}, "sets 'fp16', which is the recipe's to say"),
        ({"train_batch_size": 64}, "sets 'train_batch_size', which the recipe and the plan decide"),
        ({"train_micro_batch_size_per_gpu": 8}, "sets 'train_micro_batch_size_per_gpu'"),
        ({"gradient_accumulation_steps": 2}, "sets 'gradient_accumulation_steps'"),
        ({"gradient_clipping": 1.0}, "sets 'gradient_clipping'"),
    ],
    ids=str,
)
def test_settings_that_are_not_deepspeeds_to_say(
    config: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(config, dict) and config and "zero_optimization" not in config:
        config = {"zero_optimization": {"stage": 2}, **config}
    file = write(tmp_path, monkeypatch, config)
    with pytest.raises(BadInputError, match=words) as error:
        deepspeed_config("zero2", True, 2, 1.0)
    assert error.value.where == str(file)


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "none.json"))
    with pytest.raises(BadInputError, match="does not exist"):
        deepspeed_config("zero1", False, 2, None)


class SharedStore:
    """The calls of the ranks' store that are needed here, in one process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        with self.lock:
            self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def add(self, key: str, amount: int) -> int:
        with self.lock:
            total = int(self.values.get(key, b"0")) + amount
            self.values[key] = str(total).encode()
        return total


def in_ranks(
    monkeypatch: pytest.MonkeyPatch, world_size: int, run: Callable[[Launch], Any]
) -> list[tuple[Any, BaseException | None]]:
    """The result or error of ``run`` on each rank; the ranks are threads that share a store."""
    monkeypatch.setattr(Launch, "store", SharedStore())
    monkeypatch.setattr("nearfield.training.launch._SPEAK_SECONDS", 0.0)
    outcomes: list[tuple[Any, BaseException | None]] = [(None, None)] * world_size
    launches = [Launch(rank, world_size, rank) for rank in range(world_size)]

    def of_rank(rank: int) -> None:
        try:
            outcomes[rank] = (run(launches[rank]), None)
        except BaseException as error:
            outcomes[rank] = (None, error)

    threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return outcomes


def test_ranks_that_wait_help_with_what_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    done: dict[str, list[int]] = {"a": [], "b": []}

    def run(launch: Launch) -> list[str]:
        told: list[str] = []

        def work(tell: Callable[[str], None]) -> str:
            for task in done:
                launch.divide(task, lambda task=task: done[task].append(0))
                assert sorted(done[task]) == [0, 1, 2], "all parts are done before the work goes on"
            return "word"

        launch.prepare(work, told.append, lambda task: done[task].append(launch.rank))
        return told

    assert in_ranks(monkeypatch, 3, run) == [([], None), (["word"], None), (["word"], None)]
    assert {task: sorted(ranks) for task, ranks in done.items()} == {"a": [0, 1, 2], "b": [0, 1, 2]}


def test_one_process_does_all_of_what_is_divided() -> None:
    done: list[str] = []
    Launch().prepare(lambda tell: Launch().divide("a", lambda: done.append("a")) or "", print, print)
    assert done == ["a"]


def test_a_rank_that_cannot_help_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(launch: Launch) -> None:
        def work(tell: Callable[[str], None]) -> str:
            launch.divide("a", lambda: None)
            return ""

        def helping(task: str) -> None:
            raise BadInputError("no teacher here", where="rank 1's disk")

        launch.prepare(work, print, helping)

    (_, main), (_, other) = in_ranks(monkeypatch, 2, run)
    assert isinstance(other, BadInputError)
    assert isinstance(main, PreparationFailedError)
    assert "rank 1 could not prepare the run: rank 1's disk: no teacher here" in str(main)
    assert main.exit_code == 2


def test_a_heartbeat_that_was_stopped_is_out_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the interpreter ends no thread may be inside the store: the process would end with SIGABRT."""

    from torch.distributed import HashStore

    monkeypatch.setattr(launch, "_BEAT_SECONDS", 0.01)

    class SlowStore(HashStore):  # type: ignore[misc]
        inside = threading.Event()
        entered = threading.Event()

        def check(self, keys: list[str]) -> bool:
            self.inside.set()
            self.entered.set()
            time.sleep(0.3)
            self.inside.clear()
            return bool(super().check(keys))

    store = SlowStore()
    beating = launch.Heartbeat(store, 0, 2, lambda code: None)
    beating.start()
    assert store.entered.wait(PATIENCE)
    beating.stop()
    assert not beating._thread.is_alive()
    assert not store.inside.is_set()
