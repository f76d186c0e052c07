"""Subclasses, trees, gates, decoders, pictures: what their papers' formulas say, by plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import normalize

from nearfield.errors import BadInputError
from nearfield.methods.carol import CAROL, CAROLConfig
from nearfield.methods.cmim import CMIM, CMIMConfig, belonging
from nearfield.methods.hiprbert import HiPrBERT, HiPrBERTConfig, Tree
from nearfield.methods.mcse import MCSE, MCSEConfig
from nearfield.methods.sbcl import SBCL, SBCLConfig, split_classes, subclass_counts
from nearfield.methods.simlap import SimLAP, SimLAPConfig, gated_cosine
from nearfield.objectives import ContrastiveBatch, InfoNCEConfig
from nearfield.objectives.config import Surroundings
from nearfield.objectives.diagnostics import class_scatter, effective_rank, probe_accuracy
from nearfield.training.engine import delete_tokens
from tests.objectives.test_losses import DIM, GUIDE, assert_same, gradients, make, mean, supcon

NAMES = [("s", path) for path in ("a/x", "a/y", "b/x", "b/y", "c")]


def around(labels: int = 5, names: Any = NAMES) -> Surroundings:
    return Surroundings(width=DIM, guide_width=GUIDE, labels=labels, label_names=names, vocabulary=11)


def views(labels: list[int], seed: int = 0) -> ContrastiveBatch:
    """Texts that are encoded twice."""
    batch = make(len(labels), negatives=0, seed=seed)
    return replace(batch, labels=torch.tensor(labels), document_ids=batch.query_ids, known_positives=batch.query_ids[:, None])  # type: ignore[index, arg-type]  # fmt: skip


def test_sbcl_without_subclasses_is_supcon() -> None:
    """One subclass a class and gamma 0: supervised contrast over both views, times temperature / base."""
    labels = [0, 1, 0, 2, 1]
    batch = views(labels)
    ours = SBCLConfig(gamma=0.0).build((), around(names=[("s", name) for name in "abcde"])).double()
    expected = torch.stack(supcon(torch.cat([batch.queries, batch.documents]), labels * 2, 0.1)).mean() * 0.1 / 0.07
    assert_same(mean(ours, batch), expected, batch)


def test_sbcl_is_that_of_plain_loops() -> None:
    labels = [0, 1, 0, 2, 4, 3, 1]
    batch = views(labels)
    ours = SBCLConfig(class_temperatures=False).build((), around()).double()
    unit, fine_of, n = normalize(torch.cat([batch.queries, batch.documents])), labels * 2, 2 * len(labels)
    class_of = [NAMES[label][1].split("/")[0] for label in fine_of]
    cosine, losses = unit @ unit.T / 0.1, []
    for i in range(n):
        view, others = (i + n // 2) % n, [j for j in range(n) if j != i]
        fine = [j for j in others if fine_of[j] == fine_of[i]]
        outside = [j for j in others if fine_of[j] != fine_of[i] or j == view]
        coarse = [j for j in outside if class_of[j] == class_of[i]]
        first = (cosine[i, others].logsumexp(0) - cosine[i, fine]).mean()
        second = (cosine[i, outside].logsumexp(0) - cosine[i, coarse]).mean()
        losses.append(0.1 / 0.07 * first + 0.25 * second)
    assert_same(mean(ours, batch), torch.stack(losses).mean(), batch)


def test_the_coarse_part_leaves_the_own_subclass_alone() -> None:
    """Of the first text's coarse loss, members of its subclass get no gradient but its own other view."""
    batch = views([0, 0, 1, 2])
    settings = SBCLConfig(class_temperatures=False)
    with_, without = (settings.model_copy(update={"gamma": gamma}).build((), around()).double() for gamma in (1.0, 0.0))
    one = replace(batch, rows=torch.tensor([0]))
    coarse = mean(with_, one) - mean(without, one)
    queries, documents = gradients(coarse, batch)
    assert float(queries[1].abs().max()) < 1e-14 and float(documents[1].abs().max()) < 1e-14
    assert all(float(g.abs().max()) > 1e-6 for g in (documents[0], queries[2], documents[2], queries[3]))


