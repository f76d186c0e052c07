"""Several ranks through the real launchers: the shipped files, precision, refusals, ranks that wait, stop and die."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nearfield.conformance.tiny_models import save_tiny_clip
from nearfield.evaluation import evaluate
from nearfield.files import read_metrics
from nearfield.pipeline import open_run, run_stages
from nearfield.shipped import copy_shipped
from nearfield.training.checkpoint import Checkpoint, checkpoint_paths, open_checkpoint
from tests.conftest import WORDS, write_toy_recipe
from tests.evaluation.conftest import Tasks
from tests.patience import PATIENCE
from tests.training.launching import (
    BIN,
    PYTHONPATH,
    ROOT,
    SGD,
    TORCHRUN,
    environment,
    launch,
    train_record,
)

BACKENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
LORA = "encoder.adapter={kind: lora, r: 4}"
Told = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, toy_data: Path) -> Path:
    """A folder with the toy recipe; its runs share their data."""
    folder = tmp_path_factory.mktemp("launching")
    write_toy_recipe(folder, tiny_model, toy_data)
    write_clip_recipe(folder)
    return folder


def write_clip_recipe(folder: Path) -> None:
    """Words and pictures of a colour each, for a tiny CLIP folder."""
    save_tiny_clip(folder / "clip")
    rows = []
    for number in range(8):
        Image.new("RGB", (16, 16), (30 * number, 0, 255 - 30 * number)).save(folder / f"{number}.png")
        rows.append({"name": f"word{number}", "image": f"{number}.png"})
    (folder / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "pictures.yaml").write_text(
        "name: colours\nsources:\n  - name: colours\n    task_type: Any2AnyRetrieval\n"
        "    reader: {kind: jsonl, path: pictures.jsonl}\n    examples: {kind: retrieval, query: name, positives: image}\n"
        "    images: {columns: [image]}\n    split: {kind: all}\n"
    )
    (folder / "clip.yaml").write_text(
        "name: clip\ndata: pictures.yaml\nencoder: {model: clip}\nobjective: {kind: infonce, both_directions: true}\n"
        "batches: {kind: single_source, batch_size: 4}\n"
        "training: {max_steps: 2, learning_rate: 1.0e-2, micro_batch_tokens: 48, graph_tokens: 48, trackers: []}\n"
    )


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    """The model of one process after four steps of SGD."""
    run_stages(open_run(folder / "toy.yaml", SGD, folder / "runs" / "single"), "train")
    return folder / "runs" / "single" / "model"


def scenarios(folder: Path, model: Path) -> Iterator[dict[str, Any]]:
    """The scenarios of the ranks of one launch, one after the other."""
    score = ["eval", str(model), "--suite", str(folder / "tasks"), "--no-cache", "--out"]
    yield {"name": "scored", "arguments": [*score, str(folder / "scored"), "--json", str(folder / "scored.json")]}
    yield {"name": "unscored", "arguments": [*score, str(folder / "unscored"), "--tasks", "Nothing"]}

    def scenario(name: str, *settings: str, **more: Any) -> dict[str, Any]:
        run = ["--run-folder", str(folder / "runs" / name), "--until", "train"]
        # Memory is not measured: that is tested elsewhere.
        budget = ["training.micro_batch_tokens=512", "training.graph_tokens=65536"]
        return {"name": name, "arguments": ["train", str(folder / "toy.yaml"), *SGD, *budget, *settings, *run], **more}

    for backend in BACKENDS:
        # One of them as accelerate asks for it.
        asked = {"environment": FSDP} if backend == "fsdp2" else {}
        yield scenario(backend, f"training.backend={'auto' if asked else backend}", **asked)
    for backend, precision in PRECISIONS:
        yield scenario(f"{backend}-{precision}", f"training.backend={backend}", f"training.precision={precision}")
    for backend, precision in ADAPTERS:
        settings = [f"training.backend={backend}", f"training.precision={precision}", LORA]
        yield scenario(f"lora-{backend}-{precision}", *settings)
    half = ["training.backend=zero1", "training.precision=bf16-mixed"]
    stopped = scenario("zero1-stopped", *half, faults={"0": {"terminated": [2]}})
    yield stopped
    yield {"name": "zero1-resumed", "arguments": stopped["arguments"]}
    for backend, precision in CLIPS:
        run = ["--run-folder", str(folder / "runs" / f"clip-{backend}"), "--until", "train"]
        settings = [f"training.backend={backend}", f"training.precision={precision}"]
        yield {"name": f"clip-{backend}", "arguments": ["train", str(folder / "clip.yaml"), *settings, *run]}
    for backend, during in CHANGING.items():
        yield scenario(f"changing-{backend}", f"training.backend={backend}", *MINED, during)
    # Another maximum length: the tokens of the runs before are of no use.
    waiting = ["training.collective_timeout=15", "encoder.max_length=33"]
    yield scenario("slow", *waiting, faults={"0": {"slow": [20]}})
    yield scenario("elsewhere", more={"1": ["--run-folder", str(folder / "other machine" / "run")]})
    yield scenario("broken", faults={"0": {"broken": []}})
    yield scenario("unready", faults={"1": {"unready": []}})
    yield scenario("terminated-0", faults={"0": {"terminated": [2]}})
    yield scenario("terminated-1", "training.backend=fsdp2", faults={"1": {"terminated": [2]}})
    yield scenario("repeated", *SHORT, faults={"1": {"short of memory": [3]}})
    # The fault is still there: without the smaller budget the resumed run would stop again.
    again = [*short_arguments(folder), "--resume"]
    yield {"name": "short-resumed", "arguments": again, "faults": {"1": {"short of memory": [1]}}}
    for name, (setting, variables, _) in REFUSED.items():
        yield scenario(name, setting, environment=variables)
    yield scenario("mixed", environment={"ACCELERATE_MIXED_PRECISION": "bf16"})


def short_arguments(folder: Path) -> list[str]:
    """Of a training in which memory runs out on a rank."""
    settings = [*SGD, *SHORT, "training.backend=fsdp2"]
    return [
        "train",
        str(folder / "toy.yaml"),
        *settings,
        "--run-folder",
        str(folder / "runs" / "short"),
        "--until",
        "train",
    ]


@pytest.fixture(scope="module")
def short(folder: Path) -> tuple[subprocess.CompletedProcess[str], Checkpoint]:
    """A launch of its own, as its processes end; and the checkpoint that they leave."""
    faulty = str(Path(__file__).with_name("faulty_rank.py"))
    done = launch([*TORCHRUN, faulty, "1", "6", *short_arguments(folder)])
    return done, open_checkpoint(checkpoint_paths(folder / "runs" / "short" / "checkpoints")[-1])


PRECISIONS = [
    ("ddp", "bf16-mixed"),
    ("ddp", "bf16-pure"),
    ("fsdp2", "bf16-mixed"),
    ("fsdp2", "bf16-pure"),
    ("zero1", "bf16-mixed"),
    ("zero2", "bf16-mixed"),
    ("zero3", "bf16-pure"),
]
ADAPTERS = [("ddp", "bf16-pure"), ("fsdp2", "bf16-mixed"), ("zero1", "bf16-mixed"), ("zero3", "bf16-mixed")]
CLIPS = [("fsdp2", "fp32"), ("zero1", "bf16-mixed"), ("zero3", "fp32")]
MINED = [
    "mining={rules: [{kind: naive}], negatives: 6, depth: 8, explicit: replace}",
    "batches.negatives=2",
]
CHANGING = {
    "ddp": "mining.during={kind: refresh, every_steps: 2}",
    "fsdp2": "mining.during={kind: dynamic, rule: conan_v2, below: 1.0}",
}
SHORT = ["training.micro_batch_tokens=160", "training.gradient_cache=always", "training.max_steps=8"]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
REFUSED: dict[str, tuple[str, dict[str, str], str]] = {
    "contradiction": ("training.backend=ddp", FSDP, "the launcher asks for fsdp2, the recipe for ddp"),
    "fsdp1": ("seed=0", {**FSDP, "FSDP_VERSION": "1"}, "the launcher asks for FSDP 1; nearfield trains with FSDP 2"),
    "alone": ("training.backend=single", {}, "training.backend is single, and the launcher started 2 processes"),
    "zero0": ("seed=0", {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "DeepSpeed with ZeRO stage 0"),
    "no-file": ("seed=0", {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere/zero2.json"}, "does not exist"),
    "slices": ("training.optimizer.kind=muon", FSDP, "the optimiser muon needs whole tensors"),
    "no-gpu": ("training.device=cuda", {}, "training.device is cuda, but no CUDA device is here"),
}


@pytest.fixture(scope="module")
def told(folder: Path, short: object, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The reports of both ranks on each scenario."""
    out = tmp_path_factory.mktemp("told")
    tasks, words = Tasks(folder / "tasks"), random.Random(0)
    # Of words that the model knows: texts of the same tokens are encoded once.
    texts = sorted({" ".join(words.sample(WORDS, 6)) for _ in range(450)})[:400]
    scores = [float(words.randrange(6)) for _ in range(200)]
    tasks.table(
        tasks.sts(count=200) / "default.test.parquet", sentence1=texts[:200], sentence2=texts[200:], score=scores
    )
    cases = list(scenarios(folder, tiny_model))
    (out / "scenarios.json").write_text(json.dumps(cases))
    script = str(Path(__file__).with_name("ranks_launched.py"))
    done = launch([*TORCHRUN, script, str(out / "scenarios.json"), str(out)], PYTHONPATH=PYTHONPATH)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        case["name"]: [json.loads((out / f"{case['name']}-{rank}.json").read_text()) for rank in (0, 1)]
        for case in cases
    }


