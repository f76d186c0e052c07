"""Losses on hidden tokens, trained before embeddings are: BERT's masked words, LLM2Vec's MNTP, RetroMAE's decoder.

Tokens of a text are masked, by the text's numbers alone, whatever chunk or process it is in; the encoder reads the rest, and the head
of a language model of its architecture predicts what stood there. A text's row is its embedding, and behind it, for each loss, the sum over
its tokens and their number. Whoever sees the rows of all texts can take the mean over all tokens, and its gradient with respect to
the sums goes back as that of embeddings does.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from nearfield.arrays import Tokens
from nearfield.config import Config, Share
from nearfield.encoders.packing import (
    TARGETS,
    Features,
    MakeTokenTask,
    TextKey,
    TokenTask,
    longest_input,
    pool,
    rectangle,
    token_states,
    truncated,
)
from nearfield.encoders.private import tied_weights
from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Objective, accumulation_dtype
from nearfield.objectives.config import ANY_EXAMPLES, Names, ObjectiveSettings, Surroundings
from nearfield.provenance import generator

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("nearfield.methods")


class DecoderConfig(Config):
    """A decoder of one layer that predicts the whole text from its embedding and a few of its tokens (RetroMAE, arXiv
    2205.12035, with enhanced decoding)."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of a text's other tokens, the share that each position does not see; drawn anew for each position."""
    heads: Annotated[int, Field(ge=1)] | None = None
    """Null takes as many as the encoder has."""
    expansion: Annotated[int, Field(ge=1)] = 4
    """How many times wider the feed-forward part is."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """The factor of its mean loss."""


class MaskedTokensConfig(ObjectiveSettings):
    """The model predicts hidden tokens of texts, before embeddings are trained: masked words, MNTP, or with a decoder RetroMAE.

    The queries of any examples are the texts; alone in a batch, what else an example has is not used.
    """

    example_kinds: ClassVar[tuple[str, ...]] = ANY_EXAMPLES

    views: ClassVar[int] = 1
    kind: Literal["masked_tokens"] = "masked_tokens"
    predict: Literal["masked", "next"] = "masked"
    """``masked`` predicts a masked token at its own place (BERT); ``next`` at the place before it, as decoders learnt to (MNTP,
    LLM2Vec, arXiv 2404.05961)."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Of a text's tokens, the share that is masked; never special tokens, nor those of a prompt."""
    mask_token: str | None = None
    """The token in a masked token's place; null takes the tokenizer's own mask token, or ``_`` where it has none."""
    random: Share = 0.1
    """Of the masked tokens, the share that becomes a random word instead."""
    kept: Share = 0.1
    """Of the masked tokens, the share that stays as it is, and is predicted all the same."""
    decoder: DecoderConfig | None = None
    """Let a small decoder predict the whole text from its embedding, too (RetroMAE); null leaves it out."""

    @model_validator(mode="after")
    def _something_is_masked(self) -> MaskedTokensConfig:
        if self.random + self.kept > 1:
            raise ValueError(f"random {self.random:g} and kept {self.kept:g} are more than all masked tokens")
        return self

    @property
    def comparisons(self) -> frozenset[str]:
        return frozenset()

    @property
    def token_task(self) -> MakeTokenTask:
        return lambda model, path, seed: MaskedTokens(model, self, path, seed)

    @property
    def summary(self) -> str:
        decoder = "" if self.decoder is None else f", a decoder that does not see {self.decoder.share:g}"
        return f"masked_tokens, {self.predict}, {self.share:g} of the tokens{decoder}"

    def build(self, sources: Names = (), around: Surroundings | None = None) -> TokenLosses:
        return TokenLosses([1.0] if self.decoder is None else [1.0, self.decoder.weight])


NOTHING = -100
"""The label of a token that is not to be predicted."""


