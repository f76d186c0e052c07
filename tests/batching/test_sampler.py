"""Planned batches in the trainer of sentence-transformers, on one rank and dealt to several."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, concatenate_datasets

from nearfield.arrays import Ragged
from nearfield.batching import CommunitiesConfig, KMeansStrataConfig, SingleSourceConfig, batch_sampler, follow_plans
from nearfield.batching.plan import write_plan
from nearfield.batching.sampler import read_tables
from nearfield.batching.streams import SourceExamples
from nearfield.errors import BadInputError
from nearfield.provenance import generator


def make_dataset(count: int, seed: int = 0, distinct: int | None = None) -> Dataset:
    random = np.random.default_rng(seed)
    queries = [f"query {number} of {seed}" for number in random.permutation(count) % (distinct or count)]
    positives = [f"passage {number}" for number in random.integers(0, count, size=count)]
    return Dataset.from_dict({"anchor": queries, "positive": positives})


def texts_of(dataset: Dataset, batch: list[int]) -> list[str]:
    return [value for row in batch for value in dataset[row].values()]


def joined(parts: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(parts))


# reading data sets


def test_equal_texts_are_equal_items() -> None:
    dataset = Dataset.from_dict(
        {"anchor": ["a", "b", "a"], "positive": ["x", "a", "y"], "negative": ["b", None, "x"], "other": ["z", "z", "q"]}
    )
    sources, known = read_tables([dataset])
    (source,) = sources
    a, b = source.queries[:2].tolist()
    x, y = source.positives.values[[0, 2]].tolist()
    assert source.queries.tolist() == [a, b, a]
    assert source.positives.values.tolist() == [x, a, y]
    assert source.negatives.lengths.tolist() == [2, 1, 2]
    assert source.negatives[0][0] == b and source.negatives[2][0] == x
    assert len({a, b, x, y}) == 4
    assert known[a].tolist() == sorted([x, y])
    assert known[b].tolist() == []


def test_a_view_of_a_data_set_is_read_as_the_view() -> None:
    dataset = make_dataset(50)
    view = dataset.shuffle(seed=3).select(range(20))
    ours = read_tables([view])[0][0]
    plain = {text: number for number, text in zip(ours.queries.tolist(), view["anchor"], strict=True)}
    assert [plain[text] for text in view["anchor"]] == ours.queries.tolist()
    assert len(ours) == 20


def test_labels_and_scores() -> None:
    topics = Dataset.from_dict({"text": ["a", "b", "c"], "label": [7, 3, 7]})
    pairs = Dataset.from_dict({"one": ["a", "d"], "two": ["b", "e"], "score": [0.25, 1.0]})
    (labelled, graded), known = read_tables([topics, pairs])
    assert labelled.labels is not None and labelled.labels[0] == labelled.labels[2] != labelled.labels[1]
    assert graded.scores is not None and graded.scores.tolist() == [0.25, 1.0]
    assert graded.queries[0] == labelled.queries[0]
    assert graded.examples.tolist() == [3, 4]
    assert len(known.values) == 0


def test_items_that_are_no_texts_are_compared_by_value() -> None:
    dataset = Dataset.from_dict({"anchor": ["a", "b", "c"], "positive": [["x", "y"], ["x"], ["x", "y"]]})
    source = read_tables([dataset])[0][0]
    values = source.positives.values.tolist()
    assert values[0] == values[2] != values[1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, "batches are made of two columns"),
        ({"anchor": ["a", None], "positive": ["b", "c"]}, "the column 'anchor' has 1 rows without a value"),
    ],
)
def test_what_cannot_be_read(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        read_tables([Dataset.from_dict(columns)])


# the sampler


def test_batches_have_no_text_twice_and_every_row_once() -> None:
    dataset = make_dataset(500, distinct=300)
    sampler = batch_sampler(world_size=1)(dataset, batch_size=16, drop_last=False, seed=2)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 32
    for batch in batches:
        texts = texts_of(dataset, batch)
        assert len(texts) == len(set(texts))
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(500))
    sampler.set_epoch(1)
    other = list(sampler)
    assert other != batches
    sampler.set_epoch(0)
    assert list(sampler) == batches
    assert list(batch_sampler(world_size=1)(dataset, batch_size=16, drop_last=False, seed=3)) != batches
    assert list(batch_sampler(seed=2, world_size=1)(dataset, batch_size=16, drop_last=False, seed=3)) == batches


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_in_the_same_global_batch(ranks: int) -> None:
    """Dealt by accelerate itself, the parts of a step are one planned batch, which has no text twice."""
    dataset = make_dataset(500, distinct=300)
    whole = list(batch_sampler(world_size=1)(dataset, batch_size=16, drop_last=True, seed=2))
    shards = []
    for rank in range(ranks):
        sampler = batch_sampler(world_size=ranks)(dataset, batch_size=16 // ranks, drop_last=True, seed=2)
        shards.append(BatchSamplerShard(sampler, num_processes=ranks, process_index=rank, even_batches=False))
    assert [len(shard) for shard in shards] == [len(whole)] * ranks
    steps = [joined(parts) for parts in zip(*shards, strict=True)]
    assert steps == whole


def test_a_small_batch_is_not_dealt(caplog: pytest.LogCaptureFixture) -> None:
    dataset = make_dataset(38)
    sampler = batch_sampler(world_size=2)(dataset, batch_size=4, drop_last=False)
    shards = [list(BatchSamplerShard(sampler, 2, rank, even_batches=False)) for rank in range(2)]
    assert [len(shard) for shard in shards] == [4, 4]
    assert (
        "1 batches of epoch 0 are smaller than 8 and cannot be dealt to 2 ranks: 6 examples are left out" in caplog.text
    )


def test_several_data_sets_are_one_source_in_a_step() -> None:
    datasets = [make_dataset(60, 1), make_dataset(100, 2)]
    from torch.utils.data import ConcatDataset

    concat: Any = ConcatDataset(datasets)
    factory = batch_sampler(SingleSourceConfig(), world_size=2)
    samplers = [factory(dataset, batch_size=4, drop_last=False) for dataset in datasets]
    sampler = factory(concat, batch_samplers=samplers, generator=None, seed=5)
    shards = [list(BatchSamplerShard(sampler, 2, rank, even_batches=False)) for rank in range(2)]
    steps = [joined(parts) for parts in zip(*shards, strict=True)]
    assert {len(step) for step in steps} == {8}
    assert [len({row < 60 for row in step}) for step in steps] == [1] * 19
    assert len(set(itertools.chain.from_iterable(steps))) == 19 * 8


def test_kinds_with_vectors() -> None:
    dataset = make_dataset(64)
    random = np.random.default_rng(0)
    centres = 5 * np.eye(4)[np.arange(64) % 4]
    vectors = centres + random.normal(size=(64, 4)) / 4
    factory = batch_sampler(KMeansStrataConfig(clusters=4), vectors=(vectors, vectors), world_size=1)
    for batch in factory(dataset, batch_size=8, drop_last=True):
        assert len({row % 4 for row in batch}) == 1
    short = batch_sampler(KMeansStrataConfig(clusters=4), vectors=(vectors[:9], vectors), world_size=1)
    with pytest.raises(BadInputError, match="9 query vectors for 64 rows"):
        list(short(dataset, batch_size=8, drop_last=True))
    with pytest.raises(BadInputError, match="there are none"):
        list(batch_sampler(KMeansStrataConfig(clusters=4), world_size=1)(dataset, batch_size=8, drop_last=True))


def test_the_trainers_arguments_can_be_pickled_without_the_vectors() -> None:
    big = np.zeros((1000, 100))
    factory = batch_sampler(KMeansStrataConfig(), vectors=(big, big))
    kept = pickle.loads(pickle.dumps(factory))  # noqa: S301
    assert len(pickle.dumps(factory)) < 5000
    assert kept.vectors is None and kept.config == factory.config
    assert factory.vectors is not None


def test_what_does_not_fit_is_said() -> None:
    dataset = make_dataset(64)
    with pytest.raises(BadInputError, match="the planner's batch_size is 32, and the trainer's batches have 16"):
        batch_sampler(SingleSourceConfig(batch_size=32), world_size=2)(dataset, batch_size=8)
    with pytest.raises(BadInputError, match="no multiple of community_size"):
        batch_sampler(CommunitiesConfig(), world_size=1)(dataset, batch_size=8)
    with pytest.raises(BadInputError, match="not one batch of 128 can be made"):
        list(batch_sampler(SingleSourceConfig(), world_size=1)(dataset, batch_size=128))
    with pytest.raises(BadInputError, match="known length"):
        batch_sampler(world_size=1)(iter(dataset), batch_size=8)


# following a plan


@pytest.fixture()
def plan(tmp_path: Path) -> Path:
    """Two epochs of 40 examples, numbered from 100 on, in batches of 8."""
    count = 40
    source = SourceExamples(
        0, "a", np.arange(100, 140), np.arange(count), Ragged.single(np.arange(50, 90)), Ragged.empty(count)
    )
    for epoch in range(2):
        made = SingleSourceConfig(batch_size=8).build().plan([source], 0, epoch)
        write_plan(tmp_path / "plan" / f"epoch-{epoch:03d}.parquet", made, {0: (0, 0)}, lambda _, items: items, {})
    return tmp_path


def test_a_plan_is_followed(plan: Path) -> None:
    from nearfield.batching.plan import Plan

    dataset = make_dataset(40)
    rows = generator(0, "rows").permutation(40) + 100
    sampler = follow_plans(plan, rows=rows, world_size=2)(dataset, batch_size=4, drop_last=False)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        opened = Plan(plan / "plan" / f"epoch-{epoch:03d}.parquet")
        shards = [list(BatchSamplerShard(sampler, 2, rank, even_batches=False)) for rank in range(2)]
        for step, parts in enumerate(zip(*shards, strict=True)):
            assert rows[joined(parts)].tolist() == opened.batch(step).example.tolist()
    sampler.set_epoch(2)
    with pytest.raises(BadInputError, match="the training is in epoch 3, and 2 are planned"):
        list(sampler)
    other = follow_plans(plan, rows=rows, world_size=1)(make_dataset(11), batch_size=4)
    assert list(other) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_a_plan_that_does_not_fit(plan: Path, tmp_path: Path) -> None:
    dataset = make_dataset(40)
    with pytest.raises(BadInputError, match="the plan has batches of 8, and the trainer's have 16") as error:
        len(follow_plans(plan, world_size=2)(dataset, batch_size=8))
    assert error.value.hint is not None and "per_device_train_batch_size" in error.value.hint
    with pytest.raises(BadInputError, match=r"names example 1\d\d, which is not in the data set of 40 rows"):
        len(follow_plans(plan, world_size=1)(dataset, batch_size=8))
    with pytest.raises(BadInputError, match=r"names example \d+, which is not in the data set"):
        len(follow_plans(plan, rows=np.arange(40) + 101, world_size=1)(dataset, batch_size=8))
    with pytest.raises(BadInputError, match="there is no plan"):
        follow_plans(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="this folder has no plan"):
        follow_plans(tmp_path / "empty")


# the real trainer

TRAIN = """
import json, sys
from pathlib import Path
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from nearfield.batching import SingleSourceConfig, batch_sampler

