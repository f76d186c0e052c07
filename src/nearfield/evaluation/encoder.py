"""The encoder that mteb's tasks call, and the prompts that it puts before texts.

It is mteb's own wrapper, with each distinct text of a task encoded once: the prompt of a text is decided by mteb's and
sentence-transformers' own code, vectors are made by :class:`nearfield.encoders.encode.Encoder`. A model is scored with
prompts that it was trained with, or the run stops (:func:`prompt_notices`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from mteb.abstasks import AbsTaskRetrieval
from mteb.models.abs_encoder import AbsEncoder, get_prompt
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from numpy.typing import NDArray

from nearfield.console import track
from nearfield.data.vectors import require_finite
from nearfield.encoders.encode import Encoder, ZeroCount
from nearfield.encoders.load import shipped_files
from nearfield.encoders.prompts import ROLES, SIDES, TEXT, has_roles, read_contract
from nearfield.encoders.source import CONTRACT_FILE
from nearfield.encoders.tokenize import count_cuts, token_ids
from nearfield.errors import BadInputError, Notice

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_MAX_KEPT_TEXTS = 500_000


class TaskEncoder(SentenceTransformerEncoderWrapper):  # type: ignore[misc]
    """A sentence-transformers model under the name and revision that its results are filed by.

    ``encoder`` makes the whole vectors; ``dimensions`` and ``quantize`` change what mteb gets of them.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        name: str,
        revision: str,
        encoder: Encoder | None = None,
        dimensions: int | None = None,
        quantize: str = "none",
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(model)
        update: dict[str, Any] = {"name": name, "revision": revision}
        known = {"text", "image", "audio", "video"}
        update["modalities"] = [m for m in model.modalities if m in known] or ["text"]
        self.mteb_model_meta: Any
        if shipped_files(model):
            # Whoever loads the model by these data must run the files that its folder holds.
            update["loader_kwargs"] = {**self.mteb_model_meta.loader_kwargs, "trust_remote_code": True}
        self.mteb_model_meta = self.mteb_model_meta.model_copy(update=update)
        self.encoder = encoder or Encoder(model)
        self.dimensions, self.quantize = dimensions, quantize
        self.turn: Rotate | None = None
        self.zeros = ZeroCount()
        """Of the vectors that the present task got."""
        self.same_tokens = 0
        """Texts of the present task whose tokens are those of another text: they have its very vector."""
        self._kept: dict[tuple[str | None, str | None], dict[str, NDArray[np.float32]]] = {}
        self._first: dict[tuple[str | None, str | None], dict[bytes, str]] = {}

    def forget(self) -> None:
        """Drop what was kept of a task: the embeddings of its texts, and how many of them are zero."""
        self._kept.clear()
        self._first.clear()
        self.same_tokens = 0
        self.zeros = ZeroCount()

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, d) whole vectors of texts without prompt or role, of unit length or not as the model makes them."""
        vector_of = self.encoder.each(texts, says=f"encoding {len(texts)} texts")
        made = np.stack([vector_of[text] for text in texts])
        require_finite(made, texts.__getitem__, self.mteb_model_meta.name)
        return made

    def prompt_for(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """The string that is put before a text of this role in this task; empty for none."""
        saved = SavedPrompts(self.model.prompts, self.model.default_prompt_name, self.model_prompts or {})
        return saved.prompt_for(task_metadata, prompt_type)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Any:
        """Embeddings ``[texts, dimensions]`` (float32) of a data loader's texts, in its order.

        Raises :class:`BadInputError` where the model's vectors are not finite: no score can be made of them.
        """
        texts: list[str] | None = None
        if {"audio", "video"} & set(inputs.dataset.features):
            asked = {"task_metadata": task_metadata, "hf_split": hf_split, "hf_subset": hf_subset}
            vectors = super().encode(inputs, prompt_type=prompt_type, **asked, **kwargs)
            whole = np.asarray(vectors, dtype=np.float32)
        elif "image" in inputs.dataset.features:
            prompt = self.prompt_for(task_metadata, prompt_type)
            batches = track(inputs, f"{task_metadata.name}: encoding images")
            whole = np.concatenate([self.encoder.of_images(b["image"], b.get("text"), prompt) for b in batches])
        else:
            texts = [text for batch in inputs for text in batch["text"]]
            whole = self._embed_texts(texts, task_metadata, prompt_type)
        return self._checked(whole, texts, task_metadata.name)

    def _embed_texts(
        self, texts: Sequence[str], task_metadata: Any, prompt_type: PromptType | None
    ) -> NDArray[np.float32]:
        """Whole vectors of texts; each distinct text of a task is encoded once, and so is each sequence of tokens.

        Among other texts of a batch equal tokens would get vectors that differ in the last digits, which breaks ties.
        """
        role = None if prompt_type is None else prompt_type.value
        place = (role, get_prompt(self.model_prompts, task_metadata, prompt_type))
        vectors = self._kept.setdefault(place, {})
        missing = [text for text in dict.fromkeys(texts) if text not in vectors]
        if sum(map(len, self._kept.values())) + len(missing) > _MAX_KEPT_TEXTS:
            vectors = {text: vectors[text] for text in texts if text in vectors}
        if missing:
            prompt = self.prompt_for(task_metadata, prompt_type)
            says = f"{task_metadata.name}: encoding {len(missing)} texts"
            first = self._first_of_tokens(missing, prompt, self._first.setdefault(place, {}))
            wanted = [text for text in dict.fromkeys(first.values()) if text not in vectors]
            vectors.update(self.encoder.each(wanted, prompt, role, says=says) if wanted else {})
            others = [text for text in missing if first[text] != text]
            if others:
                self.encoder.cut += count_cuts(self.model, others, prompt)
                self.same_tokens += len(others)
            vectors.update({text: vectors[first[text]] for text in others})
        return np.stack([vectors[text] for text in texts])

    def _first_of_tokens(self, texts: Sequence[str], prompt: str, known: dict[bytes, str]) -> dict[str, str]:
        """The first text of the same tokens for each of some texts; a model that tokenises texts itself tells none."""
        if not self.encoder.by_tokens:
            return {text: text for text in texts}
        rows = token_ids(self.model, texts, prompt)
        return {text: known.setdefault(row.tobytes(), text) for text, row in zip(texts, rows, strict=True)}

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The model's similarity of all pairs; of signs it is exact, so that equal Hamming distances are ties."""
        return self._exact(super().similarity(embeddings1, embeddings2), embeddings1)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The model's similarity of each pair, as exact."""
        return self._exact(super().similarity_pairwise(embeddings1, embeddings2), embeddings1)

    def _exact(self, scores: Any, embeddings: Any) -> Any:
        if self.quantize != "binary" or self.model.similarity_fn_name not in (None, "cosine", "dot"):
            return scores
        width = embeddings.shape[-1]
        return (scores * width).round() / width

    def _checked(self, whole: NDArray[np.float32], texts: Sequence[str] | None, task: str) -> NDArray[np.float32]:
        """Vectors as they are scored, cut and rounded; counted where they are zero, refused where they are not finite.

        Cutting would hide a part that is not finite, and signs would hide both.
        """

        def item(row: int) -> str | None:
            return None if texts is None else texts[row]

        require_finite(whole, item, task, "items" if texts is None else "texts")
        cut = compress(whole, self.dimensions, "none", self.turn)
        self.zeros.count(cut, item)
        return compress(cut, None, self.quantize)


