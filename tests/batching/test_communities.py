"""Communities: planted ones are found, sizes are exact, and each step is that of a plain reference."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from nearfield.arrays import Ragged
from nearfield.batching import groups as module
from nearfield.batching.groups import (
    Communities,
    add_cluster_negatives,
    cut_edges,
    find_communities,
    mutual_edges,
    negative_weights,
    partition,
)
from nearfield.batching.streams import PlannedRows
from nearfield.errors import BadInputError
from tests.mining.test_kmeans import planted, random_vectors, unit
from tests.mining.test_nearest import as_excluded, brute_force

Vectors = npt.NDArray[np.float32]


def as_sets(groups: npt.NDArray) -> set[frozenset[int]]:
    return {frozenset(group) for group in groups.tolist()}


def sets_of(labels: npt.NDArray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


def windowed(groups: int, size: int, twins: int, seed: int) -> tuple[Vectors, Vectors, npt.NDArray]:
    """Examples whose first ranks are near-duplicates (twins) from other groups, and whose group comes right after.

    A vector is a large part of its clique of twins plus a smaller one of its group: twins are the most similar, then the
    members of the group, then all others. Each clique has one member of each of ``twins`` groups.
    """
    random = np.random.default_rng(seed)
    cliques = groups // twins * size
    group_directions = np.eye(groups, groups + cliques)
    clique_directions = np.eye(groups + cliques)[groups:]
    group = np.repeat(np.arange(groups), size)
    clique = group // twins * size + np.tile(np.arange(size), groups)
    vectors = group_directions[group] + 2 * clique_directions[clique]
    vectors = unit(vectors + 1e-3 * random.standard_normal(vectors.shape))
    shuffled = random.permutation(len(vectors))
    return vectors[shuffled], vectors[shuffled], group[shuffled]


@pytest.mark.parametrize(("groups", "size", "twins"), [(12, 8, 3), (40, 16, 4), (20, 32, 5), (9, 5, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_groups_in_each_others_window_are_found(groups: int, size: int, twins: int, seed: int) -> None:
    """The paper's own test: K items mutually in ranks p to p + m; the first p ranks would give other groups."""
    queries, documents, group = windowed(groups, size, twins, seed)
    settings = {"size": size, "seed": seed, "method": "exact"}
    found = find_communities(queries, documents, window=(twins, twins + size - 1), **settings)  # type: ignore[arg-type]
    assert as_sets(found.groups) == sets_of(group)
    assert (found.cut, found.isolated, len(found.left)) == (0, 0, 0)
    assert found.edges == groups * size * (size - 1) // 2
    naive = find_communities(queries, documents, window=(0, twins), **settings)  # type: ignore[arg-type]
    assert not as_sets(naive.groups) & sets_of(group)


@pytest.mark.parametrize("seed", range(3))
def test_planted_communities_are_found_in_noise(seed: int) -> None:
    vectors, labels = planted(30, 16, 48, noise=0.7, seed=seed)
    random = np.random.default_rng(seed)
    queries = unit(vectors + 0.05 * random.standard_normal(vectors.shape))
    found = find_communities(queries, vectors, size=16, window=(1, 24), seed=seed, method="exact")
    assert as_sets(found.groups) == sets_of(labels)
    assert 0 < found.cut < 0.2


def test_the_order_of_examples_does_not_matter_to_planted_groups() -> None:
    vectors, _ = planted(20, 8, 32, noise=0.3)
    found = find_communities(vectors, vectors, size=8, window=(1, 8), seed=0, method="exact")
    shuffled = np.random.default_rng(1).permutation(len(vectors))
    other = find_communities(vectors[shuffled], vectors[shuffled], size=8, window=(1, 8), seed=0, method="exact")
    assert as_sets(shuffled[other.groups]) == as_sets(found.groups)
    assert other.edges == found.edges


