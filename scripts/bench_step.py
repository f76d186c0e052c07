"""A training step of nearfield beside one of sentence-transformers: same model, texts, batch, optimiser; A B A B.

    python scripts/bench_step.py --json step.json
    python scripts/bench_step.py --dropout off
    python scripts/bench_step.py --cached --batch 128

The peer is MultipleNegativesRankingLoss (with --cached its cached form) as its trainer runs it: each column padded to
its longest text, loss, backward, clipping to 1, AdamW. Each side lives in a process of its own, as in a real training, and they
take turns. The losses of both are compared first, without dropout. Time is CPU seconds; tokenising is left out on both
sides, making batches of token ids is not. Around each step the machine's peak is measured on GEMMs of the model's own
shapes. Leaves with 1 if a check fails, or the ratio is below --floor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench_parts import MAX_LENGTH, MODEL, load_model, make_texts, measure_peak, model_flop, tokenise

TEMPERATURE = 0.05
RATE = 2e-5
CPU = torch.device("cpu")


@dataclass
class Side:
    """One of the two that are compared."""

    name: str
    step: Callable[[int], float]
    """Does one training step on a numbered batch and returns its loss."""
    loss: Callable[[int], float]
    """The loss of a batch without dropout; nothing is trained."""
    rows: Callable[[int], int]
    tokens: Callable[[int], tuple[int, int]]
    """Real tokens of a batch, and those that are computed."""
    dropout: Callable[[], list[float]]


def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
    from nearfield.training import optimizers
    from nearfield.training.config import TrainingConfig

    return optimizers.make_optimizer(parameters, TrainingConfig(learning_rate=RATE), CPU)


def rates(model: nn.Module) -> list[float]:
    """The dropout rates of layers and attention that are in effect."""
    found = {float(module.p) for module in model.modules() if isinstance(module, nn.Dropout) and module.training}
    return sorted(found)


class Recorder:
    """The tokens that an encoder was given, per batch."""

    def __init__(self) -> None:
        self.real = 0
        self.computed = 0

    def reset(self) -> None:
        self.real = self.computed = 0


def nearfield_side(batches: Sequence[Sequence[tuple[str, str]]], options: argparse.Namespace) -> Side:
    """Nearfield's step through its own ``run_step``."""
    from nearfield.encoders.kernels import sparse_embedding_gradients, use_fast_dropout
    from nearfield.encoders.packing import Features, embed, packed_features, packed_tokens, packing_kind
    from nearfield.objectives.config import InfoNCEConfig
    from nearfield.objectives.infonce import InfoNCE
    from nearfield.training.backends.replicated import ReplicatedBackend
    from nearfield.training.chunks import Cut, TextPool
    from nearfield.training.launch import Launch
    from nearfield.training.step import cut_work, run_step

    class Encoder(nn.Module):
        def __init__(self, encoder: Any, objective: nn.Module) -> None:
            super().__init__()
            self.encoder, self.objective = encoder, objective

        def forward(self, features: Features) -> Tensor:
            return embed(self.encoder, features)

    model = load_model()
    kind = packing_kind(model, CPU)
    assert kind is not None
    use_fast_dropout(model)
    sparse_embedding_gradients(model)
    model.train(options.dropout == "on")
    tokens = [tokenise(model, batch) for batch in batches]
    objective = InfoNCE(InfoNCEConfig(temperature=TEMPERATURE, similarity="cosine"))
    backend = ReplicatedBackend(Encoder(model, objective), make_optimizer, CPU, 1, False)
    dimension = int(model.get_embedding_dimension())
    recorder = Recorder()

    def run(number: int) -> Any:
        rows = tokens[number]
        count = len(rows) // 2
        here = np.arange(count)
        pool = TextPool(np.arange(2 * count), np.zeros(2 * count, dtype=np.int64), here, here + count, here, here >= 0)
        lengths = np.array([len(row) for row in rows])
        work = cut_work(pool, lengths, Cut(options.chunk_tokens), Launch(), padded=False, by_prompt=False)
        work = replace(work, known_positives=[np.array([count + i]) for i in range(count)])

        def features(chunk: np.ndarray[Any, Any]) -> Features:
            made = packed_features([rows[i] for i in chunk], kind=kind, device=CPU, prompt_length=0)
            real, computed = packed_tokens(made)
            recorder.real += real
            recorder.computed += computed
            return made

        recorder.reset()
        backend.begin()
        engine: Any = SimpleNamespace(
            backend=backend, objective=objective, columns=dimension, make_features=lambda *place: features
        )
        return run_step(engine, work, seed=0, step=number, keep_graph=not options.cached)

    def step(number: int) -> float:
        result = run(number)
        backend.update([RATE for _ in backend.optimizer.param_groups], 1.0, result.word.used)
        return float(result.loss)

    def loss(number: int) -> float:
        return _without_dropout(model, lambda: float(run(number).loss))

    def counted(number: int) -> tuple[int, int]:
        passes = 2 if options.cached else 1
        return recorder.real // passes, recorder.computed // passes

    return Side("nearfield", step, loss, lambda n: len(tokens[n]) // 2, counted, lambda: rates(model))


def peer_side(batches: Sequence[Sequence[tuple[str, str]]], options: argparse.Namespace) -> Side:
    """sentence-transformers' loss on batches as its collator makes them."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    model = load_model()
    model.train(options.dropout == "on")
    tokens = [tokenise(model, batch) for batch in batches]
    scale = 1 / TEMPERATURE
    loss_module: nn.Module = (
        CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=options.mini_batch)
        if options.cached
        else MultipleNegativesRankingLoss(model, scale=scale)
    )
    optimizer = make_optimizer(model.named_parameters())
    pad = int(model.tokenizer.pad_token_id)
    recorder = Recorder()
    model[0].register_forward_pre_hook(lambda _, given: _record(recorder, given[0]["attention_mask"]))

    def columns(number: int) -> list[dict[str, Tensor]]:
        rows = tokens[number]
        count = len(rows) // 2
        result = []
        for part in (rows[:count], rows[count:]):
            width = max(len(row) for row in part)
            ids = torch.full((count, width), pad)
            for line, row in enumerate(part):
                ids[line, : len(row)] = torch.from_numpy(row.astype(np.int64))
            result.append({"input_ids": ids, "attention_mask": (torch.arange(width) < _lengths(part)[:, None]).long()})
        return result

    def run(number: int) -> Tensor:
        recorder.reset()
        optimizer.zero_grad()
        loss: Tensor = loss_module(columns(number), torch.empty(0))
        loss.backward()
        return loss.detach()

    def step(number: int) -> float:
        value = run(number)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.item()

    def loss(number: int) -> float:
        return _without_dropout(model, lambda: run(number).item())

    def counted(number: int) -> tuple[int, int]:
        passes = 2 if options.cached else 1
        return recorder.real // passes, recorder.computed // passes

    return Side("sentence-transformers", step, loss, lambda n: len(tokens[n]) // 2, counted, lambda: rates(model))


def _record(recorder: Recorder, mask: Tensor) -> None:
    recorder.real += int(mask.sum())
    recorder.computed += mask.numel()


def _lengths(rows: Sequence[Any]) -> Tensor:
    return torch.tensor([len(row) for row in rows])


def _without_dropout(model: nn.Module, run: Callable[[], float]) -> float:
    training = model.training
    model.eval()
    value = run()
    model.train(training)
    return value


def serve(pipe: Connection, which: str, options: argparse.Namespace) -> None:
    """One side in a process of its own: tells of its first batch, then runs the steps that it is asked for."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batches = make_batches(options)
    side = (nearfield_side if which == "nearfield" else peer_side)(batches, options)
    plain = load_model()
    config = plain[0].auto_model.config
    loss = side.loss(0)
    side.step(0)
    first = {
        "name": side.name,
        "loss": loss,
        "rows": side.rows(0),
        "real_tokens": side.tokens(0)[0],
        "dropout": side.dropout(),
        "attention_dropout": config.attention_probs_dropout_prob if options.dropout == "on" else 0.0,
        "threads": torch.get_num_threads(),
    }
    pipe.send(first)
    while (number := pipe.recv()) is not None:
        before = measure_peak(config, options.chunk_tokens)
        wall, start = time.perf_counter(), time.process_time()
        loss = side.step(number)
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
        peak = statistics.mean((before, measure_peak(config, options.chunk_tokens)))
        real, computed = side.tokens(number)
        flop = model_flop(config, [len(row) for row in tokenise(plain, batches[number])])
        sample = {
            "side": side.name,
            "batch": number,
            "cpu_seconds": seconds,
            "wall_seconds": wall,
            "loss": loss,
            "real_tokens": real,
            "computed_tokens": computed,
            "peak_flops": peak,
            "share_of_peak": flop / seconds / peak,
            "pairs_per_cpu_second": side.rows(number) / seconds,
        }
        pipe.send(sample)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def make_batches(options: argparse.Namespace) -> list[list[tuple[str, str]]]:
    """The first batch for the checks, then one a pair of runs."""
    texts = make_texts(options.texts, options.batch * (options.pairs + 1))
    return [texts[i : i + options.batch] for i in range(0, len(texts), options.batch)]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dropout", choices=("on", "off"), default="on", help="the model's own 0.1, or none")
    parser.add_argument("--batch", type=int, default=64, help="pairs a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5, help="how often both sides are run, each time on another batch")
    parser.add_argument("--cached", action="store_true", help="gradient caching on both sides")
    parser.add_argument("--mini-batch", type=int, default=32, help="texts a mini-batch of the peer's cached loss")
    parser.add_argument("--chunk-tokens", type=int, help="tokens a chunk of ours; the default is the loop's")
    parser.add_argument("--floor", type=float, help="leave with 1 if the ratio is below")
    parser.add_argument("--texts", type=Path, default=Path(tempfile.gettempdir()) / "nearfield-bench")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.pairs < 5:
        parser.error("--pairs must be at least 5")
    if options.chunk_tokens is None:
        from nearfield.training.memory import FAST_MICRO_BATCH_TOKENS

        options.chunk_tokens = FAST_MICRO_BATCH_TOKENS["cpu"]
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    make_batches(options)  # once, before two processes want the same files
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    for which in ("nearfield", "peer"):
        pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, which, options), daemon=True).start()
        theirs.close()
        pipes.append(pipe)
    found = [pipe.recv() for pipe in pipes]
    names = (found[0]["name"], found[1]["name"])
    checks: dict[str, Any] = {key: {side["name"]: side[key] for side in found} for key in found[0] if key != "name"}
    checks["loss_difference"] = abs(found[0]["loss"] - found[1]["loss"])
    alike = ("rows", "real_tokens", "dropout", "attention_dropout", "threads")
    failed = [name for name in alike if len({str(value) for value in checks[name].values()}) > 1]
    if not checks["loss_difference"] <= 1e-5:
        failed.append("loss_difference")
    samples: list[dict[str, Any]] = []
    print(f"{'':24}{'CPU s':>8}{'pairs/s':>9}{'real tok/s':>12}{'all tok/s':>11}{'GEMM peak':>12}{'share':>7}")
    for number in range(1, options.pairs + 1):
        for pipe in pipes:
            pipe.send(number)
            sample = pipe.recv()
            samples.append(sample)
            seconds = sample["cpu_seconds"]
            print(
                f"{sample['side']:24}{seconds:8.2f}{sample['pairs_per_cpu_second']:9.2f}"
                f"{sample['real_tokens'] / seconds:12.0f}{sample['computed_tokens'] / seconds:11.0f}"
                f"{sample['peak_flops'] / 1e9:6.1f} GF/s{sample['share_of_peak']:7.1%}",
                flush=True,
            )
    memory = {}
    for name, pipe in zip(names, pipes, strict=True):
        pipe.send(None)
        memory[name] = pipe.recv()
    report(options, checks, failed, samples, memory, names)
    return 1 if failed else 0


