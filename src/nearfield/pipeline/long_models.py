"""What it costs to score a model that reads long texts, said before it is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.evaluation.tasks import SuiteTask

LONG = 2048
"""Tokens that a model may read without a word about it."""


def say_long_model(
    model: SentenceTransformer, tasks: list[SuiteTask], models: int, token_seconds: float, typical: float
) -> str | None:
    """A sentence on a model that reads more than :data:`LONG` tokens; None for others.

    ``tasks`` are those that ``models`` models are scored on; ``token_seconds`` is what a token takes in a text of
    ``typical`` tokens, on this device.
    """
    from nearfield.encoders.limits import longest_input
    from nearfield.training.forecast import say_seconds

    limit = longest_input(model)
    if limit is not None and limit <= LONG:
        return None
    reads = "texts of any length" if limit is None else f"{limit:,} tokens of a text"
    said = f"the model reads {reads}, in its evaluation too"
    if limit is not None:
        one = _seconds(model, limit, token_seconds, typical)
        said += f"; a text of that length takes about {say_seconds(one)} on this device"
    counted, lengths = _suite_lengths(model, tasks)
    if lengths:
        seconds = sum(_seconds(model, length, token_seconds, typical) for length in lengths) * models
        said += (
            f"; the {len(lengths):,} texts of {', '.join(counted)} have {sum(lengths):,} tokens, the longest {max(lengths):,}: "
            f"about {say_seconds(seconds)} for {models} model{'s' if models > 1 else ''}"
        )
    missing = [task.name for task in tasks if task.name not in counted]
    if missing:
        said += f"; not counted, since their data are not here: {', '.join(missing)}"
    return said


def _suite_lengths(model: SentenceTransformer, tasks: list[SuiteTask]) -> tuple[list[str], list[int]]:
    """The tasks whose data are on this machine, and the tokens of each of their texts as the model reads it, without prompts."""
    from nearfield.encoders.limits import longest_input
    from nearfield.encoders.tokenize import whole_lengths
    from nearfield.evaluation.texts import benchmark_tasks

    limit = longest_input(model)
    counted: list[str] = []
    lengths: list[int] = []
    for task in tasks:
        if not task.is_local:
            continue
        try:
            texts = {text.text for part in benchmark_tasks([task]) for text in part.texts()}
        except BadInputError:
            continue
        counted.append(task.name)
        lengths += [length if limit is None else min(length, limit) for length in whole_lengths(model, list(texts), "")]
    return counted, lengths


def _seconds(model: SentenceTransformer, length: int, token_seconds: float, typical: float) -> float:
    """Of a text of ``length`` tokens: the work in its layers grows with the length, that in attention with its square."""
    return length * token_seconds * _work(model, length) / _work(model, typical)


def _work(model: SentenceTransformer, length: float) -> float:
    """Operations for one token of a text of ``length`` tokens, up to a factor."""
    transformer: Any = getattr(model[0], "auto_model", None)
    if transformer is None:
        return 1.0
    config = transformer.config.get_text_config()
    weights: int = sum(p.numel() for p in transformer.parameters()) - transformer.get_input_embeddings().weight.numel()
    attention = 2 * int(getattr(config, "num_hidden_layers", 0)) * int(getattr(config, "hidden_size", 0)) * length
    return max(1.0, float(weights + attention))