def check_model(model: Path, single: Path, tiny_model: Path, tolerance: float = 1e-5) -> None:
    """It is complete, of the same format as one process's, and has its weights, which have moved."""
    files = {path.relative_to(single) for path in single.rglob("*") if path.is_file()}
    assert {path.relative_to(model) for path in model.rglob("*") if path.is_file()} == files
    for file in files:
        if file.suffix == ".json":
            assert (model / file).read_bytes() == (single / file).read_bytes(), file
    ours, expected = load_file(model / "model.safetensors"), load_file(single / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {
        n: (t.dtype, t.shape) for n, t in expected.items()
    }
    assert max(float((ours[name] - tensor).abs().max()) for name, tensor in expected.items()) <= tolerance
    start = load_file(tiny_model / "model.safetensors")
    assert max(float((ours[name] - tensor).abs().max()) for name, tensor in start.items()) > 100 * tolerance


def fine(told: Told, name: str) -> dict[str, Any]:
    """Rank 0's report on a scenario that both ranks ended well."""
    codes = [rank["code"] for rank in told[name]]
    assert codes == [0, 0], told[name][0]["stderr"] + told[name][1]["stderr"]
    return told[name][0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_backends_give_the_model_of_one_process(
    told: Told, folder: Path, single: Path, tiny_model: Path, backend: str
) -> None:
    said = fine(told, backend)
    run = folder / "runs" / backend
    assert (train_record(run)["backend"], train_record(run)["world_size"]) == (backend, 2)
    assert f"Backend {backend} in effect on 2 process(es), cpu, fp32" in said["stderr"]
    module = {"ddp": "EmbeddingModule", "fsdp2": "FSDPEmbeddingModule"}.get(backend, "DeepSpeedEngine")
    parameter = "DTensor" if backend == "fsdp2" else "Parameter"
    for rank in told[backend]:
        assert rank["seen"]["module"] == [module]
        assert rank["seen"]["parameters"] == [f"base torch.float32 {parameter}"]
    check_model(run / "model", single, tiny_model)


@pytest.mark.parametrize("backend", CHANGING)
def test_all_ranks_choose_the_negatives_of_one_process(
    told: Told, folder: Path, tiny_model: Path, backend: str
) -> None:
    fine(told, f"changing-{backend}")
    alone, run = folder / "runs" / f"changing-single-{backend}", folder / "runs" / f"changing-{backend}"
    run_stages(open_run(folder / "toy.yaml", [*SGD, *MINED, CHANGING[backend]], alone), "train")
    check_model(run / "model", alone / "model", tiny_model)
    if backend == "ddp":
        pools = [load_file(part / "negatives" / "generation-00001" / "pool.safetensors") for part in (alone, run)]
        assert all(torch.equal(pools[0][name], pools[1][name]) for name in ("examples", "offsets", "negatives"))
    else:
        ends = [load_file(checkpoint_paths(part / "checkpoints")[-1] / "extra.safetensors") for part in (alone, run)]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ("ranks", "next"))
        assert (ends[0]["next"] > 2).any(), "some were exchanged"


@pytest.mark.parametrize(("backend", "precision"), PRECISIONS)
def test_precision(told: Told, folder: Path, single: Path, backend: str, precision: str) -> None:
    fine(told, f"{backend}-{precision}")
    run = folder / "runs" / f"{backend}-{precision}"
    assert train_record(run)["precision"] == precision
    for rank in told[f"{backend}-{precision}"]:
        assert rank["seen"]["embeddings"] == rank["seen"]["loss"] == ["torch.float32"]
        # DeepSpeed computes with a copy in bfloat16; its float32 weights are in the optimiser.
        working = "float32" if precision == "bf16-mixed" and not backend.startswith("zero") else "bfloat16"
        assert [name.split()[1] for name in rank["seen"]["parameters"]] == [f"torch.{working}"]
    weights = load_file(run / "model" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32 if precision == "bf16-mixed" else torch.bfloat16}
    expected = load_file(single / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name].float(), tensor, rtol=0.02, atol=0.02, msg=name)