@settings(max_examples=60)
@given(
    count=st.integers(0, 90),
    size=st.integers(2, 9),
    window=st.tuples(st.integers(0, 6), st.integers(1, 20)),
    seed=st.integers(0, 100),
    labelled=st.booleans(),
)
def test_what_holds_for_any_data(count: int, size: int, window: tuple[int, int], seed: int, labelled: bool) -> None:
    queries, documents = random_vectors(count + 1, 5, seed)[1:], random_vectors(count + 1, 5, seed + 1)[1:]
    labels = np.random.default_rng(seed).integers(0, 5, count) if labelled else None
    rank_from, rank_to = window[0], sum(window)
    arguments = {"size": size, "window": (rank_from, rank_to), "seed": seed, "method": "exact"}
    found = find_communities(queries, documents, labels=labels, **arguments)  # type: ignore[arg-type]
    placed = np.concatenate([found.groups.ravel(), found.left])
    np.testing.assert_array_equal(np.sort(placed), np.arange(count))
    assert found.groups.shape == (count // size, size)
    assert len(found.left) == count % size
    assert found.neighbours.shape == (count, rank_to - rank_from)
    assert found.groups.dtype == found.left.dtype == np.int64
    again = find_communities(queries, documents, labels=labels, **arguments)  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.groups, found.groups)
    np.testing.assert_array_equal(again.neighbours, found.neighbours)
    if labels is None:
        ranks = brute_force(queries, documents, rank_to)
        np.testing.assert_array_equal(found.neighbours, ranks[:, rank_from:])
        np.testing.assert_array_equal(found.first, ranks[:, :rank_from])
        edges = {
            (i, j) for i, j in combinations(range(count), 2) if j in found.neighbours[i] and i in found.neighbours[j]
        }
        together = {pair for group in found.groups.tolist() for pair in combinations(sorted(group), 2)}
        assert found.edges == len(edges)
        assert found.cut == pytest.approx(len(edges - together) / len(edges) if edges else 0)
        assert found.isolated == count - len({node for edge in edges for node in edge})


def test_mutual_edges_only() -> None:
    neighbours = np.array([[1, 2], [0, 1], [3, -1], [2, 0], [0, -1]], dtype=np.int32)
    graph = mutual_edges(neighbours).toarray()
    expected = np.zeros((5, 5))
    expected[0, 1] = expected[1, 0] = expected[2, 3] = expected[3, 2] = 1
    np.testing.assert_array_equal(graph, expected)


def random_graph(nodes: int, edges: int, seed: int) -> csr_array:
    random = np.random.default_rng(seed)
    ends = random.integers(0, nodes, (edges, 2))
    matrix = np.zeros((nodes, nodes), dtype=np.int8)
    matrix[ends[:, 0], ends[:, 1]] = matrix[ends[:, 1], ends[:, 0]] = 1
    np.fill_diagonal(matrix, 0)
    return csr_array(matrix)


@settings(max_examples=60)
@given(
    nodes=st.integers(1, 60),
    size=st.integers(2, 8),
    edges=st.integers(0, 200),
    lopsided=st.integers(1, 6),
    seed=st.integers(0, 100),
)
def test_parts_of_any_size_are_made_exact(nodes: int, size: int, edges: int, lopsided: int, seed: int) -> None:
    graph = random_graph(nodes, edges, seed)
    count = nodes // size
    if not count:
        return
    random = np.random.default_rng(seed)
    parts = (count * random.random(nodes) ** lopsided).astype(np.int32)
    before = parts.copy()
    module._make_exact(graph, parts, count, size)
    assert np.bincount(parts[parts >= 0], minlength=count).tolist() == [size] * count
    assert np.count_nonzero(parts < 0) == nodes - count * size
    sizes = np.bincount(before, minlength=count)
    for part in range(count):
        inside = np.flatnonzero(before == part)
        stayed = np.flatnonzero((before == part) & (parts == part))
        if sizes[part] <= size:
            # Only parts that are too large lose nodes.
            assert set(inside) <= set(np.flatnonzero(parts == part))
        else:
            degrees = {int(i): int(graph[[int(i)]].toarray()[0, inside].sum()) for i in inside}
            gone = sorted(inside, key=lambda i: (degrees[int(i)], i))[: sizes[part] - size]
            assert not set(stayed.tolist()) & set(map(int, gone)) or sizes.min() < size