def test_class_temperatures_have_the_temperature_as_their_mean() -> None:
    objective = SBCLConfig().build((), around())
    assert isinstance(objective, SBCL)
    unit = normalize(torch.randn(12, DIM, generator=torch.Generator().manual_seed(0)))
    labels = torch.tensor([0, 1, 2, 3, 4, 4] * 2)
    classes = torch.tensor([0, 0, 1, 1, 2, 2] * 2)
    found = objective.temperatures(unit, labels, classes)
    assert found[4] == pytest.approx(0.1), "a class of one subclass"
    assert len(set(found[[0, 1]].tolist())) == 1 and float(found[0]) != float(found[2])
    wide = unit.clone()
    wide[classes == 1] = normalize(unit[classes == 1].mean(dim=0, keepdim=True) + 0.01 * unit[classes == 1])
    assert float(objective.temperatures(wide, labels, classes)[2]) < float(found[2]), "a narrow class"


def test_subclasses_are_of_the_small_classes_size() -> None:
    assert subclass_counts([1000, 100, 10]) == [100, 10, 1]
    assert subclass_counts([1000, 100, 3], smallest=20) == [50, 5, 1]
    random = np.random.default_rng(0)
    centres = random.standard_normal((3, 8))
    vectors = np.repeat(centres, 10, axis=0) + 0.05 * random.standard_normal((30, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    found = split_classes(vectors, ["big"] * 20 + ["small"] * 10, smallest=10)
    assert set(found[20:]) == {"small"}
    assert len(set(found[:10])) == len(set(found[10:20])) == 1 and len(set(found[:20])) == 2


def multi_similarity(cosine: Tensor, positive: Any, threshold: float, n: int) -> list[Tensor]:
    found = []
    for i in range(n):
        p = [(-2.0 * (cosine[i, j] - threshold)).exp() for j in range(n) if j != i and positive(i, j)]
        q = [(50.0 * (cosine[i, j] - threshold)).exp() for j in range(n) if j != i and not positive(i, j)]
        found.append((1 + sum(p, start=cosine.new_zeros(()))).log() / 2 + (1 + sum(q, start=cosine.new_zeros(()))).log() / 50)  # fmt: skip
    return found


def test_hiprbert_of_one_level_is_multi_similarity_of_synonyms() -> None:
    batch = replace(make(6, negatives=0), labels=torch.tensor([0, 1, 0, 2, 1, 3]))
    ours = HiPrBERTConfig(thresholds=(0.5,)).build((), around()).double()
    texts, labels = torch.cat([batch.queries, batch.documents]), [0, 1, 0, 2, 1, 3] * 2
    cosine = normalize(texts) @ normalize(texts).T
    expected = torch.stack(multi_similarity(cosine, lambda i, j: labels[i] == labels[j], 0.5, 12)).mean()
    assert_same(mean(ours, batch), expected, batch)


def test_distances_are_levels_up_to_what_labels_have_in_common() -> None:
    tree = Tree.of([("s", path) for path in ("a/x/1", "a/x/2", "a/y/1", "b/x/1", "a/x", "c")])
    each = torch.arange(6)
    found = tree.distance(each, each).tolist()
    assert found[0] == [0, 1, 2, 3, 1, 3]
    assert found[4] == [1, 1, 2, 3, 0, 2], "an ancestor is as far as the levels between"
    assert all(found[i][i] == 0 for i in range(6)) and found == [list(row) for row in zip(*found, strict=True)]


def test_hiprbert_learns_the_order_of_a_planted_tree() -> None:
    """Three levels: the mean similarity falls strictly with the distance; numbers of labels within a level do not count."""
    names = [("s", f"{a}/{b}/{c}") for a in range(2) for b in range(2) for c in range(2)]
    for order in (list(range(8)), [7, 5, 6, 4, 1, 3, 0, 2]):
        labels = torch.arange(8).repeat(2)
        ours = HiPrBERTConfig().build((), around(8, [names[n] for n in order])).double()
        assert isinstance(ours, HiPrBERT)
        base = make(16, negatives=0)
        vectors = base.queries.detach().clone().requires_grad_()
        rate = torch.optim.Adam([vectors], lr=0.05)
        for _ in range(150):
            batch = replace(base, queries=vectors, documents=vectors, document_ids=base.query_ids, labels=labels)  # type: ignore[arg-type]  # fmt: skip
            rate.zero_grad()
            mean(ours, batch).backward()
            rate.step()
        unit = normalize(vectors.detach())
        cosine, distance = unit @ unit.T, ours.tree.distance(labels, labels)
        off = ~torch.eye(16, dtype=torch.bool)
        levels = [float(cosine[(distance == level) & off].mean()) for level in range(4)]
        assert levels == sorted(levels, reverse=True) and levels[0] > levels[1] + 0.05 > levels[2] + 0.1


def test_thresholds_must_fall() -> None:
    with pytest.raises(ValidationError, match="fall"):
        HiPrBERTConfig(thresholds=(0.5, 0.5))
    with pytest.raises(ValidationError, match="2 thresholds have 1 weights"):
        HiPrBERTConfig(thresholds=(0.5, 0.4), weights=(1.0,))


def simlap(**settings: Any) -> SimLAP:
    small = {"label_width": 6, "hidden": 7, "project": 0, "probe": 0.0, **settings}
    built = SimLAPConfig.model_validate(small).build((), around()).double()
    assert isinstance(built, SimLAP)
    return built


def test_gated_cosines_take_two_products() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(n, DIM, generator=draw, dtype=torch.float64) for n in (5, 7))
    gate = torch.rand(5, DIM, generator=draw, dtype=torch.float64)
    found = gated_cosine(rows, columns, gate.square())
    for i in range(5):
        expected = torch.nn.functional.cosine_similarity((gate[i] * rows[i])[None], gate[i] * columns)
        assert torch.allclose(found[i], expected, atol=1e-12)


def test_gates_do_not_know_the_order_of_two_labels() -> None:
    ours, one, other = simlap(), torch.tensor([0, 1, 2, 3]), torch.tensor([4, 1, 0, 2])
    assert torch.equal(ours.gates(one, other), ours.gates(other, one))


def test_constant_gates_with_identical_labels_are_no_gates() -> None:
    """The loss of several positives, each with a denominator of its own, without gates."""
    labels = [0, 1, 0, 2, 1]
    batch = views(labels)
    batch = replace(batch, document_ids=batch.query_ids + 100)  # type: ignore[operator]
    ours = simlap(partner="identical")
    with torch.no_grad():
        ours.second.weight.zero_()
        ours.second.bias.zero_()
    texts, every = normalize(torch.cat([batch.queries, batch.documents])), labels * 2
    logits, terms = texts @ texts.T / 0.1, []
    for i in range(10):
        negative = [k for k in range(10) if every[k] != every[i]]
        for j in range(10):
            if j != i and every[j] == every[i]:
                terms.append(torch.cat([logits[i, [j]], logits[i, negative]]).logsumexp(0) - logits[i, j])  # noqa: PERF401
    assert_same(mean(ours, batch), torch.stack(terms).mean(), batch)


def test_texts_of_the_own_label_do_not_count_unless_they_are_partners(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = replace(make(4, negatives=0), labels=torch.tensor([0, 0, 1, 2]))
    batch = batch.select(torch.ones(4, dtype=torch.bool))
    alone = replace(batch, documents=batch.queries, document_ids=batch.query_ids, rows=torch.tensor([0]))  # type: ignore[arg-type]
    ours = simlap()
    monkeypatch.setattr(ours, "partners", lambda labels, seed: torch.tensor([1, 2, 0, 0]))
    (found,) = torch.autograd.grad(mean(ours, alone), [batch.queries])
    assert float(found[1].abs().max()) == 0.0, "the own class, which is not the partner"
    assert float(found[2].abs().max()) > 1e-6 and float(found[3].abs().max()) > 1e-6


def test_gates_learn_and_the_probe_leaves_the_embeddings_alone() -> None:
    batch = replace(make(6, negatives=0), labels=torch.tensor([0, 1, 2, 0, 1, 2]))
    ours = simlap(probe=1.0, project=5, project_hidden=4)
    loss = mean(ours, batch)
    for name, found in zip(dict(ours.named_parameters()), torch.autograd.grad(loss, list(ours.parameters())), strict=True):  # fmt: skip
        assert float(found.abs().max()) > 0, name
    detached, attached = (simlap(probe=1.0, probe_detached=flag) for flag in (True, False))
    same = gradients(mean(simlap(), batch), batch)
    assert all(torch.equal(a, b) for a, b in zip(same, gradients(mean(detached, batch), batch), strict=True))
    assert not torch.equal(same[0], gradients(mean(attached, batch), batch)[0])
    assert 0 <= ours.watch(batch)["probe_accuracy"] <= 1


def test_partners_are_drawn_as_asked() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    assert torch.equal(simlap(partner="identical").partners(labels, 1), labels)
    drawn = simlap().partners(labels, 1)
    assert sorted(drawn.tolist()) == sorted(labels.tolist()) and torch.equal(drawn, simlap().partners(labels, 1))
    assert bool((simlap(partner="distinct").partners(labels, 1) != labels).all())


def with_tokens(batch: ContrastiveBatch, seed: int = 0) -> ContrastiveBatch:
    tokens = torch.randint(0, 11, (len(batch.queries), 4), generator=torch.Generator().manual_seed(seed))
    tokens[::2, 3] = -1
    return replace(batch, query_tokens=tokens)


def carol(**settings: Any) -> CAROL:
    built = CAROLConfig.model_validate({"inner": 6, **settings}).build((), around()).double()
    assert isinstance(built, CAROL)
    return built


def test_carol_at_its_ends() -> None:
    """All reconstruction does not depend on labels, all contrast not on the decoder; between, the weighted sum."""
    batch = with_tokens(replace(make(6, negatives=0), labels=torch.tensor([0, 1, 2, 0, 1, 1])))
    whole, none, half = (carol(reconstruction=share) for share in (1.0, 0.0, 0.25))
    other = replace(batch, labels=torch.tensor([0, 0, 0, 1, 1, 1]))
    assert float(mean(whole, batch)) == float(mean(whole, other))
    assert float(mean(none, batch)) != float(mean(none, other))
    decoder = list(none.decoder.parameters())
    assert all(float(g.abs().max()) == 0 for g in torch.autograd.grad(mean(none, batch), decoder))
    assert_same(mean(half, batch), 0.25 * mean(whole, batch) + 0.75 * mean(none, batch), batch)


def test_carol_with_equal_classes_has_no_class_weights() -> None:
    batch = with_tokens(replace(make(6, negatives=0), labels=torch.tensor([0, 1, 2, 0, 1, 2])))
    inverse, plain = (carol(reconstruction=0.0, class_weights=weights) for weights in ("inverse", "none"))
    assert_same(mean(inverse, batch), mean(plain, batch), batch)


def test_the_decoder_reads_the_embedding_alone() -> None:
    """Trained to tell four texts from their embeddings, it does; with zeros for embeddings it is back to what is common."""
    base = with_tokens(make(4, negatives=0))
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 1, 4]])
    base = replace(base, query_tokens=tokens, labels=torch.arange(4))
    ours = carol(reconstruction=1.0, inner=16)
    rate = torch.optim.Adam(ours.parameters(), lr=0.05)
    for _ in range(120):
        rate.zero_grad()
        mean(ours, base).backward()
        rate.step()
    blind = replace(base, queries=torch.zeros_like(base.queries))
    assert float(mean(ours, base)) < 0.05
    # The first token alone tells four equally probable texts apart: ln 4 over three tokens, at least.
    assert float(mean(ours, blind)) > math.log(4) / 3 - 0.05


