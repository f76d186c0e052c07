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
import platform
import statistics
import sys
import tempfile
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
from frame import Clock, Pair, Sample, Worker, compare, finish, in_turn, make_parser, peak_bytes, ratio_of

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
    return sorted({float(module.p) for module in model.modules() if isinstance(module, nn.Dropout) and module.training})


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
    from nearfield.encoders.packing import Features, embed, packed_features, packed_tokens
    from nearfield.encoders.trials import packing_kind
    from nearfield.objectives.config import InfoNCEConfig
    from nearfield.objectives.infonce import InfoNCE
    from nearfield.training.backends.replicated import ReplicatedBackend
    from nearfield.training.chunks import Cut, TextPool, cut_work
    from nearfield.training.launch import Launch
    from nearfield.training.step import run_step

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
        with Clock() as clock:
            loss = side.step(number)
        peak = statistics.mean((before, measure_peak(config, options.chunk_tokens)))
        real, computed = side.tokens(number)
        flop = model_flop(config, [len(row) for row in tokenise(plain, batches[number])])
        sample = {
            "side": side.name,
            "batch": number,
            "cpu_seconds": clock.cpu,
            "wall_seconds": clock.wall,
            "loss": loss,
            "real_tokens": real,
            "computed_tokens": computed,
            "peak_flops": peak,
            "share_of_peak": flop / clock.cpu / peak,
            "pairs_per_cpu_second": side.rows(number) / clock.cpu,
        }
        pipe.send(sample)
    pipe.send(peak_bytes())


def make_batches(options: argparse.Namespace) -> list[list[tuple[str, str]]]:
    """The first batch for the checks, then one a pair of runs."""
    texts = make_texts(options.texts, options.batch * (options.pairs + 1))
    return [texts[i : i + options.batch] for i in range(0, len(texts), options.batch)]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--dropout", choices=("on", "off"), default="on", help="the model's own 0.1, or none")
    parser.add_argument("--batch", type=int, default=64, help="pairs a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cached", action="store_true", help="gradient caching on both sides")
    parser.add_argument("--mini-batch", type=int, default=32, help="texts a mini-batch of the peer's cached loss")
    parser.add_argument("--chunk-tokens", type=int, help="tokens a chunk of ours; the default is the loop's")
    parser.add_argument("--texts", type=Path, default=Path(tempfile.gettempdir()) / "nearfield-bench")
    options = parser.parse_args(arguments)
    if options.pairs < 5:
        parser.error("--pairs must be at least 5")
    if options.chunk_tokens is None:
        from nearfield.training.memory import FAST_MICRO_BATCH_TOKENS

        options.chunk_tokens = FAST_MICRO_BATCH_TOKENS["cpu"]
    return options


def main(arguments: Sequence[str]) -> int:
    """Compare the losses, run the pairs, write the figures."""
    options = parse(arguments)
    make_batches(options)  # once, before two processes want the same files
    with Worker(serve, "nearfield", options) as ours, Worker(serve, "peer", options) as peer:
        begun = [worker.receive() for worker in (ours, peer)]
        names = (begun[0]["name"], begun[1]["name"])
        workers = dict(zip(names, (ours, peer), strict=True))
        print(f"{'':24}{'CPU s':>8}{'pairs/s':>9}{'real tok/s':>12}{'all tok/s':>11}{'GEMM peak':>12}{'share':>7}")
        # The first batch was for the losses.
        sides = {name: lambda number, worker=worker: step_of(worker, number + 1) for name, worker in workers.items()}
        pairs = list(in_turn(sides, options.pairs))
        memory = {name: worker.ask(None) for name, worker in workers.items()}
    checks: dict[str, Any] = {key: {side["name"]: side[key] for side in begun} for key in begun[0] if key != "name"}
    checks["loss_difference"] = abs(begun[0]["loss"] - begun[1]["loss"])
    alike = ("rows", "real_tokens", "dropout", "attention_dropout", "threads")
    failed = [name for name in alike if len({str(value) for value in checks[name].values()}) > 1]
    if not checks["loss_difference"] <= 1e-5:
        failed.append("loss_difference")
    return report(options, checks, failed, pairs, memory)


def step_of(worker: Worker, number: int) -> Sample:
    """One step of a side, and a line of it."""
    sample: Sample = worker.ask(number)
    seconds = sample["cpu_seconds"]
    print(
        f"{sample['side']:24}{seconds:8.2f}{sample['pairs_per_cpu_second']:9.2f}"
        f"{sample['real_tokens'] / seconds:12.0f}{sample['computed_tokens'] / seconds:11.0f}"
        f"{sample['peak_flops'] / 1e9:6.1f} GF/s{sample['share_of_peak']:7.1%}",
        flush=True,
    )
    return sample


def report(
    options: argparse.Namespace, checks: dict[str, Any], failed: list[str], pairs: list[Pair], memory: dict[str, int]
) -> int:
    """Print the figures and write them; the exit code."""
    compared = compare(pairs, "pairs_per_cpu_second", unit="pairs a CPU second", speed=True)
    samples = [sample for pair in pairs for sample in pair.values()]
    shares = {name: statistics.median(pair[name]["share_of_peak"] for pair in pairs) for name in memory}
    if options.floor is not None and compared["ratio"] < options.floor:
        failed.append("floor")
    lengths = statistics.mean(sample["real_tokens"] for sample in samples) / (2 * options.batch)
    result = {
        **compared,
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
    print(f"ratio {ratio_of(pairs, 'pairs_per_cpu_second', speed=True)}, pairs a CPU second")
    return finish(result, failed, options.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
