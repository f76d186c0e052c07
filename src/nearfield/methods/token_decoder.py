"""A decoder that sees nothing of a text but its embedding, which CAROL and cMIM share: what an embedding does not hold, it cannot write."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, accumulation_dtype, tiles
from nearfield.objectives.config import Surroundings
from nearfield.provenance import derive_seed

CELLS = 2**23
"""Logits of tokens that are held at once."""


class TokenDecoder(nn.Module):
    """A recurrent network (one GRU layer) that begins with the embedding and is given the tokens before (teacher forcing)."""

    def __init__(self, vocabulary: int, width: int, inner: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            # The same on all ranks, and when it is built again for a checkpoint.
            torch.manual_seed(derive_seed(0, "decoder"))
            self.start = nn.Linear(width, inner)
            self.cell = nn.GRU(inner, inner, batch_first=True)
            self.words = nn.Parameter(torch.randn(vocabulary, inner) * inner**-0.5)

    def hidden(self, embeddings: Tensor, tokens: Tensor) -> Tensor:
        """(n, d) and (n, T) tokens, padded with -1 -> (n, T, inner): the state that each token is to be told from."""
        # Not by calling modules: ZeRO 3 would take their parameters away again behind the call.
        start = self.start.forward(embeddings).tanh()
        before = self.words[tokens.clamp_min(0)][:, :-1]
        inputs = torch.cat([before.new_zeros(len(before), 1, before.shape[2]), before], dim=1)
        states: Tensor = self.cell.forward(inputs, start[None])[0]
        return states

    def log_probability(self, embeddings: Tensor, tokens: Tensor) -> Tensor:
        """(n, d) and (n, T) tokens, padded with -1 -> (n,) the log-probability of each text, a sum over its tokens."""

        def part(some: Tensor, texts: Tensor) -> Tensor:
            logits = self.hidden(some, texts) @ self.words.T
            target = texts.clamp_min(0)
            loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(texts)
            return -torch.where(texts >= 0, loss, 0).sum(dim=1)

        size = max(1, CELLS // max(1, tokens.shape[1] * len(self.words)))
        parts = [embeddings.new_zeros(0)]
        for low, high in tiles(len(tokens), size):
            # Kept is nothing of the size of the logits: the backward makes them again.
            parts.append(checkpoint(part, embeddings[low:high], tokens[low:high], use_reentrant=False))
        return torch.cat(parts)


def query_tokens(batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """(R, d) embeddings of this process's rows, and (R, T) the tokens of their whole texts."""
    if batch.query_tokens is None:
        raise BadInputError("a decoder wants the tokens of the texts, and there are none", where="objective")
    rows = batch.local_rows()
    return batch.queries[rows].to(accumulation_dtype(batch.queries.dtype)), batch.query_tokens[rows]


def sizes_for_decoder(around: Surroundings | None) -> tuple[int, int]:
    """Width of embeddings, and tokens of the vocabulary."""
    around = around or Surroundings()
    if around.width is None or not around.vocabulary:
        raise BadInputError("a decoder wants the width of embeddings and the encoder's vocabulary", where="objective")
    return around.width, around.vocabulary