def test_deleted_tokens_are_a_share_and_never_the_ends() -> None:
    torch.manual_seed(0)
    row = np.arange(2000, dtype=np.int32)
    found = delete_tokens(row, 0.6, 3)
    assert found[:3].tolist() == [0, 1, 2] and found[-1] == 1999 and abs(len(found) / 2000 - 0.4) < 0.03
    assert bool((np.diff(found) > 0).all())
    torch.manual_seed(0)
    assert delete_tokens(row, 0.6, 3).tolist() == found.tolist()
    assert delete_tokens(row, 0.0, 0).tolist() == row.tolist()


def cmim(**settings: Any) -> CMIM:
    built = CMIMConfig.model_validate({"inner": 6, **settings}).build((), around()).double()
    assert isinstance(built, CMIM)
    return built


def test_cmim_is_its_formula() -> None:
    batch, ours = with_tokens(make(5, negatives=0)), cmim(weight=0.7)
    latents, _ = ours.draw(batch)
    assert batch.query_tokens is not None
    normal = torch.distributions.Normal(batch.queries, ours.log_deviation.exp())
    prior = torch.distributions.Normal(torch.zeros_like(latents), 1.0)
    told = ours.decoder.log_probability(latents, batch.query_tokens)
    mim = -(told + prior.log_prob(latents).sum(1) + normal.log_prob(latents).sum(1)) / 2
    unit = normalize(latents)
    g, terms = (unit @ unit.T / 0.1).exp(), []
    for i in range(5):
        others = torch.stack([g[i, j] for j in range(5) if j != i]).mean()
        terms.append(-(g[i, i] / (g[i, i] + others)).log())
    assert_same(mean(ours, batch), (mim + 0.7 * torch.stack(terms)).mean(), batch, tolerance=1e-10)
    assert_same(mean(cmim(weight=0.0), batch), mim.mean(), batch, tolerance=1e-10)
    assert ours.informative(latents, batch.query_tokens).shape == (5, 6)


