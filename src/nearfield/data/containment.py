"""Texts inside longer ones: the words of one stand in the other, in order and in one place, and too many rare ones for chance.

The training texts are one sorted array of three words at each place, which gives how often one, two or three words occur there
and where. A benchmark text is looked up by its rarest three words, a training text by its own; each meeting is then aligned word
by word. Words may differ, or one be put in or left out, as long as those that agree carry enough of the shorter text's rarity.

A model of the training texts' words, each given the two before it, that has not seen the copies, tells a copy from
chance: if a text of such words would be expected at fewer than ``chance`` places of the training texts, it did not get there
by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nearfield.arrays import Floats, Mask, Ragged, Rows, concatenate, ranges, starts
from nearfield.data.near_duplicates import pieces

if TYPE_CHECKING:
    from nearfield.data.decontaminate import DecontaminationConfig

Ids = npt.NDArray[np.uint32]

_BITS = 21
_UNKNOWN = (1 << _BITS) - 2  # the key behind the last one is a number as well
_MOST_WORDS = _UNKNOWN - 1
_SHARED_IDS = 1 << 19
"""Ids that the rarest words share in texts of more different words than there are ids."""
_ANCHORS = 3
"""A text is looked up by so many groups of three words that have no word in common, so one changed word spoils one of them."""
_REPEATED = 100
"""Copies of a text that the model of its words is kept from seeing; what stands there oftener is a phrase that people use."""
_PRIOR = 20.0
"""Occurrences that the estimate from one word fewer counts for."""
_PIECE = 2_000_000


@dataclass(frozen=True)
class Meetings:
    """Places where three words of a text stand in a longer one."""

    needles: Rows
    hays: Rows
    shifts: Rows
    """Where in the longer text the shorter one begins; it may begin before it."""

    def __len__(self) -> int:
        return len(self.needles)

    def take(self, rows: Rows | Mask | slice) -> Meetings:
        """Some of them."""
        return Meetings(self.needles[rows], self.hays[rows], self.shifts[rows])

    def turned(self) -> Meetings:
        """The same from the other text's side."""
        return Meetings(self.hays, self.needles, -self.shifts)

    def distinct(self) -> Meetings:
        """Each once."""
        order = np.lexsort((self.shifts, self.hays, self.needles))
        rising = self.take(order)
        new = np.ones(len(order), dtype=np.bool_)
        new[1:] = (np.diff(rising.needles) != 0) | (np.diff(rising.hays) != 0) | (np.diff(rising.shifts) != 0)
        return rising.take(new)