def test_moves_follow_edges() -> None:
    """Node 8 has one edge into its part of five; the short part, to which it has two, gets it."""
    edges = [
        *combinations(range(4), 2),
        *combinations(range(4, 7), 2),
        (8, 0),
        (8, 4),
        (8, 5),
        *combinations((9, 10, 11, 12), 2),
    ]
    matrix = np.zeros((13, 13), dtype=np.int8)
    for i, j in edges:
        matrix[i, j] = matrix[j, i] = 1
    parts = np.array([0, 0, 0, 0, 1, 1, 1, 2, 0, 2, 2, 2, 2], dtype=np.int32)
    module._make_exact(csr_array(matrix), parts, 3, 4)
    # Node 7 has no edge at all: it is what remains of the part of five that it stood in.
    assert parts.tolist() == [0, 0, 0, 0, 1, 1, 1, -1, 1, 2, 2, 2, 2]


def test_nodes_without_edges_take_no_place_in_groups_that_have_some() -> None:
    matrix = np.zeros((20, 20), dtype=np.int8)
    for members in ([1, 5, 7, 11], [2, 3, 17, 19]):
        for i, j in combinations(members, 2):
            matrix[i, j] = matrix[j, i] = 1
    found = partition(csr_array(matrix), 4, seed=0)
    assert as_sets(found.groups) == {frozenset({1, 5, 7, 11}), frozenset({2, 3, 17, 19})}
    assert found.isolated == 12
    assert sorted(found.unplaced.tolist()) == sorted(set(range(20)) - {1, 5, 7, 11, 2, 3, 17, 19})


def test_examples_without_edges_come_together_with_those_that_point_where_they_do() -> None:
    groups = np.array([[0, 1], [2, 3]])
    neighbours = np.full((10, 2), -1, dtype=np.int32)
    neighbours[4], neighbours[5], neighbours[6], neighbours[7] = [3, -1], [0, 2], [6, 2], [8, 1]
    made, left = module._gather(groups, np.array([4, 5, 6, 7, 8]), neighbours, 2)
    assert as_sets(made) == {frozenset({0, 1}), frozenset({2, 3}), frozenset({8, 5}), frozenset({7, 4})}
    assert left.tolist() == [6]


def test_cut_edges() -> None:
    graph = random_graph(30, 100, 0)
    groups = np.random.default_rng(0).permutation(30)[:24].reshape(4, 6)
    together = {pair for group in groups.tolist() for pair in combinations(sorted(group), 2)}
    upper = [tuple(pair) for pair in np.argwhere(np.triu(graph.toarray())).tolist()]
    assert cut_edges(graph, groups) == sum(pair not in together for pair in upper)


def test_groups_are_harder_than_chance_and_no_nearer_than_the_window() -> None:
    """Inside groups the teacher's similarity is higher than in random ones, but its first ranks are no likelier."""
    documents = random_vectors(2000, 384)
    noise = np.random.default_rng(1).standard_normal(documents.shape) / np.sqrt(384)
    queries = unit(documents + 0.5 * noise)
    scores = queries @ documents.T

    def inside(groups: npt.NDArray) -> tuple[float, int]:
        pairs = [(i, j) for group in groups.tolist() for i in group for j in group if i != j]
        return float(np.mean([scores[i, j] for i, j in pairs])), sum(j in first[i] for i, j in pairs)

    arguments = {"size": 16, "seed": 0, "method": "exact"}
    found = find_communities(queries, documents, window=(10, 50), **arguments)  # type: ignore[arg-type]
    first = [set(row) for row in found.first.tolist()]
    chance = np.random.default_rng(0).permutation(2000).reshape(-1, 16)
    similarity, near = inside(found.groups)
    random_similarity, _ = inside(chance)
    assert similarity > random_similarity + 0.01
    # A pair is among the first 10 of 2,000 with chance 9 / 1999 (one is the own document); three standard deviations.
    expected = found.groups.size * 15 * 9 / 1999
    assert near < expected + 3 * np.sqrt(expected)
    naive = find_communities(queries, documents, window=(0, 40), **arguments)  # type: ignore[arg-type]
    assert inside(naive.groups)[1] > 3 * expected


def test_excluded_documents_have_no_rank() -> None:
    vectors, _ = planted(10, 8, 32, noise=0.3)
    hidden = [{(i + 1) % 80, (i + 2) % 80, i} for i in range(80)]
    found = find_communities(
        vectors, vectors, size=4, window=(2, 9), seed=0, method="exact", excluded=as_excluded(hidden)
    )
    ranks = brute_force(vectors, vectors, 9, hidden)
    np.testing.assert_array_equal(found.first, ranks[:, :2])
    np.testing.assert_array_equal(found.neighbours, ranks[:, 2:])