@contextlib.contextmanager
def exact_distances(encoder: Any) -> Iterator[None]:
    """Inside, mteb's distances of pairs of signs are made of the number of signs that differ: equal ones are ties."""
    if getattr(encoder, "quantize", "none") != "binary":
        yield
        return
    from mteb._evaluators import any_sts_evaluator, pair_classification_evaluator

    def differing(first: Any, second: Any) -> tuple[NDArray[np.float64], int]:
        signs = [np.asarray(one) > 0 for one in (first, second)]
        return (signs[0] != signs[1]).sum(axis=1).astype(np.float64), signs[0].shape[1]

    def cosine(first: Any, second: Any) -> NDArray[np.float64]:
        count, width = differing(first, second)
        return np.asarray(2 * count / width)

    def manhattan(first: Any, second: Any) -> NDArray[np.float64]:
        count, width = differing(first, second)
        return np.asarray(2 * count / np.sqrt(width))

    def euclidean(first: Any, second: Any) -> NDArray[np.float64]:
        count, width = differing(first, second)
        return np.asarray(2 * np.sqrt(count / width))

    made = {"cosine": cosine, "manhattan": manhattan, "euclidean": euclidean}
    before = []
    for module in (any_sts_evaluator, pair_classification_evaluator):
        for name, distances in made.items():
            before.append((module, f"paired_{name}_distances", getattr(module, f"paired_{name}_distances")))
            setattr(module, f"paired_{name}_distances", distances)
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