def test_zero_1_in_bfloat16_goes_on_from_its_checkpoint(told: Told, folder: Path) -> None:
    """It died at its first checkpoint; resumed, it ends with the very weights of the run that was not stopped."""
    assert [rank["code"] for rank in told["zero1-stopped"]] == [3, 3]
    fine(told, "zero1-resumed")
    assert train_record(folder / "runs" / "zero1-stopped")["resumed_from"] == 2
    resumed, whole = (
        load_file(folder / "runs" / name / "model" / "model.safetensors")
        for name in ("zero1-stopped", "zero1-bf16-mixed")
    )
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(("backend", "precision"), CLIPS)
def test_a_clip_folder_keeps_its_scalar(told: Told, folder: Path, backend: str, precision: str) -> None:
    fine(told, f"clip-{backend}")
    run = folder / "runs" / f"clip-{backend}"
    assert (train_record(run)["backend"], train_record(run)["precision"]) == (backend, precision)
    start, found = (load_file(path / "model.safetensors") for path in (folder / "clip", run / "model"))
    assert found["logit_scale"].shape == () and torch.equal(found["logit_scale"], start["logit_scale"])
    assert found.keys() == start.keys()
    moved = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(found[moved], start[moved])


@pytest.mark.parametrize(("backend", "precision"), ADAPTERS)
def test_adapters_are_in_float32(told: Told, folder: Path, backend: str, precision: str) -> None:
    name = f"lora-{backend}-{precision}"
    fine(told, name)
    for rank in told[name]:
        kinds = {tuple(line.split()[:2]) for line in rank["seen"]["parameters"]}
        working = "bfloat16" if backend.startswith("zero") else "float32"
        assert kinds == {("adapter", f"torch.{working}")}
        assert rank["seen"]["embeddings"] == rank["seen"]["loss"] == ["torch.float32"]
    kept = load_file(checkpoint_paths(folder / "runs" / name / "checkpoints")[-1] / "model.safetensors")
    adapters = [tensor.dtype for key, tensor in kept.items() if "lora_" in key]
    assert adapters and set(adapters) == {torch.float32}