def test_cmim_may_be_below_zero() -> None:
    """A narrow q(z | text) has densities over 1: log q grows by the dimension times the fall of the log deviation."""
    batch = with_tokens(make(5, negatives=0))
    assert mean(cmim(deviation=0.1), batch) > 0 > mean(cmim(deviation=1e-9), batch)


def test_cmim_does_not_depend_on_the_number_of_negatives() -> None:
    """The mean of their exponentials: doubling each negative, or equal cosines at any size, changes nothing."""
    latents = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([latents, latents[1:]])
    first = torch.tensor([0])
    assert float(belonging(latents, first, 0.1)) == pytest.approx(float(belonging(twice, first, 0.1)), rel=1e-12)
    for size in (2, 5, 50):
        # A common part gives all pairs of unit vectors the cosine 0.3.
        points = torch.cat([math.sqrt(0.3) * torch.ones(size, 1), math.sqrt(0.7) * torch.eye(size)], dim=1).double()
        found = belonging(points, torch.arange(size), 0.2)
        assert found.tolist() == pytest.approx([math.log1p(math.exp((0.3 - 1) / 0.2))] * size, rel=1e-6)


def mcse(**settings: Any) -> MCSE:
    built = MCSEConfig.model_validate({"projection": 6, **settings}).build(("a", "b"), around()).double()
    assert isinstance(built, MCSE)
    return built


