"""Every weight of a model comes from its files: transformers draws what a file lacks at random and only warns.

transformers itself knows the layouts that it reads (sharded, tied, compressed, of earlier versions, under a prefix of its
own), so its report of each loading is kept, and a model that owes a weight to no file is refused.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nearfield.encoders.layers import LAYER
from nearfield.encoders.packing import evaluating
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer

_STATISTICS = re.compile(r"(?:^|\.)running_(?:mean|var)$")
"""Buffers that are learnt: all others follow from the config."""


@dataclass
class Loading:
    """What transformers reported of the models that it loaded."""

    missing: dict[str, Tensor] = field(default_factory=dict)
    """Parameters and learnt buffers that no file held, by their names."""
    unread: set[str] = field(default_factory=set)
    """Tensors of the files that no model had a place for."""


@contextlib.contextmanager
def recorded_loading() -> Iterator[Loading]:
    """Keep what transformers reports of each model and adapter that it loads inside the block."""
    from transformers import modeling_utils
    from transformers.integrations import peft

    loading = Loading()
    said = {owner: owner.log_state_dict_report for owner in (modeling_utils, peft)}

    def recording(report: Callable[..., None]) -> Callable[..., None]:
        def record(model: nn.Module, *args: Any, loading_info: Any, **kwargs: Any) -> None:
            tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
            for name in loading_info.missing_keys:
                tensor = tensors.get(name)
                if isinstance(tensor, nn.Parameter) or (tensor is not None and _STATISTICS.search(name)):
                    loading.missing[name] = tensor
            loading.unread |= set(loading_info.unexpected_keys)
            report(model, *args, loading_info=loading_info, **kwargs)

        return record

    for owner, report in said.items():
        owner.log_state_dict_report = recording(report)
    try:
        yield loading
    finally:
        for owner, report in said.items():
            owner.log_state_dict_report = report


def check_weights(loading: Loading, outputs: Callable[[], Sequence[Tensor]], where: str) -> None:
    """Refuse a model that owes a weight to no file, unless nothing depends on it (:func:`embedding_trial` makes ``outputs``).

    Heads that an embedding does not pass through, as BERT's pooler, are often left out of files. Those of layers are
    wanted always: of a mixture of experts one trial does not reach all.
    """
    missing = dict(loading.missing)
    heads = {n: t for n, t in missing.items() if isinstance(t, nn.Parameter) and not LAYER.search(n)}
    if heads:
        try:
            used = _reached(list(heads.values()), outputs)
        except Exception:  # a model that cannot be tried out: all are wanted
            used = {id(tensor) for tensor in heads.values()}
        missing = {name: tensor for name, tensor in missing.items() if name not in heads or id(tensor) in used}
    if not missing:
        return
    prefix = _prefix(missing, loading.unread)
    raise BadInputError(
        f"{len(missing)} tensors of the model are not in its weights files, e.g. {min(missing)!r}; random numbers would stand "
        "in their place",
        where=where,
        hint=f"The files have them under names that begin with {prefix!r}: save the model without this wrapper."
        if prefix
        else "The folder's config and weights do not belong together, or its weights are not complete.",
    )


def _prefix(missing: dict[str, Tensor], unread: set[str]) -> str | None:
    """What stands before the missing tensors' names in the files, where that is one and the same for most."""
    before: Counter[str] = Counter()
    for name in unread:
        # The shortest start whose rest is missed.
        parts = name.split(".")
        rest = next((i for i in range(1, len(parts)) if ".".join(parts[i:]) in missing), None)
        if rest is not None:
            before[".".join(parts[:rest]) + "."] += 1
    most = before.most_common(1)
    return most[0][0] if most and most[0][1] > len(missing) // 2 else None


def leads_to(outputs: Sequence[Tensor]) -> set[int]:
    """The ids of the tensors with a gradient that the graph of some outputs leads to; no gradient is computed."""
    ends: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    used: set[int] = set()
    while ends:
        node = ends.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            used.add(id(node.variable))
        ends += [before for before, _ in node.next_functions]
    return used


def _reached(parameters: Sequence[Tensor], outputs: Callable[[], Sequence[Tensor]]) -> set[int]:
    """The ids of those of some parameters that outputs depend on."""
    # Whole numbers, as of a quantised layer, have no gradient: they count as reached.
    fixed = {id(each) for each in parameters if not each.is_floating_point()}
    learnt = [(each, each.requires_grad) for each in parameters if each.is_floating_point()]
    for each, _ in learnt:
        each.requires_grad_(True)
    try:
        return leads_to(outputs()) | fixed
    finally:
        for each, required in learnt:
            each.requires_grad_(required)


def embedding_trial(model: SentenceTransformer) -> Callable[[], list[Tensor]]:
    """The function that embeds a text and a picture, each where the model takes them, with their graph."""

    def outputs() -> list[Tensor]:
        from nearfield.encoders.one_tower import family_of
        from nearfield.encoders.one_tower_checks import trial_embedding
        from nearfield.encoders.towers import blank_picture

        with torch.enable_grad(), torch.random.fork_rng(), evaluating(model):
            if family_of(model) is not None:
                return [trial_embedding(model)]
            takes = {"text": "a text of some words", "image": blank_picture()}
            unknown = [each for each in model.modalities if isinstance(each, str) and each not in (*takes, "message")]
            if unknown:
                raise ValueError(f"no trial of {unknown[0]}")
            found = []
            for modality, item in takes.items():
                if modality not in model.modalities:
                    continue
                features = model.preprocess([item])
                given = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in features.items()}
                found.append(model(given)["sentence_embedding"])
            return found

    return outputs


def pair_trial(model: CrossEncoder) -> Callable[[], list[Tensor]]:
    """The function that scores a pair of texts by a cross-encoder, with its graph."""

    def outputs() -> list[Tensor]:
        with torch.enable_grad(), torch.random.fork_rng(), evaluating(model):
            features = model.preprocess([("a text", "another text")])
            given = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in features.items()}
            return [model(given)["scores"]]

    return outputs