model, out, per_device = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
rows = [f"word{n}" for n in range(40)]
data = Dataset.from_dict({"anchor": [f"{row} of word{n % 13}" for n, row in enumerate(rows)], "positive": [f"word{n % 25}" for n in range(40)]})
model = SentenceTransformer(model, device="cpu")
args = SentenceTransformerTrainingArguments(
    output_dir=str(out / "checkpoints"), per_device_train_batch_size=per_device, num_train_epochs=2, report_to="none",
    batch_sampler=batch_sampler(SingleSourceConfig()), use_cpu=True, save_strategy="epoch", seed=7, disable_tqdm=True,
)
trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=MultipleNegativesRankingLoss(model))
seen, collator = [], trainer.data_collator
class Noting(type(collator)):
    def __call__(self, features):
        seen.append([feature["anchor"] for feature in features])
        return super().__call__(features)
collator.__class__ = Noting
trainer.train()
(out / f"rank-{args.process_index}.json").write_text(json.dumps([seen, data["anchor"][:], trainer.state.global_step]))
"""


def train(tmp_path: Path, model: Path, ranks: int) -> list[list[str]]:
    """Two epochs; the anchors of each global batch."""
    import json

    out = tmp_path / f"{ranks}"
    out.mkdir()
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(script), str(model), str(out), str(8 // ranks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    assert {steps for _, _, steps in found} == {10}
    return [joined(parts) for parts in zip(*(seen for seen, _, _ in found), strict=True)]


def test_the_real_trainer_follows(tmp_path: Path, tiny_model: Path) -> None:
    steps = train(tmp_path, tiny_model, 1)
    assert [len(step) for step in steps] == [8] * 10
    assert sorted(joined(steps[:5])) == sorted(joined(steps[5:]))
    assert steps[:5] != steps[5:]
    for step in steps:
        positives = [f"word{int(anchor.split()[0][4:]) % 25}" for anchor in step]
        assert len(set(positives)) == 8


@pytest.mark.slow
def test_the_real_trainer_on_two_ranks_sees_the_same_global_batches(tmp_path: Path, tiny_model: Path) -> None:
    assert train(tmp_path, tiny_model, 2) == train(tmp_path, tiny_model, 1)


def test_data_sets_that_were_joined() -> None:
    """Several chunks, indices and all."""
    twice = concatenate_datasets([make_dataset(30, 1), make_dataset(30, 1)])
    source = read_tables([twice])[0][0]
    assert source.queries[:30].tolist() == source.queries[30:].tolist()