class ContainmentIndex:
    """Finds the training texts that benchmark texts are inside of, and those that are inside benchmark texts.

    Holds 24 bytes a word of the training texts.
    """

    def __init__(self, texts: Ragged, config: DecontaminationConfig) -> None:
        self.config = config
        self._vocabulary, self._identity = _numbered(texts.values)
        self.texts = Ragged(texts.offsets, self._ids(texts.values))
        self._counts = np.bincount(self.texts.values, minlength=1)
        keys = _threes(self.texts)
        order = np.argsort(keys)
        self._keys = keys[order]
        self._order = order.astype(np.uint32 if len(order) < 1 << 32 else np.int64)
        del keys, order
        self._anchors = self._anchors_of_training()

    @property
    def words(self) -> int:
        """The words of all training texts together."""
        return len(self.texts.values)

    def matches(self, texts: Ragged) -> tuple[Rows, Floats]:
        """Pairs (training text, benchmark text), [p, 2], of which the shorter is inside the other; and the share of it, [p].

        ``texts`` are the benchmark texts' words as hashes, in their order.
        """
        benchmark = Ragged(texts.offsets, self._ids(texts.values))
        pairs: list[Rows] = [np.empty((0, 2), dtype=np.int64)]
        shares = [np.empty(0)]
        for meetings in self._meet(benchmark):
            inside = benchmark.lengths[meetings.needles] <= self.texts.lengths[meetings.hays]
            some, share = self._sure(benchmark, self.texts, meetings.take(inside), _REPEATED)
            pairs.append(some[:, ::-1])
            shares.append(share)
            # The other way round the copy is no training text, and the shorter text has itself been counted there.
            some, share = self._sure(self.texts, benchmark, meetings.take(~inside).turned(), 0)
            pairs.append(some)
            shares.append(share)
        joined = np.concatenate(pairs)
        order = np.lexsort((joined[:, 0], joined[:, 1]))
        return joined[order], np.concatenate(shares)[order]

    def _ids(self, hashes: npt.NDArray[np.uint64]) -> Ids:
        """The numbers of words from 1; one that no training text has is the last number there is."""
        numbers = np.empty(len(hashes), dtype=np.uint32)
        for start in range(0, len(hashes), _PIECE):
            part = hashes[start : start + _PIECE]
            if not len(self._vocabulary):
                numbers[start : start + _PIECE] = _UNKNOWN
                continue
            places = np.minimum(np.searchsorted(self._vocabulary, part), len(self._vocabulary) - 1)
            known = self._vocabulary[places] == part
            numbers[start : start + _PIECE] = np.where(known, self._identity[places], _UNKNOWN)
        return numbers

    def _bounds(self, keys: Rows, width: int = 1) -> tuple[Rows, Rows]:
        """Where in the sorted array the keys from each ``keys`` to ``keys + width`` are."""
        order = np.argsort(keys)  # in order they are found twice as fast
        low, high = np.empty(len(keys), dtype=np.int64), np.empty(len(keys), dtype=np.int64)
        low[order] = np.searchsorted(self._keys, keys[order])
        high[order] = np.searchsorted(self._keys, keys[order] + width)
        return low, high

    def _anchors_of_training(self) -> npt.NDArray[np.int64]:
        """The places in the sorted array of the rarest three words of each training text, rising."""
        new = np.ones(len(self._keys) + 1, dtype=np.bool_)
        new[1:-1] = self._keys[1:] != self._keys[:-1]
        begins = np.flatnonzero(new)
        counts = np.empty(len(self._keys), dtype=np.uint32)
        counts[self._order] = np.repeat(np.diff(begins), np.diff(begins)).astype(np.uint32)
        chosen = np.zeros(len(self._keys), dtype=np.bool_)
        begin = 0
        while begin < len(self.texts):
            end = int(np.searchsorted(self.texts.offsets, self.texts.offsets[begin] + _PIECE, "right")) - 1
            end = max(end, begin + 1)
            first, last = self.texts.offsets[begin], self.texts.offsets[end]
            part = Ragged(self.texts.offsets[begin : end + 1] - first, counts[first:last])
            chosen[first + _rarest(part, self.config.common)] = True
            begin = end
        return np.flatnonzero(chosen[self._order])

    def _meet(self, texts: Ragged) -> Iterator[Meetings]:
        """Benchmark texts and training texts that share the rarest three words of either, and the word before or behind them.

        All of a benchmark text's come together.
        """
        keys, owners = _threes(texts), texts.owners()
        low, high = np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=np.int64)
        whole = np.flatnonzero(_rest(texts) >= 3)
        low[whole], high[whole] = self._bounds(keys[whole])
        chosen = _rarest(Ragged(texts.offsets, high - low), self.config.common)
        at = np.concatenate([chosen, whole])
        begins = np.concatenate([low[chosen], np.searchsorted(self._anchors, low[whole])])
        counts = np.concatenate([high[chosen], np.searchsorted(self._anchors, high[whole])]) - begins
        of_training = np.arange(len(at)) >= len(chosen)
        order = np.argsort(at, kind="stable")
        at, begins, counts, of_training = at[order], begins[order], counts[order], of_training[order]
        per_text = np.bincount(owners[at], weights=counts, minlength=len(texts)).astype(np.int64)
        for piece in pieces(per_text):
            part = slice(*np.searchsorted(owners[at], [piece.start, piece.stop]))
            ranks, here = ranges(begins[part], counts[part]), np.repeat(at[part], counts[part])
            theirs = np.repeat(of_training[part], counts[part])
            ranks[theirs] = self._anchors[ranks[theirs]]
            places = self._order[ranks].astype(np.int64)
            training = np.searchsorted(self.texts.offsets, places, "right") - 1
            agree = self._agree_beside(texts, owners, here, training, places)
            here, training, places = here[agree], training[agree], places[agree]
            of = owners[here]
            yield Meetings(
                of, training, (places - self.texts.offsets[training]) - (here - texts.offsets[of])
            ).distinct()

    def _agree_beside(self, texts: Ragged, owners: Rows, here: Rows, training: Rows, places: Rows) -> Mask:
        result = np.zeros(len(here), dtype=np.bool_)
        for step in (-1, 3):
            a, b = here + step, places + step
            inside = (a >= texts.offsets[owners[here]]) & (a < texts.offsets[owners[here] + 1])
            inside &= (b >= self.texts.offsets[training]) & (b < self.texts.offsets[training + 1])
            result[inside] |= texts.values[a[inside]] == self.texts.values[b[inside]]
        return result

    def _sure(self, short: Ragged, long: Ragged, meetings: Meetings, repeated: int) -> tuple[Rows, Floats]:
        """The pairs (shorter, longer) of meetings that are no chance, and the share of the shorter text that agrees."""
        best, share, surprise = self._weighed(short, long, meetings, repeated)
        sure = surprise >= np.log(max(self.words, 1)) - np.log(self.config.chance)
        return np.stack([best.needles[sure], best.hays[sure]], axis=1), share[sure]

    def _weighed(
        self, short: Ragged, long: Ragged, meetings: Meetings, repeated: int
    ) -> tuple[Meetings, Floats, Floats]:
        """The meetings of which enough agrees, one a pair, the share that agrees and how surprising that is."""
        enough = short.lengths[meetings.needles] >= self.config.min_words
        parts: list[tuple[Meetings, Ragged, Floats, Mask]] = []
        meetings = meetings.take(enough)
        for part in pieces(short.lengths[meetings.needles], _PIECE):
            some = meetings.take(part)
            agree, share, broken = self._aligned(short, long, some)
            fine = share >= self.config.inside
            parts.append((some.take(fine), agree.take(np.flatnonzero(fine)), share[fine], broken[fine]))
        if not sum(len(part[0]) for part in parts):
            return meetings.take(np.empty(0, dtype=np.int64)), np.empty(0), np.empty(0)
        every = Meetings(
            *(np.concatenate([getattr(part[0], n) for part in parts]) for n in ("needles", "hays", "shifts"))
        )
        agree = concatenate([part[1] for part in parts])
        share = np.concatenate([part[2] for part in parts])
        broken = np.concatenate([part[3] for part in parts])
        # Of several places in one text the one where most agrees.
        order = np.lexsort((-share, every.hays, every.needles))
        new = np.ones(len(order), dtype=np.bool_)
        new[1:] = (np.diff(every.needles[order]) != 0) | (np.diff(every.hays[order]) != 0)
        chosen = order[new]
        every, agree, share, broken = every.take(chosen), agree.take(chosen), share[chosen], broken[chosen]
        return every, share, self._surprise(short, every, agree, broken, repeated)

    def _aligned(self, short: Ragged, long: Ragged, meetings: Meetings) -> tuple[Ragged, Floats, Mask]:
        """The words that agree of each meeting's needle, the share of its rarity that they carry, and whether it is broken.

        A broken one goes on one word further on, or one word less far, from some word to its end.
        """
        lengths = short.lengths[meetings.needles]
        offsets = starts(lengths)
        words = short.values[short.places(meetings.needles)]
        rank = ranges(np.zeros(len(lengths), dtype=np.int64), lengths)
        low = np.repeat(long.offsets[meetings.hays], lengths)
        high = np.repeat(long.offsets[meetings.hays + 1], lengths)
        place = low + np.repeat(meetings.shifts, lengths) + rank
        agree, steps = [], (0, -1, 1)
        for step in steps:
            there = np.clip(place + step, low, high - 1)
            agree.append((long.values[there] == words) & (there == place + step))
        rarity = self._rarity(words)
        whole = np.add.reduceat(rarity, offsets[:-1])
        share = np.add.reduceat(rarity * agree[0], offsets[:-1]) / whole
        mask, broken = agree[0].copy(), np.zeros(len(lengths), dtype=np.bool_)
        owners = np.repeat(np.arange(len(lengths)), lengths)
        for first, second in ((0, 1), (0, 2), (1, 0), (2, 0)):
            gain = rarity * (agree[first].astype(np.int8) - agree[second].astype(np.int8))
            running = np.cumsum(gain)
            before = (running[offsets[1:] - 1] - np.add.reduceat(gain, offsets[:-1]))[owners]
            running -= before  # of the words up to and with each
            top = np.maximum.reduceat(running, offsets[:-1])
            score = top + np.add.reduceat(rarity * agree[second], offsets[:-1])
            peak = np.full(len(lengths), -1, dtype=np.int64)
            at = np.flatnonzero(running >= top[owners])
            peak[owners[at][::-1]] = rank[at][::-1]
            cost = whole.copy()
            if steps[second] > steps[first]:
                there = np.clip(
                    place[offsets[:-1]] + steps[first] + peak + 1, low[offsets[:-1]], high[offsets[:-1]] - 1
                )
                cost += self._rarity(long.values[there])  # the word that was put in
            better = score / cost > share + 1e-9
            share[better] = (score / cost)[better]
            broken[better] = True
            part = better[owners]
            mask[part] = np.where(rank <= peak[owners], agree[first], agree[second])[part]
        return Ragged.from_lengths(lengths, mask), share, broken

    def _rarity(self, words: Ids) -> Floats:
        """Minus the logarithm of how often each word occurs."""
        known = words < len(self._counts)
        counts = np.where(known, self._counts[np.where(known, words, 0)], 0)
        return np.log((self.words + 1) / (counts + 0.5))

    def _surprise(self, short: Ragged, meetings: Meetings, agree: Ragged, broken: Mask, repeated: int) -> Floats:
        """Minus the logarithm of how probable the words that agree are at a place of the training texts without the copies."""
        needles, which = np.unique(meetings.needles, return_inverse=True)
        texts = short.take(needles)
        rank = agree.ranks()
        place = texts.offsets[which[agree.owners()]] + rank
        matched = agree.values.astype(np.bool_)
        runs = np.zeros(len(matched), dtype=np.int64)
        runs[matched] = 1
        for length in (2, 3):
            longer = np.zeros(len(matched), dtype=np.bool_)
            longer[1:] = (runs[:-1] >= length - 1) & (runs[1:] >= length - 1) & (rank[1:] > 0)
            # A run of three ends where one of two does and a run of two ended the word before.
            runs[longer] = length
        missing = agree.lengths - np.add.reduceat(agree.values.astype(np.int64), agree.offsets[:-1]) + broken
        entire = np.repeat(missing == 0, agree.lengths)
        copies = []
        for length in (1, 2, 3):
            seen = runs >= length
            whole = np.bincount(place[seen & entire], minlength=len(texts.values))
            parts = np.bincount(place[seen & ~entire], minlength=len(texts.values))
            copies.append(np.minimum(whole, repeated) + np.minimum(parts, 1) if repeated else np.ones_like(whole))
        logs = self._logs(texts, copies)
        surprise = np.zeros(len(matched))
        for length in (1, 2, 3):
            surprise = np.where(runs == length, logs[length - 1][place], surprise)
        # So many ways there are to leave words out.
        return np.add.reduceat(surprise, agree.offsets[:-1]) - missing * np.log(agree.lengths)

    def _logs(self, texts: Ragged, copies: list[Rows]) -> list[Floats]:
        """Minus the logarithm of the probability of each word: alone, given the word before it, given the two before it."""
        words = texts.values.astype(np.int64)
        ranks = texts.ranks()
        one = np.maximum(self._counts[np.where(words < len(self._counts), words, 0)] - copies[0], 0)
        one[words >= len(self._counts)] = 0
        alone = (one + 0.5) / (self.words + 0.5 * len(self._counts))
        two, three = np.zeros(len(words)), np.zeros(len(words))
        at = np.flatnonzero(ranks >= 1)
        low, high = self._bounds((words[at - 1] << 2 * _BITS) | (words[at] << _BITS), 1 << _BITS)
        two[at] = np.maximum(high - low - copies[1][at], 0)
        at = np.flatnonzero(ranks >= 2)
        low, high = self._bounds((words[at - 2] << 2 * _BITS) | (words[at - 1] << _BITS) | words[at])
        three[at] = np.maximum(high - low - copies[2][at], 0)
        after_one = (two + _PRIOR * alone) / (np.concatenate([[0], one[:-1]]) + _PRIOR)
        after_two = (three + _PRIOR * after_one) / (np.concatenate([[0], two[:-1]]) + _PRIOR)
        return [-np.log(np.minimum(p, 1.0)) for p in (alone, after_one, after_two)]


