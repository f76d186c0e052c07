"""Time and memory of the contrastive loss by batch size: the whole matrix, sentence-transformers, Inf-CL's formula, nearfield.

    python scripts/bench_loss.py --sizes 1024 8192 65536 --dims 384 1024 --repeats 3 --json OUT

Each measurement is a process of its own: forward and backward of the mean loss over B queries and B documents, random unit
vectors, temperature 0.05. ``seconds`` is processor time (the machine may be shared), the least of the repeats; all times are
in ``samples``. ``peak_above_inputs_bytes`` is the process's peak memory less what it held with the embeddings made, so the
gradients of the embeddings count. ``grad_rel_error`` is the largest error of the gradient, relative to its largest entry,
against float64 in tiles, on 64 rows of queries and of documents. The matrix is measured to 16,384 only.

Implementations: ``torch`` (cosine, cross-entropy), ``st`` and ``st-cached`` (sentence-transformers' loss on embeddings; cached
in chunks of 32 rows as it ships and 1,024), ``infcl`` (Inf-CL's formula, arXiv 2410.17243, in torch: running logaddexp over
tiles, recomputed backward; its Triton kernels want CUDA), ``dense`` and ``blockwise`` (nearfield, ids masked), ``masked``
(blockwise with the score mask and hardness).
"""

from __future__ import annotations

import platform
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from frame import alone, finish, make_parser, resident_bytes

IMPLEMENTATIONS = ("torch", "st", "st-cached", "st-cached-1024", "infcl", "dense", "blockwise", "masked")
WHOLE = ("torch", "st", "dense")
LARGEST_WHOLE = 16384
TEMPERATURE = 0.05
CHECKED = 64
TILE = 1024


def infcl(queries: Any, documents: Any) -> Any:
    """The loss by Inf-CL's formula: each tile's logsumexp joined by logaddexp, and again in the backward."""
    import torch

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, d: Any) -> Any:
            sums = []
            for rows in q.split(TILE):
                total = torch.full((len(rows),), -torch.inf, dtype=q.dtype, device=q.device)
                for columns in d.split(TILE):
                    total = torch.logaddexp(total, (rows @ columns.T).logsumexp(1))
                sums.append(total)
            ctx.save_for_backward(q, d, torch.cat(sums))
            return torch.cat(sums)

        @staticmethod
        def backward(ctx: Any, upstream: Any) -> Any:
            q, d, sums = ctx.saved_tensors
            dq, dd = torch.zeros_like(q), torch.zeros_like(d)
            for row in range(0, len(q), TILE):
                r = slice(row, row + TILE)
                for column in range(0, len(d), TILE):
                    c = slice(column, column + TILE)
                    weight = (q[r] @ d[c].T - sums[r, None]).exp_().mul_(upstream[r, None])
                    dq[r].addmm_(weight, d[c])
                    dd[c].addmm_(weight.T, q[r])
            return dq, dd

    normal = torch.nn.functional.normalize
    q, d = normal(queries, dim=1) / TEMPERATURE, normal(documents, dim=1)
    return (Loss.apply(q, d) - (q * d).sum(1)).mean()


def make_loss(name: str, size: int) -> Callable[[Any, Any], Any]:
    """(B, d) queries and documents -> the mean loss."""
    import torch

    if name == "torch":
        normal, target = torch.nn.functional.normalize, torch.arange(size)
        return lambda q, d: torch.nn.functional.cross_entropy(
            normal(q, dim=1) @ normal(d, dim=1).T / TEMPERATURE, target
        )
    if name == "infcl":
        return infcl
    if name.startswith("st"):
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
            MultipleNegativesRankingLoss,
        )

        if name == "st":
            plain = MultipleNegativesRankingLoss(None, scale=1 / TEMPERATURE)
            return lambda q, d: plain.compute_loss_from_embeddings([q, d], None)
        cached = CachedMultipleNegativesRankingLoss([None], scale=1 / TEMPERATURE)
        cached.mini_batch_size = 1024 if name.endswith("1024") else 32
        return lambda q, d: cached.calculate_loss([[q], [d]], with_backward=True)
    from nearfield.objectives import InfoNCEConfig
    from nearfield.objectives.infonce import ContrastiveBatch

    options: dict[str, Any] = {"implementation": "dense" if name == "dense" else "blockwise"}
    if name == "masked":
        options |= {"score_mask": {"margin": 0.1}, "hardness": {"alpha": 5.0}}
    objective = InfoNCEConfig.model_validate({"temperature": TEMPERATURE, **options}).build()
    numbers = torch.arange(size)

    def loss(q: Any, d: Any) -> Any:
        all_positive = torch.ones(size, dtype=torch.bool)
        result = objective(ContrastiveBatch(q, d, numbers, all_positive, numbers, numbers[:, None]))
        return result.total / result.denominator

    return loss


def make_vectors(size: int, dim: int) -> tuple[Any, Any]:
    """Documents near their queries, as in training."""
    import torch

    random = torch.Generator().manual_seed(size + dim)
    queries = torch.randn(size, dim, generator=random)
    documents = torch.randn(size, dim, generator=random).mul_(0.7).add_(queries, alpha=0.5)
    return (torch.nn.functional.normalize(part, dim=1).requires_grad_() for part in (queries, documents))