@dataclass(frozen=True)
class MaskedText:
    """A text of which some tokens are masked."""

    tokens: Tokens
    """(t,) what the encoder reads."""
    labels: npt.NDArray[np.int64]
    """(t,) the masked tokens, ``NOTHING`` elsewhere."""
    words: npt.NDArray[np.bool_]
    """(t,) the tokens that could have been masked."""


@dataclass(frozen=True)
class Targets:
    """The tokens of a chunk of n texts that are to be predicted; places are those of its padded rectangle."""

    labels: Tensor
    """(n, longest) int64, ``NOTHING`` where nothing is masked."""
    ids: Tensor | None = None
    """(n, longest) int64: the tokens themselves, for a decoder."""
    words: Tensor | None = None
    """(n, longest) bool: those that a decoder must predict."""
    seen: Tensor | None = None
    """(n, longest, longest) bool: which tokens each place of a decoder sees."""


@dataclass(frozen=True)
class Masking:
    """How tokens of texts are masked for a model to predict them."""

    config: MaskedTokensConfig
    mask: int
    """The token that stands in a masked one's place."""
    vocabulary: int
    """Tokens that a random one is drawn from."""
    special: npt.NDArray[np.int64]
    """Tokens that are never masked."""

    def text(self, tokens: Tokens, random: np.random.Generator, prompt_length: int) -> MaskedText:
        """Mask a share of a text's tokens, each by chance; never special ones, nor the first ``prompt_length``."""
        config, count = self.config, len(tokens)
        words = ~np.isin(tokens, self.special)
        words[:prompt_length] = False
        if config.predict == "next":
            words[:1] = False  # nothing stands before it
        chosen = words & (random.random(count) < config.share)
        how, others = random.random(count), random.integers(0, self.vocabulary, count)
        swapped = chosen & (how < config.random)
        masked = chosen & (how >= config.random + config.kept)
        read = np.where(masked, self.mask, np.where(swapped, others, tokens)).astype(np.int32)
        return MaskedText(read, np.where(chosen, tokens, NOTHING).astype(np.int64), words)

    def chunk(
        self,
        rows: Sequence[Tokens],
        keys: Sequence[TextKey],
        chosen: Sequence[bool],
        prompt_length: int,
        side: str,
        device: torch.device,
    ) -> tuple[list[Tokens], Targets]:
        """Mask tokens of the ``chosen`` texts of a chunk: what the encoder reads, and what is to be predicted.

        Masks are a function of a text's key alone, whatever chunk or process it is in.
        """
        texts, decoder = [], self.config.decoder
        longest = max(map(len, rows))
        seen = np.zeros((0 if decoder is None else len(rows), longest, longest), dtype=bool)
        for line, (row, (seed, *which), wanted) in enumerate(zip(rows, keys, chosen, strict=True)):
            if not wanted:
                nothing = np.full(len(row), NOTHING, dtype=np.int64)
                texts.append(MaskedText(row, nothing, np.zeros(len(row), dtype=bool)))
                continue
            random = generator(seed, "masks", *which)
            texts.append(self.text(row, random, prompt_length))
            if decoder is not None:
                begin = longest - len(row) if side == "left" else 0
                place = slice(begin, begin + len(row))
                seen[line, place, place] = seen_by_decoder(len(row), decoder.share, random)

        def laid(values: Sequence[npt.NDArray[Any]], fill: int) -> Tensor:
            return torch.from_numpy(rectangle(values, fill, side)[0]).to(device)

        read, labels = [text.tokens for text in texts], laid([text.labels for text in texts], NOTHING)
        if decoder is None:
            return read, Targets(labels)
        words = laid([text.words for text in texts], 0).bool()
        return read, Targets(labels, laid(rows, 0), words, torch.from_numpy(seen).to(device))


