"""Correctness on a GPU: one line a part, each against a plain reference on the CPU in float64 or against the padded, dense,
uninterrupted way on the same device.

    python scripts/gpu_check.py              on one CUDA device, within four minutes
    python scripts/gpu_check.py --tiny       the same parts on the CPU, in float32, where they can run there

Each part is a process of its own with a time limit of its own, so that one that hangs or dies takes no other with it. A part
whose package is not installed is skipped by name; it is not counted as passed. Exit code 1 if a part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "--tiny" in sys.argv:
    # Triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from nearfield.conformance.cases import OBJECTIVES, Case, decoupled_adam, difference, one_step, whole
from nearfield.conformance.tiny_models import WORDS, save_tiny_bert
from nearfield.encoders.config import EncoderConfig
from nearfield.encoders.encode import Encoder
from nearfield.encoders.load import build_encoder, load_encoder
from nearfield.encoders.packing import embed, evaluating, packed_features, padded_features
from nearfield.encoders.trials import packing_kind
from nearfield.objectives.batch import ContrastiveBatch
from nearfield.objectives.config import InfoNCEConfig
from nearfield.training.config import TrainingConfig
from nearfield.training.engine import Engine
from nearfield.training.launch import Launch
from nearfield.training.optimizers import make_optimizer

FLOAT32, BFLOAT16, BFLOAT16_WEIGHTS = 1e-4, 0.05, 0.1
"""Largest differences, relative to the largest value, that rounding may make: sums in another order, another kernel; the last
where weights are rounded too, as sharding backends do."""


@dataclass(frozen=True)
class Place:
    """Where the parts run."""

    device: torch.device
    folder: Path

    @property
    def cuda(self) -> bool:
        """Whether that is a GPU."""
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Finding:
    """One comparison of a part."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the value keeps to its limit; nothing that is not a number does."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.what} {self.value:.2g} ({sign} {self.limit:.2g})"


class Skipped(Exception):  # noqa: N818
    """A part that cannot run here, with the reason."""


def need(*packages: str) -> None:
    """Skip the part unless these packages are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}")


def need_cuda(place: Place, why: str) -> None:
    """Skip the part on a CPU."""
    if not place.cuda:
        raise Skipped(f"{why} needs CUDA")


# ---------------------------------------------------------------------------------------------------------- tiny models


def save_tiny(folder: Path, architecture: str) -> Path:
    """A random model of two layers with heads of 32 dimensions, which every kernel takes, and a tokenizer of whole words."""
    import transformers

    save_tiny_bert(folder, hidden=64, dropout=0.0)
    shared: dict[str, Any] = {
        "vocab_size": 5 + len(WORDS),
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    special = {"bos_token_id": 2, "eos_token_id": 3}
    if architecture == "bert":
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(**shared, **rates)
    elif architecture == "modernbert":
        more = {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 12, "global_attn_every_n_layers": 2}
        config = transformers.ModernBertConfig(**shared, **special, **more)
    else:
        kinds = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}
        more = {"head_dim": 32} if architecture == "qwen3" else {}
        config = kinds[architecture](**shared, **special, **more, num_key_value_heads=1)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 40 words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 41))) for _ in range(count)]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference relative to the largest value."""
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max())


# --------------------------------------------------------------------------------------------------------------- parts