def exact_gradient(queries: Any, documents: Any, masked: bool) -> tuple[Any, Any, list[float]]:
    """Gradients of the first rows of both sides in float64, a tile of rows at a time; plain torch, its own code."""
    import torch

    normal = torch.nn.functional.normalize
    d = normal(documents.detach().double(), dim=1)
    size, inverse = len(d), 1 / TEMPERATURE
    some_d = documents.detach()[:CHECKED].double().requires_grad_()
    dq = dd = None
    for row in range(0, size, 256):
        raw = queries.detach()[row : row + 256].double().requires_grad_()
        q = normal(raw, dim=1)
        scores = torch.cat([q @ normal(some_d, dim=1).T, q @ d[CHECKED:].T], dim=1)
        place = torch.arange(row, row + len(q))
        positive = scores[torch.arange(len(q)), place]
        logits = scores * inverse
        if masked:
            own = torch.zeros_like(scores, dtype=torch.bool)
            own[torch.arange(len(q)), place] = True
            over = (scores.detach() > positive.detach()[:, None] + 0.1 + 1e-6) & ~own
            logits = (logits + 5.0 * scores.detach() * ~own).masked_fill(over, -1e30)
        loss = (logits.logsumexp(1) - positive * inverse).sum() / size
        if row == 0:
            raw_gradient, part = torch.autograd.grad(loss, [raw, some_d])
            dq = raw_gradient[:CHECKED]
        else:
            (part,) = torch.autograd.grad(loss, [some_d])
        dd = part if dd is None else dd + part
    return dq, dd, [float(dq.abs().max()), float(dd.abs().max())]


def measure(name: str, size: int, dim: int, repeats: int, check: bool) -> dict[str, Any]:
    """One implementation at one size, in this process."""
    import torch

    torch.set_num_threads(1)
    small = make_loss(name, 64)
    q, d = make_vectors(64, dim)
    value = small(q, d)
    if value.requires_grad:
        value.backward()
    loss = make_loss(name, size)
    queries, documents = make_vectors(size, dim)
    before, peak, done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident_bytes())

    # The first run is for memory, and warms up; what was freed before it stays with the process and is not counted.
    watcher = threading.Thread(target=watch)
    watcher.start()
    samples = []
    for repeat in range(repeats + 1):
        queries.grad = documents.grad = None
        start = time.process_time()
        value = loss(queries, documents)
        if value.requires_grad:
            value.backward()
        if repeat or not repeats:
            samples.append(time.process_time() - start)
        if repeat == 0:
            done.set()
            watcher.join()
    error = None
    if check:
        dq, dd, scale = exact_gradient(queries, documents, name == "masked")
        off = [(queries.grad[:CHECKED].double() - dq).abs().max(), (documents.grad[:CHECKED].double() - dd).abs().max()]
        error = max(float(part) / of for part, of in zip(off, scale, strict=True))
    return {
        "B": size,
        "d": dim,
        "impl": name,
        "peak_above_inputs_bytes": max(0, peak[0] - before),
        "seconds": min(samples),
        "grad_rel_error": error,
        "loss": float(value.detach()),
        "samples": samples,
    }


def main() -> int:
    """Measure every size, and print a line each."""
    parser = make_parser(__doc__, pairs=None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--dims", type=int, nargs="+", default=[384, 1024])
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--repeats", type=int, default=3, help="after one to warm up; 0 counts that one")
    parser.add_argument(
        "--check-to", type=int, default=16384, help="largest batch whose gradient is checked in float64"
    )
    arguments = parser.parse_args()
    import torch

    rows: list[dict[str, Any]] = []
    failed = []
    for dim in arguments.dims:
        for size in arguments.sizes:
            for name in arguments.implementations:
                if name in WHOLE and size > LARGEST_WHOLE:
                    continue
                try:
                    row = alone(measure, name, size, dim, arguments.repeats, size <= arguments.check_to)
                except ChildProcessError as ended:
                    # It needs more memory than there is: the others are measured all the same.
                    rows.append({"B": size, "d": dim, "impl": name, "failed": True})
                    failed.append(f"{name} at B = {size}, d = {dim}: {ended}")
                    continue
                rows.append(row)
                error = row["grad_rel_error"]
                if error is not None and error > 1e-3:
                    failed.append(f"the gradient of {name} at B = {size}, d = {dim} errs by {error:.1e}")
                shown = "" if error is None else f"  error {error:.1e}"
                megabytes = row["peak_above_inputs_bytes"] / 1e6
                print(f"{size:>6} {dim:>5} {name:<15} {row['seconds']:8.2f} s {megabytes:9.0f} MB{shown}", flush=True)
    about = {"torch": torch.__version__, "python": platform.python_version(), "threads": 1, "device": "cpu"}
    return finish({"about": about, "temperature": TEMPERATURE, "rows": rows}, failed, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