def seen_by_decoder(count: int, share: float, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """(count, count) bool: each place sees every other token but for a ``share``, by chance, and never its own."""
    seen = random.random((count, count)) >= share
    np.fill_diagonal(seen, False)
    return seen


class _Given(nn.Module):
    """Stands in for the transformer below a head: gives back the states that it is given."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


class LanguageHead(nn.Module):
    """A language model without its transformer."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, states: Tensor) -> Tensor:
        """(m, d) -> (m, words) logits."""
        logits: Tensor = self.head(inputs_embeds=states[None]).logits[0]
        return logits


def language_head(model: SentenceTransformer, path: str, seed: int) -> tuple[LanguageHead, list[str]]:
    """The head of the encoder's architecture, and the names of those of its parameters that begin at random.

    Where the architecture ties the head's matrix to the table of embeddings it is that table, the same parameter. The
    head's other parameters are read from the weights of the base, a folder or a hub id, where they are there.
    """
    transformer = model[0].auto_model
    config = copy.deepcopy(transformer.config)
    config._attn_implementation = "eager"  # there is no attention in a head
    config.output_hidden_states = False
    kind = _model_class(config)
    with torch.device("meta"):
        whole: Any = kind(config)
    prefix = whole.base_model_prefix
    if not isinstance(getattr(whole, prefix, None), nn.Module):
        raise BadInputError(f"{kind.__name__} has no head that can be taken off", where="objective")
    setattr(whole, prefix, _Given())
    embeddings = transformer.get_input_embeddings().weight
    trained = embeddings.requires_grad
    whole = whole.to_empty(device="cpu").to(embeddings.dtype)
    ties = tied_weights(whole)
    named = dict(whole.named_parameters())
    tied = bool(getattr(config, "tie_word_embeddings", True))
    needed = {name for name in named if name not in ties or (ties[name].startswith(f"{prefix}.") and not tied)}
    read = _read(kind, (str(getattr(transformer, "name_or_path", "")), path), needed) if needed else {}
    fresh: list[str] = []
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, parameter in named.items():
            if name in read:
                parameter.copy_(read[name])
            else:
                _begin(name, parameter)
                fresh.append(name)
    for target, source in ties.items():
        below = source.startswith(f"{prefix}.")
        # A head of its own that the base's weights lack would know nothing: the table of embeddings knows more.
        if target not in named or (below and target in read):
            continue
        owner, _, name = target.rpartition(".")
        setattr(whole.get_submodule(owner), name, embeddings if below else whole.get_parameter(source))
        fresh = [other for other in fresh if other != target]
    if fresh:
        logger.info("The base's weights hold no %s: it begins at random", ", ".join(fresh))
    whole.requires_grad_(True)
    embeddings.requires_grad_(trained)
    return LanguageHead(whole), [f"head.{name}" for name in fresh]


def transformer_is_trained(transformer: nn.Module) -> bool:
    """Whether the transformer's own weights are trained, rather than an adapter."""
    adapters = bool(getattr(transformer, "peft_config", None))
    layers = [parameter for parameter in transformer.parameters() if parameter.ndim > 1]
    return not adapters and any(parameter.requires_grad for parameter in layers)


def _model_class(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    for mapping in (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise BadInputError(
        f"transformers knows no language model of the architecture {config.model_type!r}, so no token can be predicted",
        where="objective",
    )


def _begin(name: str, parameter: nn.Parameter) -> None:
    if parameter.ndim > 1:
        parameter.normal_(0, 0.02)
    else:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _read(kind: Any, places: Sequence[str], names: Collection[str]) -> dict[str, Tensor]:
    """Those of the named parameters that the base's weights hold; nothing where they are in a file of another format."""
    from nearfield.encoders.load import quiet_transformers

    for place in places:
        if not place or Path(place).is_file():
            continue
        try:
            with quiet_transformers():
                whole, about = kind.from_pretrained(place, output_loading_info=True)
        except Exception as error:  # whatever an unknown folder or hub raises means that there is no head to be had
            logger.debug("no language model at %s: %s", place, error)
            continue
        held = dict(whole.named_parameters())
        return {name: held[name].detach() for name in names if name in held and name not in about["missing_keys"]}
    return {}


class Decoder(nn.Module):
    """One layer of attention from each place, which knows the text's embedding, to it and to the tokens that the place sees."""

    def __init__(self, dimension: int, heads: int, expansion: int, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Embedding(positions, dimension)
        self.vector_norm, self.token_norm = nn.LayerNorm(dimension), nn.LayerNorm(dimension)
        self.query, self.key = nn.Linear(dimension, dimension), nn.Linear(dimension, dimension)
        self.value, self.attended = nn.Linear(dimension, dimension), nn.Linear(dimension, dimension)
        self.attention_norm, self.output_norm = nn.LayerNorm(dimension), nn.LayerNorm(dimension)
        self.wide, self.narrow = (
            nn.Linear(dimension, expansion * dimension),
            nn.Linear(expansion * dimension, dimension),
        )

    def forward(self, vectors: Tensor, tokens: Tensor, places: Tensor, seen: Tensor) -> Tensor:
        """(n, d) embeddings, (n, t, d) of tokens, (n, t) their positions, (n, t, t) who sees whom -> (n, t, d) states."""
        place, vector = self.positions(places), self.vector_norm(vectors)[:, None]
        query = vector + place
        context = torch.cat([vector, self.token_norm(tokens) + place], dim=1)
        q, k, v = (self._split(part) for part in (self.query(query), self.key(context), self.value(context)))
        # The embedding stands before the tokens, for all to see.
        mask = functional.pad(seen, (1, 0), value=True)[:, None]
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        hidden = self.attention_norm(query + self.attended(attended.transpose(1, 2).flatten(2)))
        states: Tensor = self.output_norm(hidden + self.narrow(functional.gelu(self.wide(hidden))))
        return states

    def _split(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], self.heads, -1).transpose(1, 2)


class MaskedTokens(TokenTask):
    """Masks tokens of texts, and the loss of predicting them."""

    def __init__(self, model: SentenceTransformer, config: MaskedTokensConfig, path: str, seed: int) -> None:
        """``path`` is where the base's weights are, which may hold the head of a language model."""
        super().__init__()
        if not hasattr(model[0], "auto_model"):
            raise BadInputError(
                f"tokens are predicted by a transformer, and the model's first module is a {type(model[0]).__name__}",
                where="objective",
            )
        transformer = model[0].auto_model
        self.config = config
        special = np.asarray(sorted(set(model.tokenizer.all_special_ids)), dtype=np.int64)
        words = int(transformer.get_input_embeddings().num_embeddings)
        self.hide = Masking(config, mask_token(model.tokenizer, config.mask_token), words, special).chunk
        self.columns = 2 if config.decoder is None else 4
        self.head, fresh = language_head(model, path, seed)
        trained = transformer_is_trained(transformer)
        for name, parameter in self.head.named_parameters():
            if parameter is not transformer.get_input_embeddings().weight:
                parameter.requires_grad_(trained or name in fresh)
        self.decoder: Decoder | None = None
        if config.decoder is not None:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.decoder = _decoder(model, config.decoder).to(next(transformer.parameters()).dtype)

    def forward(self, model: SentenceTransformer, features: Features) -> Tensor:
        """Features of n texts with their targets -> (n, d + columns)."""
        targets: Targets = features[TARGETS]
        states = token_states(model, {name: value for name, value in features.items() if name != TARGETS})
        hidden, real = states["token_embeddings"], states["attention_mask"]
        pooled = pool(model, states)
        parts = [
            truncated(model, pooled["sentence_embedding"]),
            *self._losses(hidden, targets.labels, self.config.predict == "next"),
        ]
        if self.decoder is not None:
            assert targets.ids is not None and targets.words is not None and targets.seen is not None
            places = (real.long().cumsum(1) - 1).clamp(min=0)
            tokens = model[0].auto_model.get_input_embeddings()(targets.ids)
            decoded = self.decoder(pooled["pooled"], tokens, places, targets.seen)
            labels = torch.where(targets.words, targets.ids, NOTHING)
            parts += self._losses(decoded, labels, False)
        return torch.cat([part.reshape(len(part), -1).to(_widest(parts)) for part in parts], dim=1)

    def _losses(self, states: Tensor, labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
        """(n,) the summed loss of each text's labels, and how many it has."""
        if shifted:
            states, labels = states[:, :-1], labels[:, 1:]
        wanted = labels != NOTHING
        logits = self.head(states[wanted])
        losses = functional.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), labels[wanted], reduction="none")
        text = wanted.nonzero()[:, 0]
        sums = losses.new_zeros(len(labels)).index_add(0, text, losses)
        return sums, wanted.sum(1).to(sums.dtype)


def _widest(parts: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32


def _decoder(model: SentenceTransformer, config: DecoderConfig) -> Decoder:
    transformer: Any = model[0].auto_model
    dimension = int(transformer.config.hidden_size)
    poolings = [module for module in list(model)[1:] if hasattr(module, "include_prompt")]
    width = poolings[0].get_embedding_dimension() if poolings else dimension
    heads = config.heads or int(transformer.config.num_attention_heads)
    if dimension % heads:
        raise BadInputError(f"{heads} heads do not divide {dimension} dimensions", where="objective.decoder.heads")
    if width != dimension:
        raise BadInputError(
            f"a decoder takes a pooling of {dimension} dimensions, the model's has {width}", where="objective.decoder"
        )
    longest = longest_input(model)
    if longest is None:
        raise BadInputError(
            "a decoder has a row for each position, and this model reads texts of any length",
            where="objective.decoder",
            hint="Set encoder.max_length.",
        )
    return Decoder(dimension, heads, config.expansion, longest)


def mask_token(tokenizer: Any, name: str | None) -> int:
    """The number of the token that stands in a masked one's place."""
    if name is None:
        number = getattr(tokenizer, "mask_token_id", None)
        if number is not None:
            return int(number)
        name = "_"
    number = tokenizer.get_vocab().get(name)
    if number is None:
        raise BadInputError(
            f"{name!r} is no token of {type(tokenizer).__name__}",
            where="objective.mask_token",
            hint="Name one that texts rarely have.",
        )
    return int(number)


NAMES = ("masked", "decoded")


class TokenLosses(Objective):
    """The weighted sum of losses, each the mean over all tokens of the global batch that it asks for.

    The tokens of an example with a weight count that many times.
    """

    contrasts = False

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights = tuple(weights)

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """This process's share of the means; the denominator is that of the whole batch."""
        rows, denominator = batch.local_rows(), batch.denominator()
        losses = batch.queries.new_zeros(len(rows))
        for weight, (sums, count) in zip(self.weights, self._means(batch), strict=True):
            losses = losses + batch.weighed(sums[rows]) * (weight * denominator / count)
        return LossSum(losses.sum(), denominator, losses.detach())

    def _means(self, batch: ContrastiveBatch) -> list[tuple[Tensor, float]]:
        """For each loss the (Q,) sums of texts, and how many tokens the whole batch has."""
        if batch.token_losses is None:
            raise BadInputError("the batch brings no losses of tokens", where="objective")
        means = []
        for number in range(len(self.weights)):
            counts = batch.token_losses[:, 2 * number + 1].detach()
            if batch.weights is not None:
                counts = counts * batch.weights.to(counts.dtype)
            means.append((batch.token_losses[:, 2 * number], max(float(counts.sum()), 1.0)))
        return means

    @torch.no_grad()
    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """The mean loss of each kind a token, and how many tokens there were."""
        figures: dict[str, float] = {}
        for name, (sums, count) in zip(NAMES, self._means(batch), strict=False):
            total = sums if batch.weights is None else sums * batch.weights.to(sums.dtype)
            figures |= {f"loss/{name}": float(total.sum()) / count, f"tokens/{name}": count}
        return figures