def _vectors_and_gradient(model: Any, features: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings, and the gradient of a fixed sum of them in all weights."""
    device = features["input_ids"].device
    model.zero_grad()
    half = dtype == torch.bfloat16
    with evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=half):
        vectors = embed(model, features)
    weights = torch.from_numpy(np.random.default_rng(3).standard_normal(tuple(vectors.shape))).to(device)
    (vectors.double() * weights).sum().backward()
    gradient = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    return vectors.detach(), gradient


def packing(place: Place) -> Iterator[Finding]:
    """Texts end to end = padded: vectors and gradients, of encoders and decoders, causal and bidirectional."""
    dtype = torch.bfloat16 if place.cuda else torch.float32
    random = np.random.default_rng(1)
    rows = [random.integers(5, 200, size=size).astype(np.int32) for size in (7, 1, 40, 2, 33, 40, 16, 90)]
    for architecture in ("bert", "modernbert", "llama", "llama-both", "qwen3"):
        name, _, both = architecture.partition("-")
        folder = save_tiny(place.folder / architecture, name)
        config = EncoderConfig.model_validate(
            {"model": str(folder), **({"attention": "bidirectional"} if both else {})}
        )

        def ready(device: torch.device, config: EncoderConfig = config) -> Any:
            model = build_encoder(config, "cpu").model
            model.max_seq_length = 128
            return model.to(device)

        exact = ready(torch.device("cpu")).double()
        common: dict[str, Any] = {"prompt_length": 0}
        wanted = _vectors_and_gradient(
            exact, padded_features(rows, pad_token=0, side="right", device=torch.device("cpu"), **common), torch.float64
        )
        model = ready(place.device)
        padded = padded_features(rows, pad_token=0, side="right", device=place.device, **common)
        plain = _vectors_and_gradient(model, padded, dtype)
        kind = packing_kind(model, place.device, bf16=place.cuda)
        yield Finding(f"{architecture} is packed as varlen", float(kind == "varlen"), 1, at_least=True)
        if kind is None:
            continue
        found = _vectors_and_gradient(model, packed_features(rows, kind=kind, device=place.device, **common), dtype)
        for what, ours, pad, right in zip(("vectors", "gradient"), found, plain, wanted, strict=True):
            allowed = max(2 * relative(pad, right), FLOAT32)
            yield Finding(f"{architecture} {what} to float64", relative(ours, right), allowed)


def flash(place: Place) -> Iterator[Finding]:
    """The same by flash-attn's kernel, which has dropout too: replayed with its seed it gives the same vectors."""
    need("flash_attn")
    need_cuda(place, "flash-attn")
    yield from packing(place)
    folder = save_tiny(place.folder / "dropout", "bert")
    model = build_encoder(EncoderConfig(model=str(folder)), "cpu").model.to(place.device)
    for module in model.modules():
        if hasattr(module, "attention_probs_dropout_prob"):
            module.attention_probs_dropout_prob = 0.3
    model[0].auto_model.config.attention_probs_dropout_prob = 0.3
    kind = packing_kind(model, place.device, bf16=True)
    rows = [np.arange(5, 60, dtype=np.int32), np.arange(60, 80, dtype=np.int32)]
    features = packed_features(rows, kind=kind or "block", device=place.device, prompt_length=0)
    model.train()
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with torch.autocast("cuda", torch.bfloat16):
            made.append(embed(model, features).detach())
    yield Finding("dropout replayed", relative(made[1], made[0]), 0.0)
    yield Finding("dropout of another seed", relative(made[2], made[0]), 1e-3, at_least=True)


def _objective_gradient(config: InfoNCEConfig, batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    queries = batch.queries.detach().requires_grad_()
    documents = batch.documents.detach().requires_grad_()
    objective = config.build().to(queries.device)
    if queries.dtype == torch.float64:
        objective = objective.double()
    loss = objective(replace(batch, queries=queries, documents=documents))
    (loss.total / loss.denominator).backward()
    assert queries.grad is not None and documents.grad is not None
    return (loss.total / loss.denominator).detach(), torch.cat([queries.grad, documents.grad])


def triton(place: Place) -> Iterator[Finding]:
    """The loss by Triton's kernels = the whole matrix: every contrastive objective, and a large batch."""
    need("triton")
    kernels = {"implementation": "blockwise", "tiles": "triton"}
    names = [name for name, one in OBJECTIVES.items() if isinstance(one, InfoNCEConfig)]
    for name in names if place.cuda else names[:2]:
        dense = Case.make(OBJECTIVES[name], 8, save_tiny_bert(place.folder / "bert", dropout=0.0))
        loss, gradient = dense.reference()
        ours = replace(
            dense, objective=OBJECTIVES[name].model_copy(update=kernels), dtype=torch.float32, device=place.device
        )
        engine = ours.engine(Launch(), "single", dropout=False)
        result, found = ours.gradient(engine, ours.work(engine, 60), keep_graph=False)
        off = max(difference(found, gradient), abs(result.loss - loss) / abs(loss))
        yield Finding(name, off, FLOAT32)
    count, width = (4096, 256) if place.cuda else (70, 8)
    random = torch.Generator().manual_seed(0)
    sides = [nn.functional.normalize(torch.randn(count, width, generator=random, dtype=torch.float64)) for _ in "qd"]
    rows = torch.arange(count)
    ids = rows + rows.remainder(7)  # some texts stand several times: they are masked

    def batch(dtype: torch.dtype, device: torch.device) -> ContrastiveBatch:
        q, d, r, i = (x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in (*sides, rows, ids))
        return ContrastiveBatch(q, d, r, r >= 0, i, i[:, None])

    plain = InfoNCEConfig(temperature=0.05, implementation="dense", tiles="torch")
    exact = _objective_gradient(plain, batch(torch.float64, place.device))
    ours32 = _objective_gradient(plain.model_copy(update=kernels), batch(torch.float32, place.device))
    yield Finding(f"{count} texts, loss", relative(ours32[0], exact[0]), FLOAT32)
    yield Finding(f"{count} texts, gradient", relative(ours32[1], exact[1]), FLOAT32)


def float32(place: Place) -> Iterator[Finding]:
    """A whole step in float32 = one padded forward in float64 on the CPU, for every objective, in chunks kept and cached."""
    names = list(OBJECTIVES) if place.cuda else ["infonce", "cosent", "supcon"]
    folder = save_tiny_bert(place.folder / "bert")
    for name in names:
        if OBJECTIVES[name].token_task is not None or "source" in name:
            continue  # batches of several sources and hidden tokens are conformance's
        exact = Case.make(OBJECTIVES[name], 8, folder)
        loss, gradient = exact.reference()
        ours = replace(exact, dtype=torch.float32, device=place.device)
        worst = 0.0
        for keep in (True, False):
            engine = ours.engine(Launch(), "single", dropout=False)
            result, found = ours.gradient(engine, ours.work(engine, 60), keep_graph=keep)
            worst = max(worst, difference(found, gradient), abs(result.loss - loss) / abs(loss))
        yield Finding(name, worst, FLOAT32)


def bf16(place: Place) -> Iterator[Finding]:
    """A step in mixed bfloat16 = float64 within its rounding; many chunks are no worse than one."""
    exact = Case.make(OBJECTIVES["infonce"], 8, save_tiny_bert(place.folder / "bert"))
    loss, gradient = exact.reference()
    ours = replace(exact, dtype=torch.float32, device=place.device, precision="bf16-mixed")
    for budget in (10**6, 16):
        engine = ours.engine(Launch(), "single", dropout=False, packing="auto")
        result, found = ours.gradient(engine, ours.work(engine, budget), keep_graph=False)
        word = "one chunk" if budget > 1000 else "chunks of one text"
        yield Finding(f"gradient, {word}", difference(found, gradient), BFLOAT16)
        yield Finding(f"loss, {word}", abs(result.loss - loss) / abs(loss), BFLOAT16)
        wide = all(tensor.dtype == torch.float32 for tensor in found.values())
        yield Finding(f"gradients in float32, {word}", float(wide), 1, at_least=True)


def dropout(place: Place) -> Iterator[Finding]:
    """Gradient caching replays dropout: two passes = one that keeps its graph, in float32 and in bfloat16."""
    exact = Case.make(OBJECTIVES["infonce"], 8, save_tiny_bert(place.folder / "bert"), torch.float32)
    for precision, limit in (("fp32", FLOAT32), ("bf16-mixed", BFLOAT16)):
        ours = replace(exact, device=place.device, precision=precision)
        found: dict[bool, dict[str, Tensor]] = {}
        for keep in (True, False):
            engine = ours.engine(Launch(), "single", dropout=True, packing="auto")
            found[keep] = ours.gradient(engine, ours.work(engine, 60), keep_graph=keep)[1]
        yield Finding(f"cached to kept, {precision}", difference(found[False], found[True]), limit)
        engine = ours.engine(Launch(), "single", dropout=False, packing="auto")
        without = ours.gradient(engine, ours.work(engine, 60), keep_graph=True)[1]
        yield Finding(f"on to off, {precision}", difference(found[True], without), 1e-2, at_least=True)


def _sharded(place: Place, backend: str) -> Iterator[Finding]:
    """A sharding backend on one device: gradient, a checkpoint through the disk, and steps after it."""
    import torch.distributed as dist

    if place.cuda:
        torch.cuda.set_device(0)
    # DeepSpeed asks the launcher's environment.
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    store = dist.FileStore(str(place.folder / "store"), 1)
    dist.init_process_group("nccl" if place.cuda else "gloo", store=store, rank=0, world_size=1)
    folder = save_tiny_bert(place.folder / "bert")
    exact = Case.make(OBJECTIVES["infonce"], 8, folder)
    gradient = exact.reference()[1]
    # ZeRO in bfloat16 on a CPU is among conformance's equalities.
    both = place.cuda or not backend.startswith("zero")
    for precision in ("fp32", "bf16-mixed") if both else ("fp32",):
        ours = replace(exact, dtype=torch.float32, device=place.device, precision=precision)
        engine = ours.engine(Launch(), backend, dropout=False)
        found = ours.gradient(engine, ours.work(engine, 60), keep_graph=False)[1]
        limit = FLOAT32 if precision == "fp32" else BFLOAT16_WEIGHTS
        yield Finding(f"gradient, {precision}", difference(found, gradient), limit)
        yield from _resumed(place, ours, backend, f"{backend}-{precision}")
    dist.destroy_process_group()


def _resumed(place: Place, case: Case, backend: str, label: str) -> Iterator[Finding]:
    """Two steps, a checkpoint on the disk, two more in a new engine = four steps."""
    from nearfield.training.checkpoint import open_checkpoint, read_tensors, write_checkpoint

    def make() -> Engine:
        return case.engine(Launch(), backend, dropout=True, optimizer=decoupled_adam)

    def go(engine: Engine, steps: Sequence[int]) -> None:
        for step in steps:
            one_step(engine, case, 60, step=step, rate=1e-3)

    straight = make()
    go(straight, range(4))
    first = make()
    go(first, range(2))
    path = place.folder / "checkpoints" / label / "step-00000002"
    path.parent.mkdir(parents=True)
    tensors = [
        {name: tensor.cpu().contiguous() for name, tensor in whole(found).items()}
        for found in (first.backend.model_tensors(), first.backend.optimizer_tensors())
    ]
    write_checkpoint(path, 2, tensors[0], tensors[1], {})
    second = make()
    second.backend.load(*read_tensors(open_checkpoint(path)))
    go(second, range(2, 4))
    a, b = (whole(engine.backend.model_tensors()) for engine in (straight, second))
    moved = difference(a, whole(make().backend.model_tensors()))
    yield Finding(f"resumed, {label}", difference(b, a), 0.0 if not place.cuda else FLOAT32)
    yield Finding(f"moved, {label}", moved, 1e-3, at_least=True)


def fsdp2(place: Place) -> Iterator[Finding]:
    """FSDP2 on one device."""
    yield from _sharded(place, "fsdp2")


def zero1(place: Place) -> Iterator[Finding]:
    """ZeRO 1 on one device."""
    need("deepspeed")
    yield from _sharded(place, "zero1")


def zero2(place: Place) -> Iterator[Finding]:
    """ZeRO 2 on one device."""
    need("deepspeed")
    yield from _sharded(place, "zero2")


def zero3(place: Place) -> Iterator[Finding]:
    """ZeRO 3 on one device."""
    need("deepspeed")
    yield from _sharded(place, "zero3")


def resume(place: Place) -> Iterator[Finding]:
    """One device without sharding: a checkpoint through the disk, in float32 and mixed bfloat16."""
    exact = Case.make(OBJECTIVES["infonce"], 8, save_tiny_bert(place.folder / "bert"), torch.float32)
    for precision in ("fp32", "bf16-mixed"):
        ours = replace(exact, device=place.device, precision=precision)
        yield from _resumed(place, ours, "single", f"single-{precision}")


def encode(place: Place) -> Iterator[Finding]:
    """Vectors of the evaluation's encoder = sentence-transformers' own, in float32 and in bfloat16 weights."""
    from sentence_transformers import SentenceTransformer

    for architecture in ("bert", "modernbert", "llama"):
        folder = save_tiny(place.folder / architecture, architecture)
        some = texts(200 if place.cuda else 30)
        exact = torch.from_numpy(np.asarray(SentenceTransformer(str(folder), device="cpu").double().encode(some)))
        for dtype in ("float32", "bfloat16") if place.cuda else ("float32",):
            loaded = load_encoder(str(folder), device=str(place.device), dtype=dtype)
            found = torch.from_numpy(Encoder(loaded.model)(some))
            limit = FLOAT32 if dtype == "float32" else BFLOAT16
            yield Finding(f"{architecture}, {dtype}", relative(found, exact), limit)


def eight_bits(place: Place) -> Iterator[Finding]:
    """AdamW with moments in 8 bits follows torch's AdamW."""
    need("bitsandbytes")
    need_cuda(place, "AdamW in 8 bits")
    found, began = {}, torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(place.device)
    for kind in ("adamw", "adamw_8bit"):
        weight = nn.Parameter(began.clone())
        config = TrainingConfig.model_validate({"optimizer": {"kind": kind}, "learning_rate": 1e-2})
        optimizer = make_optimizer([("weight", weight)], config, place.device)
        random = torch.Generator().manual_seed(1)
        for _ in range(20):
            # A gradient with a drift, as in training: moments of pure noise say nothing.
            noise = torch.randn(512, 512, generator=random).to(place.device)
            weight.grad = weight.detach() + 0.3 * noise
            optimizer.step()
        found[kind] = weight.detach() - began
    off = (found["adamw_8bit"] - found["adamw"]).norm() / found["adamw"].norm()
    yield Finding("20 steps beside AdamW", float(off), 0.05)
    yield Finding("differs from AdamW", float(off), 1e-7, at_least=True)


def qlora(place: Place) -> Iterator[Finding]:
    """A LoRA adapter on a base in 4 bits: the base's vectors are those of its dequantised weights, and it learns."""
    need("bitsandbytes", "peft")
    need_cuda(place, "a base in 4 bits")
    from bitsandbytes.functional import dequantize_4bit

    folder = save_tiny(place.folder / "llama", "llama")
    lora = {"kind": "lora", "r": 4, "quantize": "4bit"}
    config = EncoderConfig.model_validate({"model": str(folder), "adapter": lora})
    quantised = build_encoder(config, str(place.device)).model
    plain = build_encoder(EncoderConfig(model=str(folder)), str(place.device)).model
    frozen = {
        name.replace("base_layer.", ""): dequantize_4bit(weight.data, weight.quant_state).float()
        for name, weight in quantised.named_parameters()
        if hasattr(weight, "quant_state")
    }
    yield Finding("matrices in 4 bits", float(len(frozen)), 1, at_least=True)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in frozen:
                parameter.copy_(frozen[name].view_as(parameter))
    some = texts(40)
    vectors = [torch.from_numpy(np.asarray(model.encode(some))) for model in (quantised, plain)]
    yield Finding("vectors to the dequantised base", relative(*vectors), BFLOAT16)
    before = {name: p.detach().clone() for name, p in quantised.named_parameters() if not p.requires_grad}
    trained = [p for p in quantised.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(10):
        features = {k: v.to(place.device) for k, v in quantised.preprocess(some).items() if isinstance(v, Tensor)}
        made = nn.functional.normalize(quantised(features)["sentence_embedding"].float())
        loss = nn.functional.cross_entropy(made[:20] @ made[20:].T / 0.1, torch.arange(20, device=place.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    yield Finding("loss after ten steps to the first", losses[-1] / losses[0], 0.9)
    same = all(torch.equal(p, before[name]) for name, p in quantised.named_parameters() if name in before)
    yield Finding("the base is as it was", float(same), 1, at_least=True)


def run(place: Place) -> Iterator[Finding]:
    """The whole way: a recipe is trained, saved, and loads in plain sentence-transformers with the run's own vectors."""
    need("datasets", "pyarrow", "mteb", "bm25s", "yaml", "pydantic", "typer")
    from sentence_transformers import SentenceTransformer

    import nearfield

    save_tiny(place.folder / "base", "bert")
    random = np.random.default_rng(0)
    with (place.folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(120):
            words = [str(word) for word in random.choice(WORDS, 12, replace=False)]
            row = {"query": " ".join(words[:4]), "positive": " ".join(words[:8]), "group": f"g{number}"}
            file.write(json.dumps(row) + "\n")
    data = place.folder / "data.yaml"
    data.write_text(
        "name: toy\nsources:\n  - name: pairs\n    task_type: Retrieval\n    reader: {kind: jsonl, path: pairs.jsonl}\n"
        "    examples: {kind: retrieval, query: query, positives: positive}\n    group: group\n"
        "    split: {kind: hash, fractions: {train: 0.8, test: 0.2}, seed: 0}\n",
        encoding="utf-8",
    )
    recipe = place.folder / "recipe.yaml"
    recipe.write_text(
        "name: check\ndata: data.yaml\nencoder: {model: base}\nbatches: {kind: shuffled, batch_size: 16}\n"
        f"training: {{max_steps: 6, learning_rate: 0.001, device: {place.device.type}}}\n",
        encoding="utf-8",
    )
    os.chdir(place.folder)
    result = nearfield.train(recipe)
    some = texts(20)
    ours = torch.from_numpy(Encoder(load_encoder(str(result.model), device=str(place.device)).model)(some))
    theirs = torch.from_numpy(np.asarray(SentenceTransformer(str(result.model), device="cpu").double().encode(some)))
    base = torch.from_numpy(np.asarray(SentenceTransformer(str(place.folder / "base"), device="cpu").encode(some)))
    yield Finding("vectors to plain sentence-transformers", relative(ours, theirs), FLOAT32)
    yield Finding("moved", relative(ours, base), 1e-3, at_least=True)


PARTS: dict[Callable[[Place], Iterator[Finding]], int] = {
    packing: 60,
    flash: 60,
    triton: 90,
    float32: 60,
    bf16: 30,
    dropout: 30,
    resume: 40,
    fsdp2: 60,
    zero1: 60,
    zero2: 60,
    zero3: 60,
    encode: 40,
    qlora: 60,
    eight_bits: 30,
    run: 90,
}
"""Part -> the most seconds that it may take."""


# ------------------------------------------------------------------------------------------------------------- running


def work(part: Callable[[Place], Iterator[Finding]], tiny: bool, pipe: Connection) -> None:
    """One part, in a process of its own."""
    warnings.simplefilter("ignore")
    if not tiny and not torch.cuda.is_available():
        pipe.send(("failed", "there is no CUDA device; --tiny runs on the CPU"))
        return
    torch.set_num_threads(1 if tiny else 4)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="nearfield-gpu-check-") as folder:
        place = Place(torch.device("cpu" if tiny else "cuda"), Path(folder))
        try:
            findings = list(part(place))
        except Skipped as reason:
            pipe.send(("skipped", str(reason)))
            return
        except BaseException as error:
            first = str(error).strip().splitlines() or [""]
            pipe.send(("failed", f"{type(error).__name__}: {first[0]}"))
            print(f"{part.__name__}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            return
        bad = [finding for finding in findings if not finding.holds]
        worst = max(findings, key=lambda one: -1.0 if one.at_least else one.value / max(one.limit, 1e-300))
        said = "; ".join(map(str, bad)) if bad else f"{len(findings)} comparisons, the nearest to its limit: {worst}"
        pipe.send(("failed" if bad or not findings else "passed", said))


@dataclass
class Started:
    """A part that runs."""

    name: str
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    began: float
    limit: float


def follow(started: Started) -> tuple[str, str] | None:
    """Its outcome, or None while it runs; one that is over its limit is ended."""
    if started.pipe.poll():
        try:
            outcome: tuple[str, str] = started.pipe.recv()
        except EOFError:
            started.process.join()
            return "failed", f"died with exit code {started.process.exitcode}"
        started.process.join(10)
        return outcome
    if not started.process.is_alive():
        return "failed", f"died with exit code {started.process.exitcode}"
    if time.monotonic() - started.began > started.limit:
        started.process.kill()
        started.process.join()
        return "failed", f"not finished after {started.limit:.0f} s"
    return None


def main() -> int:
    """Run the parts, a few at a time, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.__name__ for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}; all where none is named")
    parser.add_argument("--tiny", action="store_true", help="on the CPU")
    parser.add_argument("--jobs", type=int, help="parts side by side (4; 1 with --tiny)")
    parser.add_argument("--patience", type=float, default=1.0, help="what the parts' time limits are multiplied by")
    given = parser.parse_args()
    unknown = sorted(set(given.parts) - set(names))
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; parts: {', '.join(names)}")
    # Children of a fork have all imports; the parent never touches the device.
    context = multiprocessing.get_context("fork")
    waiting = [(part, limit) for part, limit in PARTS.items() if not given.parts or part.__name__ in given.parts]
    running: list[Started] = []
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    jobs = given.jobs or (1 if given.tiny else 4)
    while waiting or running:
        while waiting and len(running) < jobs:
            part, limit = waiting.pop(0)
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(part, given.tiny, there), name=part.__name__)
            process.start()
            there.close()
            running.append(Started(part.__name__, process, here, time.monotonic(), limit * given.patience))
        for started in list(running):
            outcome = follow(started)
            if outcome is not None:
                running.remove(started)
                counts[outcome[0]] += 1
                seconds = time.monotonic() - started.began
                print(f"{outcome[0]:8} {started.name:12} {seconds:5.1f} s  {outcome[1]}", flush=True)
        time.sleep(0.05)
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts["failed"] or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
