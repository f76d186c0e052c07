"""The model card of a trained model: what it was made from and how, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from nearfield.encoders.prompts import TEXT, has_roles

if TYPE_CHECKING:
    from nearfield.encoders.config import EncoderConfig
    from nearfield.encoders.prompts import PromptContract


@dataclass(frozen=True)
class Origin:
    """The origin of a model's weights before training: a sentence, and the hub models that they came from."""

    sentence: str
    models: tuple[str, ...]
    """Models of the hub whose weights were trained on; none where all are new or of a local folder."""
    adapter: bool = False
    """Whether the folder holds an adapter alone, which needs the model."""


def origin_of(config: EncoderConfig, base: tuple[str, str]) -> Origin:
    """The origin of a recipe's encoder; ``base`` is the name and revision that its model goes by.

    A model that starts with ``local/`` is named in the sentence only, since the hub does not know it.
    """
    named = f"`{base[0]}` (revision `{base[1]}`)"
    adapter = config.adapter
    alone = adapter is not None and adapter.save == "adapter"
    if config.fresh is not None:
        changed = f", with {', '.join(config.fresh)} changed" if config.fresh else ""
        sentence = f"Trained from new weights, drawn at random, with nearfield; tokenizer and architecture are those of {named}{changed}."
    elif adapter is not None:
        joined = ", with the adapter added to them" if adapter.merges else " beside it"
        beside = ", and needs it to load" if alone else f", whose weights are in this folder{joined}"
        sentence = f"A {adapter.name}, trained with nearfield on {named}{beside}."
    else:
        sentence = f"Fine-tuned from {named} with nearfield."
    models = [] if config.fresh is not None or base[0].startswith("local/") else [base[0]]
    if config.layers is not None:
        sentence += f" Of its layers the first {config.layers} are kept."
    tower = config.image_tower
    if tower is not None and tower.model is None:
        sentence += f" The image tower ({tower.architecture}) was trained from new weights."
    elif tower is not None and tower.model is not None:
        local = tower.model.startswith(("/", ".", "~"))
        of = f"the local model `{tower.model.rstrip('/').rpartition('/')[2]}`" if local else f"`{tower.model}`"
        sentence += f" The image tower is that of {of}."
        models += [] if local else [tower.model]
    new = [words for words, there in _new_modules(config).items() if there]
    if new and config.fresh is None:
        sentence += f" New, and trained from nothing: {' and '.join(new)}."
    return Origin(sentence, tuple(models), alone)


def _new_modules(config: EncoderConfig) -> dict[str, bool]:
    """Modules that a recipe adds with weights of their own."""
    return {
        "the pooling": config.pooling is not None and not isinstance(config.pooling, str),
        "the mixture of layers": config.layer_mix is not None,
        "the projection": config.projection is not None,
    }


def model_card(
    name: str,
    origin: Origin,
    contract: PromptContract,
    facts: Mapping[str, object],
    contamination: Sequence[str] = (),
    remote_code: Sequence[str] = (),
    notices: Sequence[str] = (),
) -> str:
    """Markdown with the front matter that the hub reads.

    ``origin`` says what the weights were before. ``contract`` holds the prompts, ``facts`` short statements of the training, ``contamination``
    lines that say what the training texts share with benchmarks; ``remote_code`` names the files in the folder that
    sentence-transformers must run to load the model; ``notices`` are what a user must know of the training.
    """
    tags = ["sentence-transformers", "feature-extraction", "sentence-similarity", "nearfield"]
    front: dict[str, object] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": [*tags, "custom_code"] if remote_code else tags,
    }
    if origin.models:
        front["base_model"] = origin.models[0] if len(origin.models) == 1 else list(origin.models)
        front["base_model_relation"] = "adapter" if origin.adapter else "finetune"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}",
        "",
        origin.sentence,
        "",
        "## Use",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("this-folder"{", trust_remote_code=True" if remote_code else ""})',
        *usage(contract),
        "```",
        "",
        *((f"Loading runs {_listed(remote_code)} of that folder.", "") if remote_code else ()),
        "## Training",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        "",
        *(("## Notices", "", *(f"- {notice}" for notice in notices), "") if notices else ()),
        *(("## Benchmark texts in the training data", "", *contamination, "") if contamination else ()),
        "## Prompts",
        "",
        "The text put before queries and documents in training, by source. The model holds them under the keys that mteb",
        "resolves; `prompt_contract.json` lists them.",
        "",
        *(
            f"- {source}: query {_quoted(p['query'])}, document {_quoted(p['document'])}"
            for source, p in contract.sources.items()
        ),
        "",
        "Type not trained: tasks of types other than those of the sources "
        f"({', '.join(contract.by_type)}) get query {_quoted(contract.fallback['query'])}, document "
        f"{_quoted(contract.fallback['document'])}, texts without a role {_quoted(contract.default_prompt)}"
        f"{_besides(contract)}.",
        "",
    ]
    return "\n".join(lines)


def usage(contract: PromptContract) -> list[str]:
    """Lines of Python that encode with the prompts that the model is evaluated with; ``model`` is the loaded model.

    A prompt is named where plain ``encode_query``, ``encode_document`` or ``encode`` would put another.
    """
    blocks: dict[tuple[str, ...], list[str]] = {}
    for task_type, prompts in contract.by_type.items():
        if has_roles(task_type):
            calls = [
                f'{name} = model.encode_{role}(["a {role}"]{_named(f"{task_type}-{role}", prompts[role], contract.fallback[role])})'
                for name, role in (("queries", "query"), ("documents", "document"))
            ]
            calls.append("similarities = model.similarity(queries, documents)")
        else:
            name = _named(task_type, prompts[TEXT], contract.default_prompt)
            calls = [f'texts = model.encode(["a text", "another text"]{name})']
            calls.append("similarities = model.similarity(texts, texts)")
        blocks.setdefault(tuple(calls), []).append(task_type)
    lines: list[str] = []
    for block, types in blocks.items():
        heading = [f"# {', '.join(types)}"] if len(contract.by_type) > 1 else []
        lines += [*([""] if lines else []), *heading, *block]
    return lines


def _named(key: str, wanted: str, plain: str) -> str:
    return "" if wanted == plain else f", prompt_name={json.dumps(key)}"


def _besides(contract: PromptContract) -> str:
    names = ", ".join(f"`{name}`" for name in contract.unseen)
    return f"; those of {names} what the model holds for them" if names else ""


def _listed(files: Sequence[str]) -> str:
    return " and ".join(f"`{file}`" for file in files)


def _quoted(text: str) -> str:
    return f"`{json.dumps(text, ensure_ascii=False)}`" if text else "none"
