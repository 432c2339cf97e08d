"""Training batches drawn on the device: token ids of conversations, no loop over examples.

A sequence is the mark of the first user turn and a stream of units laid end to end. A unit is a
filler sentence, a fact, or a question with its answer and the mark of the next user turn, each in
the ids that the tokenizer and the chat template give for the text of `tangram.conversations`.
"""

import re
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from tangram import conversations as recall

_SLOTS = (*recall.SLOTS, "key", "high", "low")
_FIXED = len(_SLOTS)
_KEY, _HIGH, _LOW = (_SLOTS.index(name) for name in ("key", "high", "low"))
_FACT = len(recall.FILLER)
_QUESTION = _FACT + 1


@dataclass(frozen=True)
class Shape:
    """What a batch holds.

    Attributes:
        sequences: rows of the batch.
        length: tokens of a row, padded at the end.
        facts: codes told in every row.
        questions: how many of them are asked for, at most `facts`.
        long_questions: share of questions in the longer form.
        later_share: share of facts told after questions began.
        spread_share: share of rows whose questions may come any time after their fact, not last.
        jump_share: share of rows whose positions jump between units.
        jump_span: highest position that jumps lead to.
        noise: share of filler tokens replaced by bytes and marks, in half of the rows.
    """

    sequences: int
    length: int
    facts: int
    questions: int
    long_questions: float = 0.5
    later_share: float = 0.1
    spread_share: float = 0.25
    jump_share: float = 0.0
    jump_span: int = 32768
    noise: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Token ids and where the answers are.

    Attributes:
        tokens: [sequences, length] int64.
        positions: [sequences, length] int64, increasing along a row.
        answer_at: [sequences, 3 * questions] int64, columns of answer tokens (two of the code,
            then the end of turn), in no order of questions; each in [1, length).
        answered: [sequences, 3 * questions] bool, False where a row was cut before that answer.
    """

    tokens: Tensor
    positions: Tensor
    answer_at: Tensor
    answered: Tensor


class Sampler:
    """Draws batches for one tokenizer on one device."""

    def __init__(self, tokenizer, device: torch.device | str):
        self.device = device
        self.pad, self.user = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|user|>")
        self.noise_ids = tokenizer.convert_tokens_to_ids("00")  # marks and bytes lie below
        words = [*recall.SLOTS.values(), recall.KEYS]
        self.word_ids = torch.zeros(_FIXED + 1, len(recall.KEYS), dtype=torch.long, device=device)
        self.word_counts = torch.ones(_FIXED + 1, device=device)
        for slot, choices in enumerate(words):
            ids = [self._one_id(tokenizer, f" {word}") for word in choices]
            self.word_ids[slot, : len(ids)] = torch.tensor(ids)
            self.word_counts[slot] = len(ids)
        pairs = [self._one_id(tokenizer, f"{number:02}") for number in range(100)]
        self.pair_ids = torch.tensor(pairs, device=device)

        after = "<|end|><|assistant|>{code}<|end|><|user|>"
        patterns = [*recall.FILLER, recall.FACT, *(q + after for q in recall.QUESTIONS)]
        units = [self._unit(tokenizer, f" {pattern}") for pattern in patterns]
        longest = max(len(ids) for ids, _ in units)
        self.lengths_tokens = [len(ids) for ids, _ in units]
        self.lengths = torch.tensor(self.lengths_tokens, device=device)
        self.ids = torch.full((len(units), longest), self.pad, device=device)
        self.slots = torch.full((len(units), longest), _FIXED, device=device)
        for kind, (ids, slots) in enumerate(units):
            self.ids[kind, : len(ids)] = torch.tensor(ids)
            self.slots[kind, : len(ids)] = torch.tensor(slots)
        code = (self.slots == _HIGH) | (self.slots == _LOW)
        self.is_answer = code | code.roll(1, dims=1)
        self.is_answer[:_QUESTION] = False

    @staticmethod
    def _one_id(tokenizer, text: str) -> int:
        (token,) = tokenizer.encode(text)
        return token

    def _unit(self, tokenizer, pattern: str) -> tuple[list[int], list[int]]:
        """Ids of a pattern filled with some words, and the slot of each (_FIXED for none)."""
        filled: list[tuple[int, int]] = []

        def fill(match: re.Match) -> str:
            if match[1] == "code":
                filled.extend([(int(self.pair_ids[0]), _HIGH), (int(self.pair_ids[1]), _LOW)])
                return "0001"
            word = (*recall.SLOTS.get(match[1], recall.KEYS),)[len(filled)]
            slot = _SLOTS.index(match[1])
            filled.append((int(self.word_ids[slot, len(filled)]), slot))
            return word

        ids = tokenizer.encode(re.sub(r"\{(\w+)\}", fill, pattern))
        slots = [_FIXED] * len(ids)
        for token, slot in filled:
            slots[ids.index(token)] = slot
        return ids, slots

    def draw(self, shape: Shape) -> Batch:
        """A fresh batch from torch's random state of the device."""
        rows, length, device = shape.sequences, shape.length, self.device
        kind, subject = self._units(shape)
        keys = torch.rand(rows, len(recall.KEYS), device=device).argsort(dim=1)[:, : shape.facts]
        codes = torch.randint(100, (2, rows, shape.facts), device=device)

        ends = self.lengths[kind].cumsum(dim=1)
        column = torch.arange(length - 1, device=device).repeat(rows, 1)
        unit = torch.searchsorted(ends, column, right=True).clamp(max=kind.shape[1] - 1)
        within = column < ends[:, -1:]
        offset = (column - (ends - self.lengths[kind]).gather(1, unit)).clamp(
            max=self.ids.shape[1] - 1
        )
        of_kind, of_fact = kind.gather(1, unit), subject.gather(1, unit)

        slot = self.slots[of_kind, offset]
        choice = (torch.rand_like(column, dtype=torch.float) * self.word_counts[slot]).long()
        tokens = torch.where(slot == _FIXED, self.ids[of_kind, offset], self.word_ids[slot, choice])
        tokens = torch.where(slot == _KEY, self.word_ids[_KEY, keys.gather(1, of_fact)], tokens)
        for half, place in enumerate((_HIGH, _LOW)):
            tokens = torch.where(
                slot == place, self.pair_ids[codes[half].gather(1, of_fact)], tokens
            )
        if shape.noise:
            hit = torch.rand_like(column, dtype=torch.float) < shape.noise
            hit &= (of_kind < _FACT) & (torch.rand(rows, 1, device=device) < 0.5)
            tokens = torch.where(hit, torch.randint_like(tokens, 1, self.noise_ids), tokens)
        tokens = torch.where(within, tokens, self.pad)
        tokens = torch.cat((torch.full_like(tokens[:, :1], self.user), tokens), dim=1)

        answer = (self.is_answer[of_kind, offset] & within).byte()
        answered, answer_at = answer.topk(min(3 * shape.questions, length - 1), dim=1)
        positions = torch.arange(length, device=device).repeat(rows, 1)
        if shape.jump_share:
            positions[:, 1:] += self._jumps(shape, kind.shape[1]).gather(1, unit)
        return Batch(tokens, positions, answer_at + 1, answered.bool())

    def _units(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """Kinds of the units in order, and the fact that each is about, [sequences, units] each."""
        rows, facts, questions = shape.sequences, shape.facts, shape.questions
        *filler, telling, short, long = self.lengths_tokens
        asking = short + (long - short) * shape.long_questions
        room = max(0, shape.length - 1 - facts * telling - questions * asking)
        # Short of the room by two deviations of the total, so that few rows are cut.
        margin = 2 * statistics.pstdev(filler) * (room / statistics.mean(filler)) ** 0.5
        count = max(0, int((room - margin) / statistics.mean(filler)))

        def uniform(columns: int) -> Tensor:
            return torch.rand(rows, columns, device=self.device)

        late = 1 + (uniform(facts + count) < shape.later_share) * 0.3
        told = uniform(facts + count) * late
        spread = (uniform(1) < shape.spread_share).float()
        begin = 1.0 - spread
        asked = begin + uniform(questions) * (1.3 - begin)
        fact_at = told[:, :questions]
        asked = torch.where(asked > fact_at, asked, fact_at + uniform(questions) * (1.3 - fact_at))

        kind = torch.empty(rows, facts + count + questions, dtype=torch.long, device=self.device)
        kind[:, :facts] = _FACT
        kind[:, facts : facts + count] = torch.randint(_FACT, (rows, count), device=self.device)
        kind[:, facts + count :] = _QUESTION + (uniform(questions) < shape.long_questions)
        subject = torch.zeros_like(kind)
        subject[:, :facts] = torch.arange(facts, device=self.device)
        subject[:, facts + count :] = torch.arange(questions, device=self.device)
        order = torch.cat((told, asked), dim=1).argsort(dim=1)
        return kind.gather(1, order), subject.gather(1, order)

    def _jumps(self, shape: Shape, units: int) -> Tensor:
        """How far positions have jumped by each unit, [sequences, units] int64."""
        rows = shape.sequences

        def uniform(columns: int) -> Tensor:
            return torch.rand(rows, columns, device=self.device)

        jumps = uniform(units) * (uniform(units) < uniform(1) ** 3 + 2 / units)
        share = jumps.cumsum(dim=1) / jumps.sum(dim=1, keepdim=True).clamp(min=1e-6)
        span = uniform(1) * (shape.jump_span - shape.length) * (uniform(1) < shape.jump_share)
        return (share * span).long()