def test_with_cells_as_with_all() -> None:
    vectors, labels = planted(60, 16, 48, noise=0.5)
    found = find_communities(vectors, vectors, size=16, window=(1, 16), seed=0, method="ivf")
    assert found.recall is not None and found.recall > 0.95
    assert found.recall_all is not None
    assert as_sets(found.groups) == sets_of(labels)
    assert set(found.seconds) == {"neighbours", "graph", "cut"}


# Labels


def label_graph(queries: Vectors, documents: Vectors, labels: npt.NDArray, wanted: int) -> set[tuple[int, int]]:
    """The paper's words, one by one: walk each ranking, take the first distinct labels but the own, link, keep mutual."""
    linked = []
    for i, ranking in enumerate(brute_force(queries, documents, len(documents)).tolist()):
        near: list[int] = []
        for j in ranking:
            if labels[j] != labels[i] and labels[j] not in near and len(near) < wanted:
                near.append(int(labels[j]))
        linked.append(set(near))
    return {(i, j) for i, j in combinations(range(len(labels)), 2) if labels[j] in linked[i] and labels[i] in linked[j]}


@pytest.mark.parametrize(("count", "names", "seed"), [(90, 7, 0), (60, 2, 1), (120, 20, 2), (40, 40, 3), (30, 1, 4)])
def test_labels_link_all_their_examples(count: int, names: int, seed: int) -> None:
    queries, documents = random_vectors(count, 6, seed), random_vectors(count, 6, seed + 9)
    labels = 100 * np.random.default_rng(seed).integers(0, names, count) + 7
    wanted = int(np.ceil(0.3 * len(set(labels.tolist()))))
    edges = label_graph(queries, documents, labels, wanted)
    found = find_communities(queries, documents, size=5, window=(3, 9), seed=0, method="exact", labels=labels)
    together = {pair for group in found.groups.tolist() for pair in combinations(sorted(group), 2)}
    assert found.edges == len(edges)
    assert found.cut == pytest.approx(len(edges - together) / len(edges) if edges else 0)
    for i, row in enumerate(found.neighbours.tolist()):
        assert all(labels[j] != labels[i] for j in row if j >= 0)
    assert found.first.shape == (count, 0)


def test_labels_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LABEL_BLOCK", 40)
    queries, documents = random_vectors(130, 6), random_vectors(130, 6, seed=1)
    labels = np.random.default_rng(0).integers(0, 6, 130)
    found = find_communities(queries, documents, size=8, window=(0, 5), seed=0, method="exact", labels=labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([found.groups.ravel(), found.left])), np.arange(130))
    edges = 0
    shuffled = module.generator(0, "communities", "blocks").permutation(130)
    for block in np.array_split(shuffled, 4):
        rows = np.sort(block)
        edges += len(label_graph(queries[rows], documents[rows], labels[rows], 2))
    assert found.edges == edges