def report(
    options: argparse.Namespace,
    checks: dict[str, Any],
    failed: list[str],
    samples: list[dict[str, Any]],
    memory: dict[str, int],
    names: tuple[str, str],
) -> None:
    """Print what was found, and write it."""
    by_side = {name: [sample for sample in samples if sample["side"] == name] for name in names}
    speeds = {name: [sample["pairs_per_cpu_second"] for sample in found] for name, found in by_side.items()}
    ratios = [mine / theirs for mine, theirs in zip(speeds[names[0]], speeds[names[1]], strict=True)]
    shares = {name: statistics.median(s["share_of_peak"] for s in found) for name, found in by_side.items()}
    ratio = statistics.median(ratios)
    if options.floor is not None and ratio < options.floor:
        failed.append("floor")
    lengths = statistics.mean(s["real_tokens"] for s in by_side[names[0]]) / (2 * options.batch)
    result = {
        "ratio": ratio,
        "spread": [min(ratios), max(ratios)],
        "pairs": len(ratios),
        "ours": statistics.median(speeds[names[0]]),
        "peer": statistics.median(speeds[names[1]]),
        "unit": "pairs a CPU second",
        "checks": checks,
        "failed": failed,
        "share_of_gemm_peak": shares,
        "gemm_peak_flops": statistics.median(s["peak_flops"] for s in samples),
        "peak_memory_bytes": memory,
        "mean_text_tokens": lengths,
        "settings": {
            "model": MODEL,
            "batch": options.batch,
            "max_length": MAX_LENGTH,
            "dropout": options.dropout,
            "cached": options.cached,
            "chunk_tokens": options.chunk_tokens,
            "threads": options.threads,
            "dtype": "float32",
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
        "samples": samples,
    }
    print(f"loss of one batch without dropout: {checks['loss']}, difference {checks['loss_difference']:.1e}")
    print(f"mean text {lengths:.0f} tokens, dropout {options.dropout}, {options.threads} thread(s)")
    print(f"most memory of a process: {', '.join(f'{n} {b / 2**30:.2f} GiB' for n, b in memory.items())}")
    print(f"share of the GEMM peak, real tokens only: {', '.join(f'{n} {v:.1%}' for n, v in shares.items())}")
    print(f"ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs), pairs a CPU second")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