def _numbered(hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], Ids]:
    """The different hashes, rising, and a number from 1 for each; the rarest share numbers where there are too few."""
    vocabulary, counts = np.unique(hashes, return_counts=True)
    numbers = np.arange(1, len(vocabulary) + 1, dtype=np.uint32)
    if len(vocabulary) >= _MOST_WORDS:
        own = _MOST_WORDS - _SHARED_IDS
        order = np.argsort(-counts, kind="stable")
        numbers[order[:own]] = np.arange(1, own + 1)
        numbers[order[own:]] = own + 1 + vocabulary[order[own:]] % np.uint64(_SHARED_IDS - 1)
    return vocabulary, numbers


def _rest(texts: Ragged) -> Rows:
    """How many words there are from each word to the end of its text, itself counted."""
    return np.repeat(texts.offsets[1:], texts.lengths) - np.arange(len(texts.values))


def _threes(texts: Ragged) -> Rows:
    """One number for each word and the two behind it, 0 standing for those behind a text's end."""
    words, rest = texts.values.astype(np.int64), _rest(texts)
    keys = words << 2 * _BITS
    keys[:-1] |= np.where(rest[:-1] >= 2, words[1:], 0) << _BITS
    keys[:-2] |= np.where(rest[:-2] >= 3, words[2:], 0)
    return keys


def _rarest(counts: Ragged, common: int) -> Rows:
    """The places of the rarest three words of each text that occur 1 to ``common`` times, and share no word; in any order.

    ``counts`` has how often the three words that begin at each word occur.
    """
    left = counts.values.astype(np.int64)
    never = np.int64(1) << 40
    left[(_rest(counts) < 3) | (left < 1) | (left > common)] = never
    filled = np.flatnonzero(counts.lengths > 0)
    begins, owners = counts.offsets[filled], np.repeat(np.arange(len(filled)), counts.lengths[filled])
    anchors = []
    for _ in range(_ANCHORS if len(filled) else 0):
        least = np.minimum.reduceat(left, begins)
        at = np.flatnonzero((left == least[owners]) & (left < never))
        first = np.ones(len(at), dtype=np.bool_)
        first[1:] = owners[at[1:]] != owners[at[:-1]]
        at = at[first]
        anchors.append(at)
        for step in (-2, -1, 0, 1, 2):
            there = np.clip(at + step, 0, len(left) - 1)
            left[there[owners[there] == owners[at]]] = never
    return np.concatenate([np.empty(0, dtype=np.int64), *anchors])
