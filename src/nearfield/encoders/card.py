"""The model card of a trained model: what it was made from and how, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import yaml


def model_card(
    name: str,
    base: tuple[str, str],
    prompts: Mapping[str, Mapping[str, str]],
    facts: Mapping[str, object],
    contamination: Sequence[str] = (),
    remote_code: Sequence[str] = (),
) -> str:
    """Markdown with the front matter that the hub reads.

    ``base`` is the base model's name and revision; one that starts with ``local/`` is named in the text only, since the hub
    does not know it. ``prompts`` are source -> role -> text, ``facts`` short statements of the training, ``contamination``
    lines that say what the training texts share with benchmarks; ``remote_code`` names the files in the folder that
    sentence-transformers must run to load the model.
    """
    tags = ["sentence-transformers", "feature-extraction", "sentence-similarity", "nearfield"]
    front: dict[str, object] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": [*tags, "custom_code"] if remote_code else tags,
    }
    if not base[0].startswith("local/"):
        front["base_model"] = base[0]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"Fine-tuned from `{base[0]}` (revision `{base[1]}`) with nearfield.",
        "",
        "## Use",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("this-folder"{", trust_remote_code=True" if remote_code else ""})',
        'queries = model.encode_query(["a query"])',
        'documents = model.encode_document(["a document"])',
        "similarities = model.similarity(queries, documents)",
        "```",
        "",
        *((f"Loading runs {_listed(remote_code)} of that folder.", "") if remote_code else ()),
        "## Training",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        "",
        *(("## Benchmark texts in the training data", "", *contamination, "") if contamination else ()),
        "## Prompts",
        "",
        "The text put before queries and documents in training, by source. The model holds them under the keys that mteb",
        "resolves; `prompt_contract.json` lists them.",
        "",
        *(
            f"- {source}: query {_quoted(p['query'])}, document {_quoted(p['document'])}"
            for source, p in prompts.items()
        ),
        "",
    ]
    return "\n".join(lines)


def _listed(files: Sequence[str]) -> str:
    return " and ".join(f"`{file}`" for file in files)


def _quoted(text: str) -> str:
    return f"`{json.dumps(text, ensure_ascii=False)}`" if text else "none"