def test_confusable_labels_come_together() -> None:
    """Six labels in two threes of near ones, each linked to its two nearest: groups mix labels of one three only."""
    random = np.random.default_rng(0)
    directions = unit(np.repeat(np.eye(2, 8), 3, axis=0) + 0.3 * np.eye(6, 8, 2))
    labels = random.permutation(np.repeat(np.arange(6), 20))
    documents = directions[labels]
    queries = unit(documents + 0.05 * random.standard_normal(documents.shape))
    found = find_communities(queries, documents, size=10, window=(0, 5), seed=0, method="exact", labels=labels)
    for group in found.groups:
        assert len({int(label) // 3 for label in labels[group]}) == 1
        assert len(set(labels[group].tolist())) > 1


# Negatives of groups


def small_communities() -> Communities:
    neighbours = np.array([[4, 5], [4, 6], [0, 7], [0, -1], [1, 2], [2, 3], [2, 3], [2, 3]], dtype=np.int32)
    first = np.array([[0, 1], [1, 6], [2, 3], [3, 2], [4, 5], [5, 4], [6, 7], [7, 6]], dtype=np.int32)
    groups = np.array([[0, 1], [2, 3]])
    return Communities(groups, np.array([4, 5, 6, 7]), 0.0, 0, None, {}, neighbours, first, 0, 0)


def test_weights_of_a_group() -> None:
    # 4 is twice in the window, 5 once; 6 is once there and once before, 1 - 2 + 1 = 0; 0 and 1 are members.
    documents, weights = negative_weights(small_communities(), np.array([0, 1]))
    assert dict(zip(documents.tolist(), weights.tolist(), strict=True)) == {4: 2, 5: 1}
    documents, weights = negative_weights(small_communities(), np.array([2, 3]))
    assert dict(zip(documents.tolist(), weights.tolist(), strict=True)) == {0: 2, 7: 1}
    excluded = as_excluded([set(), {4}, *[set()] * 6])
    assert negative_weights(small_communities(), np.array([0, 1]), excluded)[0].tolist() == [5]


def rows_of(examples: list[int], strata: list[int]) -> PlannedRows:
    """Rows whose queries are numbered from 100 on and whose documents are the examples' own."""
    count = len(examples)
    documents = Ragged.single(np.array(examples))
    return PlannedRows.of(
        [0] * count, examples, np.array(examples) + 100, documents, Ragged.empty(count), stratum=np.array(strata)
    )


def drawn_for(count: int, seed: int) -> list[list[int]]:
    """The negatives that are drawn for the two groups of ``small_communities``, a batch each, a row at a time."""
    found = add_cluster_negatives(
        rows_of([0, 1, 2, 3], [0, 0, 1, 1]), np.array([2, 2]), count, communities=small_communities(),
        representatives=np.arange(8), known=None, random=np.random.default_rng(seed),
    )  # fmt: skip
    return [found.negatives[row].tolist() for row in range(4)]


def test_negatives_are_drawn_by_weight_and_dealt_in_turn() -> None:
    drawn = drawn_for(2, seed=0)
    # Two documents for four places: each member has one.
    assert sorted(drawn[0] + drawn[1]) == [4, 5] and sorted(drawn[2] + drawn[3]) == [0, 7]
    assert [len(negatives) for negatives in drawn] == [1, 1, 1, 1]


def test_negatives_are_in_proportion() -> None:
    """Many seeds: 4 with weight 2 comes first twice as often as 5."""
    first = [drawn_for(1, seed)[0][0] for seed in range(3000)]
    assert np.mean(np.array(first) == 4) == pytest.approx(2 / 3, abs=0.03)


def test_negatives_of_found_groups() -> None:
    vectors, _ = planted(20, 16, 32, noise=0.8)
    found = find_communities(vectors, vectors, size=8, window=(3, 20), seed=0, method="exact")
    rows = rows_of(found.groups.ravel().tolist(), np.repeat(np.arange(40), 8).tolist())

    def draw(seed: int) -> Ragged:
        return add_cluster_negatives(
            rows, np.full(40, 8), 2, communities=found, representatives=np.arange(320), known=None,
            random=np.random.default_rng(seed),
        ).negatives  # fmt: skip

    drawn = draw(1)
    for number, group in enumerate(found.groups):
        negatives = drawn.slice(8 * number, 8 * number + 8).values
        assert 0 < len(set(negatives.tolist())) == len(negatives) <= 16
        assert not set(negatives.tolist()) & set(group.tolist())
        assert np.isin(negatives, found.neighbours[group]).all()
    np.testing.assert_array_equal(draw(1).values, drawn.values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 1}, "has no negatives"),
        ({"window": (4, 4)}, "is empty"),
        ({"window": (-1, 4)}, "is empty"),
        ({"documents": random_vectors(5, 4)}, "an example has one of each"),
        ({"labels": np.zeros(3, dtype=np.int64)}, "3 labels for 6 examples"),
    ],
)
def test_bad_input(changes: dict[str, object], words: str) -> None:
    arguments = {"queries": random_vectors(6, 4), "documents": random_vectors(6, 4), "size": 2, "window": (0, 4)}
    with pytest.raises(BadInputError, match=words):
        find_communities(**{**arguments, "seed": 0, "method": "exact", **changes})  # type: ignore[arg-type]
