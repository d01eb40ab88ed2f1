"""How long things take here: a plain step and a round of a draft, and a whole probe from a first small batch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from redraft.data.generate import Request, generate
from redraft.decode.auto import make_decoder
from redraft.decode.engine import PlainDecoder
from redraft.drafts.base import Draft
from redraft.errors import UserError
from redraft.evaluate.speed import Prompt
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape
from redraft.target import Target

# Decoded by each contestant to time a round; the first prompt warms up.
TIMED_PROMPTS, TIMED_TOKENS = 3, 40
# Tokens of the first batch, from which the time of the whole is told; answers that are written at once.
FIRST_TOKENS, WIDTH = 8, 64


@dataclass(frozen=True)
class RoundTime:
    """Measured seconds of a plain decoding step and of a round, each in the data type that it is fastest in."""

    plain: float
    round: float
    plain_type: str = ""
    round_type: str = ""

    @property
    def cost(self) -> float:
        """Plain steps that a round takes: the tau at which the draft begins to pay."""
        return self.round / self.plain

    def per_token(self, tau: float) -> float:
        """Seconds a served token at this tau, by the draft or without it, whichever is faster."""
        return min(self.plain, self.round / tau)


def round_cost(
    targets: Target | Mapping[str, Target],
    draft: Draft,
    prompts: Sequence[Prompt],
    gamma: int,
    tokens: int = TIMED_TOKENS,
) -> RoundTime:
    """Measured seconds of a plain step and of a round (gamma drafted tokens and their verification).

    ``targets`` is the same model in the data types that it could be served in: plain decoding and the draft each count
    in the type that is fastest for it. Raises ``UserError`` when the answers are too short to time anything.
    """
    named = targets if isinstance(targets, Mapping) else {str(targets.dtype).removeprefix("torch."): targets}
    plain, rounds = dict[str, float](), dict[str, float]()
    for name, target in named.items():
        plain[name], rounds[name] = _timed(target, draft, prompts, gamma, tokens)
    first, second = min(plain, key=lambda name: plain[name]), min(rounds, key=lambda name: rounds[name])
    return RoundTime(plain[first], rounds[second], first, second)


def _timed(target: Target, draft: Draft, prompts: Sequence[Prompt], gamma: int, tokens: int) -> tuple[float, float]:
    """Seconds of a plain step and of a round, of one target, decoded in turns."""
    plain, chain = PlainDecoder(target), make_decoder(target, draft, ChainShape(gamma))
    plain_seconds = plain_steps = chain_seconds = rounds = 0.0
    for index, prompt in enumerate(prompts):
        a, b = plain.generate(prompt.ids, tokens), chain.generate(prompt.ids, tokens)
        if index == 0 and len(prompts) > 1:
            continue  # warm-up
        plain_seconds, plain_steps = plain_seconds + a.decode_seconds, plain_steps + len(a.ids) - 1
        chain_seconds, rounds = chain_seconds + b.decode_seconds, rounds + len(b.rounds)
    if not rounds or not plain_steps:
        raise UserError("the target's answers are too short to time a round; give other prompts")
    return plain_seconds / plain_steps, chain_seconds / rounds


@dataclass(frozen=True)
class Pace:
    """How fast the target answers, from a first small batch: seconds of the prompts of ``batch`` answers together, of
    one token of one answer alone, and of one token of all of them."""

    batch: int
    prompts: float
    single: float
    step: float

    def answering(self, count: int, tokens: int) -> float:
        """Seconds of ``count`` answers of so many tokens, as many at once as here."""
        return math.ceil(count / self.batch) * (self.prompts + self.step * tokens)

    def token(self, length: float) -> float:
        """Seconds of a generated token of answers of ``length`` tokens, their prompts counted in, at full width.

        A step of more answers is taken to grow as it did from one answer to those of the first batch.
        """
        growth = max(0.0, self.step - self.single) / max(1, self.batch - 1)
        return (self.step + growth * (WIDTH - self.batch)) / WIDTH + self.prompts / self.batch / length


def first_batch(target: Target, prompts: Sequence[Prompt], max_new_tokens: int) -> Pace:
    """Time a few tokens of these prompts, at most :data:`WIDTH` at once."""

    def seconds(asked: Sequence[Prompt], tokens: int) -> float:
        began = time.perf_counter()
        for _ in generate(target, [Request(p.id, p.ids, Sampler()) for p in asked], tokens):
            pass
        return time.perf_counter() - began

    few, batch = max(1, min(FIRST_TOKENS, max_new_tokens - 1)), list(prompts[:WIDTH])
    seconds(batch[:1], 1 + few)  # warm-up
    single = (seconds(batch[:1], 1 + few) - seconds(batch[:1], 1)) / few
    first = seconds(batch, 1)
    step = (seconds(batch, 1 + few) - first) / few
    return Pace(len(batch), first, max(0.0, single), max(0.0, step))


def expected_seconds(
    pace: Pace, prompts: int, max_new_tokens: int, passes: int, types: int, training: float = 0.0
) -> float:
    """About how long a probe takes here.

    ``passes`` counts the targets that answer, ``types`` the data types that are timed, ``training`` what a token of a
    trial costs in all, in generated ones. Answers may end early: the true time is rather below.
    """
    timing = types * TIMED_PROMPTS * TIMED_TOKENS * 2 * pace.single
    trained = training * prompts * max_new_tokens * pace.token(max_new_tokens)
    return passes * pace.answering(prompts, max_new_tokens) + timing + trained