def test_an_adapter_in_another_type_than_its_base_cannot_be_sharded(folder: Path) -> None:
    """Refused before anything is built, by one process too: it need not be tried on many."""
    from nearfield.errors import BadInputError
    from nearfield.training import TrainingConfig
    from nearfield.training.engine import check_can_train
    from nearfield.training.launch import Launch

    config = TrainingConfig.model_validate({"backend": "fsdp2", "precision": "bf16-pure", "device": "cpu"})
    with pytest.raises(BadInputError, match="FSDP2 shards parameters of one type") as error:
        check_can_train(config, Launch(0, 2, 0), adapter=True)
    assert error.value.hint is not None and "bf16-mixed" in error.value.hint
    check_can_train(config, Launch(0, 2, 0), adapter=False)


def test_all_ranks_encode_what_the_first_scores(told: Told, folder: Path, tiny_model: Path) -> None:
    """Of 400 texts each rank encodes half; the score is that of one process."""
    for rank in told["scored"]:
        assert rank["code"] == 0, rank["stderr"]
        assert rank["encoded"] == 200
    assert "does not share" not in told["scored"][0]["stderr"]
    alone = evaluate(str(tiny_model), folder / "tasks", folder / "alone").scores["TinySTS"]["default"]
    assert json.loads((folder / "scored.json").read_text())["TinySTS"]["default"] == pytest.approx(alone, abs=1e-6)
    assert [path.name for path in (folder / "scored").iterdir()] == ["local__tiny-bert"], (
        "no files of the exchange are left"
    )


