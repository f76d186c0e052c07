"""What can be scored: a sentence-transformers model by folder or name, and the baselines ``bm25`` and ``random``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfield.encoders import LoadedEncoder, load_encoder
from nearfield.encoders.identity import model_fingerprint
from nearfield.errors import BadInputError
from nearfield.evaluation.axes import AXES, SUFFIXES, Axes, turn_of
from nearfield.evaluation.config import BASELINES
from nearfield.evaluation.encoder import TaskEncoder
from nearfield.evaluation.vectors import QUANTIZATIONS, VectorCache
from nearfield.files import fingerprint
from nearfield.notices import Notice


@dataclass(frozen=True)
class ScoredModel:
    """A model as mteb calls it, and where its files are (None for a baseline)."""

    wrapper: Any
    name: str
    revision: str
    folder: Path | None
    note: str | None = None
    notices: tuple[Notice, ...] = ()
    """What a reader of its scores must know."""
    computes: str = ""
    """Names all that its vectors depend on: what loading read, the model in memory, versions; empty for a baseline."""

    @property
    def encoder(self) -> TaskEncoder | None:
        """The wrapper, where it is an embedding model with prompts."""
        return self.wrapper if isinstance(self.wrapper, TaskEncoder) else None

    @property
    def searches_only(self) -> bool:
        """Whether the model ranks documents without embedding them (BM25)."""
        return not hasattr(self.wrapper, "encode")


def open_model(
    model: str | LoadedEncoder,
    *,
    name: str | None,
    device: str | None,
    batch_tokens: int | None,
    cache: Path | None = None,
    dimensions: int | None = None,
    quantize: str = "none",
    axes: Axes = "first",
    base: str | None = None,
) -> ScoredModel:
    """Load a model by name, folder or baseline name; ``name`` replaces the name that results are filed under.

    Vectors are kept below ``cache``. A model that is cut to ``dimensions`` (of its own ``axes``, drawn or principal ones) or
    quantised is filed under a name that says so. ``base`` is where the base of an adapter alone lies, if not where it says.
    """
    if base is not None and (not isinstance(model, str) or model in BASELINES):
        raise BadInputError("only an adapter that was saved alone has a base", where="base", hint="Leave it out.")
    _check_variant(model, dimensions, quantize, axes)
    if name is not None and (name.count("/") > 1 or not all(part.strip() for part in name.split("/"))):
        raise BadInputError(f"the name {name!r} is not of the form organisation/model", where="name")
    if isinstance(model, str) and model in BASELINES:
        if name is not None:
            raise BadInputError(f"the baseline {model} keeps its own name, {BASELINES[model]}", where="name")
        return _baseline(model)
    loaded = load_encoder(model, device=device, base=base) if isinstance(model, str) else model
    filed = name or loaded.name
    filed = filed if "/" in filed else f"local/{filed}"
    if dimensions is not None:
        full = loaded.model.get_embedding_dimension()
        if full is not None and dimensions > full:
            raise BadInputError(f"the model has {full} dimensions; {dimensions} were asked for", where="dimensions")
        filed = f"{filed}-{SUFFIXES[axes]}{dimensions}"
    if quantize != "none":
        filed = f"{filed}-{quantize}"
    kept, computes = None, fingerprint([loaded.content, model_fingerprint(loaded.model)])
    if cache is not None:
        kept = VectorCache(cache, computes, {"name": loaded.name, "revision": loaded.revision})
    wrapper = TaskEncoder(
        loaded.model,
        name=filed,
        revision=loaded.revision,
        batch_tokens=batch_tokens,
        cache=kept,
        dimensions=dimensions,
        quantize=quantize,
    )
    if dimensions is not None and axes != "first":
        wrapper.turn = turn_of(axes, int(loaded.model.get_embedding_dimension() or 0), wrapper.vectors)
    folder = Path(loaded.path) if Path(loaded.path).is_dir() else None
    return ScoredModel(wrapper, filed, loaded.revision, folder, loaded.note, loaded.notices, computes)


def _check_variant(model: str | LoadedEncoder, dimensions: int | None, quantize: str, axes: str) -> None:
    if quantize not in QUANTIZATIONS:
        raise BadInputError(
            f"unknown quantisation {quantize!r}", where="quantize", hint=f"Known: {', '.join(QUANTIZATIONS)}."
        )
    if axes not in AXES:
        raise BadInputError(f"unknown axes {axes!r}", where="axes", hint=f"Known: {', '.join(AXES)}.")
    if axes != "first" and dimensions is None:
        raise BadInputError(
            f"the axes {axes!r} are for vectors that are cut", where="axes", hint="Give dimensions, too."
        )
    if dimensions is not None and dimensions < 1:
        raise BadInputError(f"the dimensions must be positive; they are {dimensions}", where="dimensions")
    if isinstance(model, str) and model in BASELINES and (dimensions is not None or quantize != "none"):
        raise BadInputError(f"the baseline {model} has no vectors to cut or quantise", where="dimensions")


def _baseline(model: str) -> ScoredModel:
    import mteb

    meta = mteb.get_model_meta(BASELINES[model])
    try:
        wrapper = meta.load_model()
    except ImportError as error:
        raise BadInputError(
            f"the baseline {model} lacks a package: {str(error).splitlines()[0]}", hint="pip install bm25s PyStemmer"
        ) from error
    return ScoredModel(wrapper, meta.name, meta.revision, None)
