"""Which tokens are hidden: shares, what is never hidden, and a function of the text's numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from nearfield.encoders.masking import NOTHING, hide, hide_all, seen_by_decoder
from nearfield.encoders.token_config import DecoderConfig, TokenTaskConfig
from nearfield.randomness import generator

SPECIAL = np.array([0, 2, 3], dtype=np.int64)
SETTINGS = {"mask": 4, "vocabulary": 200, "special": SPECIAL}
CPU = torch.device("cpu")


def text(length: int, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(seed).integers(5, 200, length).astype(np.int32)


def test_shares_and_what_becomes_of_hidden_tokens() -> None:
    row = text(40_000)
    config = TokenTaskConfig(share=0.2, random=0.1, kept=0.15)
    found = hide(row, config, generator(0, "x"), prompt_length=0, **SETTINGS)
    hidden = found.labels != NOTHING
    assert abs(hidden.mean() - 0.2) < 4 * (0.2 * 0.8 / 40_000) ** 0.5
    assert np.array_equal(found.labels[hidden], row[hidden])
    assert np.array_equal(found.tokens[~hidden], row[~hidden])
    shares = {
        "mask": (found.tokens[hidden] == 4).mean(),
        "kept": (found.tokens[hidden] == row[hidden]).mean(),
    }
    assert abs(shares["mask"] - 0.75) < 0.02
    assert abs(shares["kept"] - (0.15 + 0.1 / 200)) < 0.02
    plain = hide(row, TokenTaskConfig(share=0.2, random=0, kept=0), generator(0, "x"), prompt_length=0, **SETTINGS)
    assert set(plain.tokens[plain.labels != NOTHING]) == {4}


@pytest.mark.parametrize(("predict", "prompt", "first"), [("masked", 0, 0), ("next", 0, 1), ("masked", 3, 3)])
def test_what_is_never_hidden(predict: str, prompt: int, first: int) -> None:
    row = text(30)
    row[10], row[-1] = 2, 3
    config = TokenTaskConfig.model_validate({"predict": predict, "share": 0.999})
    hidden = np.zeros(30, dtype=bool)
    for seed in range(20):
        found = hide(row, config, generator(seed, "x"), prompt_length=prompt, **SETTINGS)
        hidden |= found.labels != NOTHING
        words = found.words
    wanted = np.ones(30, dtype=bool)
    wanted[:first], wanted[10], wanted[-1] = False, False, False
    assert np.array_equal(hidden, wanted)
    assert np.array_equal(words, wanted)


def test_a_function_of_seed_step_and_text_alone() -> None:
    rows = [text(9, 1), text(4, 2), text(6, 3)]
    keys = [(7, 3, item, 0) for item in (11, 12, 13)]
    config = TokenTaskConfig(share=0.5, decoder=DecoderConfig())

    def drawn(which: list[int], side: str = "right", step: int = 3) -> list[list[int]]:
        read, targets = hide_all(
            [rows[i] for i in which],
            [(seed, step, item, prompt) for seed, _, item, prompt in (keys[i] for i in which)],
            config,
            prompt_length=0,
            chosen=[True] * len(which),
            side=side,
            device=CPU,
            **SETTINGS,
        )
        longest = max(len(rows[i]) for i in which)
        for line, i in enumerate(which):
            length = len(rows[i])
            place = slice(longest - length, longest) if side == "left" else slice(0, length)
            assert targets.ids is not None and targets.seen is not None
            assert targets.ids[line, place].tolist() == rows[i].tolist()
            outside = torch.ones(longest, dtype=torch.bool)
            outside[place] = False
            assert not targets.seen[line][:, outside].any() and not targets.seen[line][outside].any()
            assert (targets.labels[line, outside] == NOTHING).all()
        return [row.tolist() for row in read]

    together = drawn([0, 1, 2])
    assert [drawn([i])[0] for i in range(3)] == together
    assert drawn([2, 0])[::-1] == [together[0], together[2]]
    assert drawn([0, 1, 2], "left") == together
    assert drawn([0, 1, 2], step=4) != together


def test_texts_that_are_not_chosen_stay() -> None:
    rows = [text(9, 1), text(4, 2)]
    read, targets = hide_all(
        rows,
        [(0, 0, 0, 0), (0, 0, 1, 0)],
        TokenTaskConfig(share=0.9),
        prompt_length=0,
        chosen=[False, True],
        side="right",
        device=CPU,
        **SETTINGS,
    )
    assert read[0].tolist() == rows[0].tolist() and read[1].tolist() != rows[1].tolist()
    assert (targets.labels[0] == NOTHING).all() and (targets.labels[1] != NOTHING).any()
    assert targets.ids is None


def test_what_a_decoder_sees() -> None:
    seen = seen_by_decoder(300, 0.6, generator(0, "x"))
    assert not seen.diagonal().any()
    assert abs(seen.sum() / (300 * 299) - 0.4) < 0.01
    assert not (seen == seen[0]).all(), "each place has its own"
    assert not seen_by_decoder(10, 1.0, generator(0, "x")).any()


def test_settings_that_contradict() -> None:
    with pytest.raises(ValidationError, match="more than all hidden tokens"):
        TokenTaskConfig(random=0.6, kept=0.6)