def test_a_suite_that_cannot_be_scored_ends_all_ranks(told: Told) -> None:
    here, there = told["unscored"]
    assert (here["code"], there["code"]) == (2, 2)
    assert "Nothing" in here["stderr"] and "rank 0 could not prepare the run" in there["stderr"]


def test_a_data_stage_may_outlast_the_collective_timeout(told: Told, folder: Path) -> None:
    fine(told, "slow")
    assert told["slow"][1]["seconds"] > 20
    assert re.search(r"Rank 1 waits for rank 0 \(tokens\), \d+ s so far", told["slow"][1]["stderr"])
    assert train_record(folder / "runs" / "slow")["steps"] == 4


def test_a_node_without_the_files_is_refused(told: Told, folder: Path) -> None:
    here, there = told["elsewhere"]
    assert (here["code"], there["code"]) == (2, 2)
    missing = folder / "other machine"
    assert f"nearfield: {missing}" in there["stderr"]
    assert "this node does not hold the data that rank 0 prepared" in there["stderr"]
    assert f"nearfield train {folder / 'toy.yaml'} --until plan" in there["stderr"]
    assert "rank 1 could not prepare the run" in here["stderr"]
    assert not (folder / "runs" / "elsewhere" / "checkpoints").exists()


def test_a_data_stage_that_fails_ends_all(told: Told) -> None:
    here, there = told["broken"]
    assert (here["code"], there["code"]) == (2, 2)
    assert here["stderr"].count("nearfield: ") == there["stderr"].count("nearfield: ") == 1
    assert "nearfield: rank 1: rank 0 could not prepare the run: somewhere: the disk is on fire" in there["stderr"]