def test_mcse_without_grounding_is_simcse() -> None:
    """Of tanh(W embedding), as MCSE has it."""
    batch, ours = views([0, 1, 2, 3]), mcse(weight=0.0)
    projected = replace(batch, queries=ours.text(batch.queries).tanh(), documents=ours.text(batch.documents).tanh())
    assert_same(mean(ours, batch), mean(InfoNCEConfig(temperature=0.05).build().double(), projected), batch)


def test_grounding_is_that_of_plain_loops() -> None:
    batch, ours = views([0] * 6), mcse(weight=0.3)
    assert batch.guide_queries is not None
    images = batch.guide_queries.clone()
    images[1] = images[0]  # two captions of one picture
    images[5] = 0  # a text without one
    batch = replace(batch, guide_queries=images)
    points = normalize(ours.image(images[[0, 2, 3, 4]]).tanh())
    target, terms = {0: 0, 1: 0, 2: 1, 3: 2, 4: 3}, []
    for side in (batch.queries, batch.documents):
        unit = normalize(ours.caption(side).tanh())
        for i, right in target.items():
            logits = unit[i] @ points.T / 0.05
            terms.append(logits.logsumexp(0) - logits[right])
    expected = mean(mcse(weight=0.0), batch) + 0.3 * torch.stack(terms).mean()
    assert_same(mean(ours, batch), expected, batch)