Rotate = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""(n, d) vectors on other axes, the most important one first: (n, k)."""
QUANTIZATIONS = ("none", "int8", "binary")


def compress(
    vectors: NDArray[np.float32], dimensions: int | None, quantize: str, turn: Rotate | None = None
) -> NDArray[np.float32]:
    """The first ``dimensions`` of vectors ``[n, d]``, of unit length again, then rounded as storage would round them.

    With a ``turn``, the first of its axes instead of the vectors' own.

    ``int8``: each vector times 127 over its largest coordinate, rounded; ``binary``: the signs. Both come back as
    float32, with the geometry that the small numbers have.
    """
    made = vectors if turn is None else turn(vectors)
    if dimensions is not None and (dimensions < made.shape[1] or turn is not None):
        made = made[:, :dimensions]
        lengths = np.linalg.norm(made, axis=1, keepdims=True)
        made = made / np.maximum(lengths, 1e-12)
    if quantize == "int8":
        largest = np.maximum(np.abs(made).max(axis=1, keepdims=True), 1e-12)
        made = np.round(made * (127 / largest)) * (largest / 127)
    elif quantize == "binary":
        made = np.where(made > 0, 1.0, -1.0) / np.sqrt(made.shape[1])
    return np.ascontiguousarray(made, dtype=np.float32)


# Prompts


def roles_of(task: Any) -> tuple[PromptType | None, ...]:
    """The roles whose texts a task encodes; None stands for texts without a role (pairs, items)."""
    if isinstance(task, AbsTaskRetrieval):
        return (PromptType.query, PromptType.document)
    if hasattr(task, "input1_prompt_type"):
        return tuple(dict.fromkeys([task.input1_prompt_type, task.input2_prompt_type]))
    return (None,)


@dataclass(frozen=True)
class SavedPrompts:
    """A model's prompts without the model."""

    prompts: Mapping[str, str]
    default_prompt_name: str | None = None
    resolved: Mapping[str, str] | None = None
    """Those that mteb takes; null looks which of them it does."""

    def prompt_for(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """The string that is put before a text of this role in this task; empty for none.

        The order is mteb's (task name and role, task name, task type and role, task type, role), then
        sentence-transformers' (the role's own prompt; for texts without a role the default prompt).
        """
        resolved = self.resolved
        if resolved is None:
            resolved = AbsEncoder.validate_task_to_prompt_name(dict(self.prompts), raise_for_invalid_keys=False)[0]
        prompt = get_prompt(None if resolved is None else dict(resolved), task_metadata, prompt_type)
        if prompt is None:
            keys = () if prompt_type is None else SIDES[prompt_type.value]
            name = next((key for key in keys if key in self.prompts), self.default_prompt_name)
            prompt = None if name is None else self.prompts.get(name)
        return prompt or ""


class Prompting(Protocol):
    """Says what is put before texts: a model's wrapper, or prompts that a model will be saved with."""

    def prompt_for(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """The string before each text of a role in a task."""
        ...


@dataclass(frozen=True)
class TrainedPrompts:
    """The prompts that the texts of a task may get, by those that a model was trained with."""

    listed: Mapping[str, Sequence[str]]
    """Role -> prompts of any source; an empty string is no prompt."""
    trained: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """Task type of a source -> role (``text`` for none) -> prompts."""
    stated: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """Task type that no source has, or task -> role -> prompts that it is saved with."""
    fallback: Mapping[str, str] = field(default_factory=dict)
    """Role -> prompt of all other types."""

    @classmethod
    def read(cls, folder: Path) -> TrainedPrompts | None:
        """Of a model's folder; None where it has no contract."""
        return cls.of(read_contract(folder)) if (folder / CONTRACT_FILE).is_file() else None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> TrainedPrompts:
        """Of a contract as its file holds it."""
        listed = {role: sorted({text or "" for text in texts}) for role, texts in data["prompts"].items()}
        if data["version"] == 1:
            # Where a source said nothing for documents, half of the texts of a type without roles had no prompt: that
            # is no reason to leave out the one that they had. And what such a model gave other types was not stated.
            trained = {name: {**of, **listed} for name, of in _by_type(data["tasks"], ("query",)).items()}
            return cls(listed, trained, fallback={TEXT: ""})
        fallback = {role: text or "" for role, text in data.get("fallback", {}).items()}
        return cls(listed, _by_type(data["tasks"], ROLES), data.get("types", {}), fallback)

    def knows(self, task_type: str) -> bool:
        """Whether a source was of this type."""
        return task_type in self.trained

    def allowed(self, task_metadata: Any, role: PromptType | None) -> list[str]:
        """The prompts that texts of a role may get in a task."""
        task_type, name = str(task_metadata.type), TEXT if role is None else role.value
        trained, stated = self.trained.get(task_type), set(self.stated.get(str(task_metadata.name), {}).get(name, ()))
        if trained is not None:
            return sorted(stated | set(trained.get(name, ())) | set(trained.get(TEXT, ())))
        stated |= {text for each in (name, TEXT) for text in self.stated.get(task_type, {}).get(each, ())}
        roles = ROLES if role is None else (name,)
        if name in self.fallback:
            stated.add(self.fallback[name])
        return sorted(stated | {text for each in roles for text in self.listed.get(each, ())})


def _by_type(tasks: Mapping[str, Mapping[str, Any]], sides: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Task type -> role -> what its sources were trained with; texts without a role may get what those ``sides`` had."""
    by_type: dict[str, dict[str, set[str]]] = {}
    for task in tasks.values():
        of, several = by_type.setdefault(task["task_type"], {}), task.get("phrasings", {})
        for role in ROLES:
            texts = {text or "" for text in several.get(role, [task.get(role)])}
            of.setdefault(role, set()).update(texts)
            if role in sides and not has_roles(task["task_type"]):
                of.setdefault(TEXT, set()).update(texts)
    return {task_type: {role: sorted(texts) for role, texts in of.items()} for task_type, of in by_type.items()}


def folder_notices(encoder: Prompting, folder: Path, tasks: Sequence[Any], *, check: bool) -> TaskNotices:
    """:func:`prompt_notices` of a model by the contract in its folder."""
    hint = (
        "Add the prompt to the model's config_sentence_transformers.json under a key that mteb resolves ({key}), or score "
        "the model as it is with --prompts as-is."
    )
    contract = TrainedPrompts.read(folder)
    return prompt_notices(encoder, contract, tasks, where=str(folder / CONTRACT_FILE), hint=hint, check=check)


TaskNotices = dict[str, tuple[Notice, ...]]
"""Task -> what readers of its score must know; under ``""`` what holds for all tasks."""


def prompt_notices(
    encoder: Prompting,
    contract: TrainedPrompts | None,
    tasks: Sequence[Any],
    *,
    where: str,
    hint: str,
    check: bool = True,
) -> TaskNotices:
    """Facts about the tasks' prompts that readers of their scores must know; none without a contract.

    Raises :class:`BadInputError` where a task would be encoded with a prompt that the contract does not allow (``{key}``
    in the hint becomes the prompt's key); without ``check`` a notice names those tasks.
    """
    if contract is None:
        return {}
    notices: TaskNotices = {}
    broken: dict[str, None] = {}
    for task in tasks:
        name, task_type = str(task.metadata.name), str(task.metadata.type)
        puts = {role: encoder.prompt_for(task.metadata, role) for role in roles_of(task)}
        for role, prompt in puts.items():
            allowed = contract.allowed(task.metadata, role)
            if prompt in allowed:
                continue
            if check:
                what = role.value if role else "text without a role"
                raise BadInputError(
                    f"the task {name} ({task_type}) would put {_said(prompt)} before each {what}, "
                    f"but the model was trained with {', '.join(map(_said, allowed)) or 'nothing'}",
                    where=where,
                    hint=hint.format(key=f"{task_type}-{role.value}" if role else task_type),
                )
            broken[f"{name} ({_said(prompt)})"] = None
        if not contract.knows(task_type):
            said = [
                f"{_said(text)} before {f'each {role.value}' if role else 'its texts'}" for role, text in puts.items()
            ]
            notices[name] = (
                Notice(
                    "type-not-trained",
                    f"type not trained: no source of the training was of type {task_type}; {name} puts {' and '.join(said)}",
                    f"Train with a source of the type, or state what such tasks get under prompts.types.{task_type} or "
                    "prompts.fallback of the recipe.",
                ),
            )
    if not check:
        what = "prompts as they are: the prompt contract was not checked"
        if broken:
            what += f"; it does not allow those of {', '.join(broken)}"
        hint = "Without --prompts as-is the model is scored with what it was trained with."
        notices[""] = (Notice("prompts-as-is", what, hint),)
    return notices


def _said(prompt: str) -> str:
    return repr(prompt) if prompt else "no prompt"