def test_a_rank_that_fails_before_the_process_group_ends_all(told: Told) -> None:
    here, there = told["unready"]
    assert there["code"] == "OSError: no model on this machine"
    assert here["code"] == 1
    assert "rank 1 could not prepare the run: OSError: no model on this machine" in here["stderr"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_stops_all_after_a_checkpoint(told: Told, folder: Path, rank: int) -> None:
    ranks = told[f"terminated-{rank}"]
    assert [told["code"] for told in ranks] == [3, 3]
    assert "stopped by SIGTERM after step 2 of 4" in ranks[rank]["stderr"]
    assert "stopped by another rank after step 2 of 4" in ranks[1 - rank]["stderr"]
    checkpoints = checkpoint_paths(folder / "runs" / f"terminated-{rank}" / "checkpoints")
    assert checkpoints[-1].name == "step-00000002"


def test_memory_that_runs_out_on_one_rank_is_repeated_by_all(told: Told, folder: Path) -> None:
    """In place, where chunks hold no collectives."""
    assert "Memory ran out in step 3: 80 tokens at a time from now on" in fine(told, "repeated")["stderr"]
    run = folder / "runs" / "repeated"
    assert len(read_metrics(run / "metrics.jsonl")) == 8
    assert open_checkpoint(checkpoint_paths(run / "checkpoints")[-1]).state["micro_batch_tokens"] == 80


def test_memory_that_runs_out_on_one_rank_stops_sharded_ranks_which_go_on_with_less(
    short: tuple[subprocess.CompletedProcess[str], Checkpoint], told: Told, folder: Path
) -> None:
    (stopped, last), run = short, folder / "runs" / "short"
    assert stopped.returncode != 0
    codes = [int(code) for code in re.findall(r"exitcode\s*:\s*(-?\d+)", stopped.stderr)]
    assert codes and set(codes) == {75}, stopped.stderr
    assert "memory ran out in step 6 with 160 tokens at a time" in stopped.stderr
    assert 'File "' + str(ROOT / "tests") not in stopped.stderr, "no traceback of ours"
    assert (last.step, last.state["micro_batch_tokens"]) == (4, 80)
    fine(told, "short-resumed")
    assert train_record(run)["resumed_from"] == 4
    assert len(read_metrics(run / "metrics.jsonl")) == 8


@pytest.mark.parametrize("name", REFUSED)
def test_launches_that_cannot_be(told: Told, folder: Path, name: str) -> None:
    """Each is refused before anything is built, with the reason on both ranks and without a traceback."""
    for rank in told[name]:
        assert rank["code"] == 2
        assert REFUSED[name][2] in rank["stderr"]
        assert rank["stderr"].count("nearfield: ") == 1
        assert "Traceback" not in rank["stderr"]
    assert not (folder / "runs" / name / "plan").exists()


def test_precision_of_the_launcher_is_not_used_and_that_is_said(told: Told) -> None:
    assert "The launcher's mixed precision (bf16) is not used" in fine(told, "mixed")["stderr"]


def test_ranks_without_a_meeting_place(folder: Path) -> None:
    lonely = environment(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    lonely = {name: value for name, value in lonely.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, "-m", "nearfield", "train", str(folder / "toy.yaml")]
    done = subprocess.run(command, env=lonely, capture_output=True, text=True, timeout=PATIENCE, cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("nearfield: MASTER_ADDR, MASTER_PORT: the launcher started 2 processes")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    """A folder as `nearfield init` makes it, away from the repository."""
    copy_shipped(folder / "project")
    return folder / "project"


def accelerate(backend: str, recipe: Path, run: Path) -> list[str]:
    command = [str(BIN / "accelerate"), "launch", "--config_file", f"training/accelerate/{backend}.yaml"]
    return [*command, "-m", "nearfield", "train", str(recipe), *SGD, "--run-folder", str(run), "--until", "train"]


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("fsdp2", marks=pytest.mark.slow),
        pytest.param("zero1", marks=pytest.mark.slow),
        "zero2",
        pytest.param("zero3", marks=pytest.mark.slow),
    ],
)
def test_the_shipped_files_under_accelerate(
    project: Path, folder: Path, single: Path, tiny_model: Path, backend: str
) -> None:
    """No precision, backend or number of processes is said: all is in the file."""
    run = folder / "runs" / f"accelerate-{backend}"
    done = launch(accelerate(backend, folder / "toy.yaml", run), cwd=project)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Backend {backend} in effect on 2 process(es), cpu, fp32" in done.stderr
    assert (train_record(run)["backend"], train_record(run)["world_size"]) == (backend, 2)
    check_model(run / "model", single, tiny_model)


@pytest.mark.slow
def test_the_file_for_one_process(project: Path, folder: Path, single: Path, tiny_model: Path) -> None:
    run = folder / "runs" / "accelerate-one"
    done = launch(accelerate("one-process", folder / "toy.yaml", run), cwd=project)
    assert done.returncode == 0, done.stderr[-3000:]
    assert train_record(run)["backend"] == "single"
    check_model(run / "model", single, tiny_model, tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "backend"),
    [*(("torchrun", backend) for backend in BACKENDS), ("deepspeed", "fsdp2"), ("deepspeed", "zero2")],
)
def test_other_launchers(folder: Path, single: Path, tiny_model: Path, launcher: str, backend: str) -> None:
    run = folder / "runs" / f"{launcher}-{backend}"
    start = {
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "-m"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--module"],
    }[launcher]
    train = ["nearfield", "train", str(folder / "toy.yaml"), *SGD, f"training.backend={backend}"]
    # The launcher deepspeed counts processor sockets where there is no GPU, unless it is told of devices.
    done = launch([*start, *train, "--run-folder", str(run), "--until", "train"], DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (train_record(run)["backend"], train_record(run)["world_size"]) == (backend, 2)
    check_model(run / "model", single, tiny_model)


@pytest.mark.slow
def test_a_data_stage_of_ninety_seconds(folder: Path, tmp_path: Path) -> None:
    """As the short one, in a launch of its own and with the real patience."""
    run = folder / "runs" / "ninety"
    arguments = ["train", str(folder / "toy.yaml"), *SGD, "training.collective_timeout=30", "encoder.max_length=34"]
    arguments += ["--run-folder", str(run), "--until", "train"]
    case = {"name": "ninety", "arguments": arguments, "faults": {"0": {"slow": [90]}}}
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    script = str(Path(__file__).with_name("ranks_launched.py"))
    done = launch([*TORCHRUN, script, str(tmp_path / "cases.json"), str(tmp_path)], PYTHONPATH=PYTHONPATH)
    assert done.returncode == 0, done.stderr
    here, there = (json.loads((tmp_path / f"ninety-{rank}.json").read_text()) for rank in (0, 1))
    assert (here["code"], there["code"]) == (0, 0), here["stderr"] + there["stderr"]
    assert re.search(r"Rank 1 waits for rank 0 \(tokens\), 8[0-9] s so far", there["stderr"])
    assert train_record(run)["steps"] == 4