def test_permuted_pictures_cost_about_the_logarithm_of_the_batch() -> None:
    """Captions learnt to find their pictures do not find permuted ones, and the text's part does not change."""
    base, ours = views(list(range(5)) * 4), mcse(image_temperature=1.0, weight=1.0, projection=64)
    assert base.guide_queries is not None
    rate = torch.optim.Adam(ours.parameters(), lr=0.01)
    for _ in range(60):
        rate.zero_grad()
        ours.grounding(base).mean().backward()
        rate.step()
    right = float(ours.grounding(base).mean())
    wrong = replace(base, guide_queries=base.guide_queries.roll(7, dims=0))
    assert right < math.log(20) - 0.2 < math.log(20) - 0.1 < float(ours.grounding(wrong).mean())
    plain = mcse(weight=0.0)
    assert float(mean(plain, base)) == float(mean(plain, wrong))


def test_no_gradient_reaches_the_features_and_sources_say_which_are_captions() -> None:
    batch = views([0, 1, 2, 3])
    assert batch.guide_queries is not None
    features = batch.guide_queries.clone().requires_grad_()
    given = replace(batch, guide_queries=features, sources=torch.tensor([0, 0, 1, 1]))
    ours = mcse(weight=1.0)
    assert torch.autograd.grad(mean(ours, given), [features], allow_unused=True) == (None,)
    assert bool((mcse(captions=("a",)).grounding(given)[2:] == 0).all())
    with pytest.raises(BadInputError, match="no source 'c'"):
        mcse(captions=("c",))
    with pytest.raises(BadInputError, match="features"):
        mean(ours, replace(batch, guide_queries=None))


def planted(
    classes: int = 2, subclasses: int = 2, count: int = 40, merged: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors with an easy feature that means nothing, a class and a subclass; merged ones are equal within a class."""
    draw = torch.Generator().manual_seed(0)
    one, two = (torch.randn(n, 8, generator=draw, dtype=torch.float64) for n in (classes, classes * subclasses))
    label = torch.arange(count) % classes
    fine = label * subclasses + (torch.arange(count) // classes) % subclasses
    vectors = one[label] if merged else one[label] + 0.5 * two[fine] + 0.05 * torch.randn(count, 8, generator=draw)
    return vectors, label, fine


def test_probes_see_what_embeddings_hold() -> None:
    """Collapsed classes: subclasses at chance within a class, a rank of at most the classes, no scatter. Else both are found."""
    vectors, label, fine = planted(merged=True)
    assert probe_accuracy(vectors, label, 0) == 1.0
    assert all(probe_accuracy(vectors[label == one], fine[label == one], 0) == 0.5 for one in (0, 1))
    assert float(effective_rank(vectors)) <= 2 + 1e-6
    assert class_scatter(vectors, label) == pytest.approx(0, abs=1e-12)
    vectors, label, fine = planted()
    assert all(probe_accuracy(vectors[label == one], fine[label == one], 0) == 1.0 for one in (0, 1))
    assert 0 < class_scatter(vectors, label) < 1
    random = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float(effective_rank(random)) > 7.9
    assert class_scatter(random, torch.arange(2000) % 2) > 0.99
    assert math.isnan(probe_accuracy(vectors, torch.zeros(40, dtype=torch.int64), 0))
    assert math.isnan(class_scatter(vectors, torch.zeros(40, dtype=torch.int64)))


def test_a_sum_of_supervised_and_unsupervised_has_both_as_its_ends() -> None:
    """Shares of 1 and 0 are the parts themselves."""
    from nearfield.objectives import CombinedConfig

    batch = views([0, 1, 0, 1, 2])
    parts = {"supcon": {"kind": "supcon"}, "infonce": {"kind": "infonce"}}
    for share in (0.0, 1.0):
        whole = [{"objective": parts["supcon"], "weight": share}, {"objective": parts["infonce"], "weight": 1 - share}]
        both = CombinedConfig.model_validate({"kind": "combined", "parts": whole}).build().double()
        alone = CombinedConfig.model_validate({"kind": "combined", "parts": [{"objective": parts["supcon" if share else "infonce"]}]}).build()  # fmt: skip
        assert_same(mean(both, batch), mean(alone.double(), batch), batch)
