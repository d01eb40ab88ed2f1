"""What a server does with the same prompts: how it reads them, what it answers, and what its counters say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from redraft.adaptation.check.rounds import Rounds
from redraft.data.generate import Request
from redraft.data.store import Row, row_key
from redraft.data.template import template_ids
from redraft.data.transport import (
    Connection,
    Refused,
    Transient,
    Unusable,
    completion_body,
    counted,
    first_choice,
    listed,
    shown,
)
from redraft.data.turns import Message
from redraft.errors import UserError
from redraft.evaluate import counters
from redraft.evaluate.divergence import first_difference
from redraft.evaluate.load import Level, ServerConfig, Session, paired, patiently
from redraft.evaluate.server import check_counters, check_level
from redraft.evaluate.speed import Prompt
from redraft.evaluate.statistics import Interval, ratio_of_sums
from redraft.evaluate.streams import Answer
from redraft.settings.sampler import Sampler
from redraft.target import Target

# Prompts that are asked as messages and as text, to see what the server makes of them.
ASKED = 3


@dataclass(frozen=True)
class Reading:
    """How a server reads one prompt: ``ids`` where it tells them, else their number."""

    number: int | None
    ids: list[int] | None = None


@dataclass(frozen=True)
class Fault:
    """A cause that the server's own reading of prompts shows, with the evidence in words."""

    cause: str
    evidence: str
    # Whether token ids do not arrive as they are sent, so that nothing can be measured.
    blocks: bool = False


# What a reading shows: faults, and notes in words.
Told = Sequence[Fault | str]
NO_MESSAGES = "the server takes no messages (/v1/chat/completions): its chat template was not looked at"


# -- prompts ---------------------------------------------------------------------------------------------------------
def read_prompts(
    connection: Connection, model: str, prompts: Sequence[Prompt], messages: Sequence[list[Message]], tokenizer: Any
) -> tuple[list[Fault], list[str]]:
    """What is wrong with how the server takes token ids, messages and text, and notes on what it does not take.

    ``messages`` are those of the first prompts. Raises ``UserError`` where it gives no answer.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    told: list[Fault | str] = []

    def asked(path: str, what: dict[str, Any], prompt: Prompt, judge: Callable[[Reading | None], Told]) -> None:
        """What a second reading shows too: one odd answer says nothing of the server."""
        read = partial(_asked, connection, path, model, what, prompt)
        told.extend(judge(read()) and judge(read()))

    for prompt in prompts[:ASKED]:
        asked("/v1/completions", {"prompt": list(prompt.ids)}, prompt, partial(_as_ids, prompt=prompt, bos=bos))
    for prompt, said in zip(prompts[:ASKED], messages, strict=False):
        judge = partial(_as_messages, prompt=prompt, tokenizer=tokenizer, bos=bos)
        asked("/v1/chat/completions", {"messages": said}, prompt, judge)
        if NO_MESSAGES in told:
            break
    for prompt in prompts[:ASKED]:
        text = tokenizer.decode(prompt.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        expected = tokenizer.encode(text, add_special_tokens=False)
        asked("/v1/completions", {"prompt": text}, prompt, partial(_as_text, expected=expected, bos=bos))
    faults = [one for one in told if isinstance(one, Fault)]
    notes = [one for one in told if isinstance(one, str)]
    kept = {fault.cause: fault for fault in reversed(faults)}
    return list(reversed(kept.values())), list(dict.fromkeys(notes))


def _as_ids(found: Reading | None, prompt: Prompt, bos: int | None) -> Told:
    return [replace(one, blocks=True) for one in _changed("token ids", found, prompt.ids, bos)]


def _as_messages(found: Reading | None, prompt: Prompt, tokenizer: Any, bos: int | None) -> Told:
    return [NO_MESSAGES] if found is None else [*_templated(found, prompt, tokenizer, bos)]


def _as_text(found: Reading | None, expected: list[int], bos: int | None) -> Told:
    """What a server makes of rendered text whose tokens are known."""
    if found is None or found.number is None:
        return []
    mine = found.ids[1:] if found.ids and found.ids[0] == bos and expected[:1] != [bos] else found.ids
    if mine == expected or (mine is None and found.number in (len(expected), len(expected) + 1)):
        return []
    if mine is not None and mine == [bos, *expected]:
        return ["the server puts the beginning-of-text token in front of rendered text that has it: send ids"]
    if found.number == len(expected):
        return [Fault("other_tokenizer", f"a text of {len(expected)} tokens has other ids at the server")]
    return [Fault("other_tokenizer", f"a text of {len(expected)} tokens is one of {found.number} to the server")]


def _asked(connection: Connection, path: str, model: str, what: dict[str, Any], prompt: Prompt) -> Reading | None:
    """How the server reads a request of one new token; None where it does not take such requests, said twice."""
    body = completion_body(Request(prompt.id, prompt.ids, Sampler()), model, 1)
    body.pop("prompt")

    def once() -> Reading:
        value = connection.json("POST", path, body | what)
        connection.check_model(value, model)
        choice = first_choice(value)
        if choice is None:
            raise Transient(f"an answer without choices: {shown(value)!r}")
        ids = choice.get("prompt_token_ids", value.get("prompt_token_ids"))
        if not (isinstance(ids, list) and all(type(i) is int for i in ids)):
            ids = None
        return Reading(counted(value, "prompt_tokens") if ids is None else len(ids), ids)

    for _ in range(2):
        try:
            return patiently(once)
        except (Refused, Unusable):
            continue
        except Transient as error:
            raise UserError(f"the server at {connection.url} cannot be used: {error}") from error
    return None


def _changed(what: str, found: Reading | None, ids: list[int], bos: int | None) -> list[Fault]:
    """Whether a server that was sent ``ids`` took other ones."""
    if found is None or found.number is None or found.ids == ids or (found.ids is None and found.number == len(ids)):
        return []
    evidence = f"a prompt of {len(ids)} {what} is one of {found.number} to the server"
    one_more = found.ids == [bos, *ids] or (found.ids is None and found.number == len(ids) + 1)
    if one_more and bos is not None and ids[:1] == [bos]:
        return [Fault("bos_doubled", f"{evidence}, with the beginning-of-text token twice")]
    return [Fault("prompt_changed", evidence)]


def _templated(found: Reading, prompt: Prompt, tokenizer: Any, bos: int | None) -> list[Fault]:
    """Whether the server's template makes the same prompt of the same messages."""
    fault = _changed("template tokens", found, prompt.ids, bos)
    if not fault or fault[0].cause == "bos_doubled":
        return fault
    text = tokenizer.decode(prompt.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    twice = template_ids(tokenizer, prompt.id, [{"role": "user", "content": text}])
    if found.ids == twice or (found.ids is None and found.number == len(twice)):
        return [Fault("template_doubled", fault[0].evidence + ", as many as the template makes of its own output")]
    return [Fault("other_template", fault[0].evidence)]


# -- counters --------------------------------------------------------------------------------------------------------
@dataclass
class Counted:
    """The server's rounds by prompt, in the form of :class:`~redraft.adaptation.check.rounds.Rounds`."""

    by_key: dict[str, counters.Counts]
    tokens: dict[str, int]

    @property
    def keys(self) -> list[str]:
        """The prompts that have a round."""
        return [key for key, counts in self.by_key.items() if counts.rounds]

    @property
    def whole(self) -> counters.Counts:
        """All prompts together."""
        return counters.total(self.by_key.values())

    def counts(self, keys: Sequence[str]) -> tuple[list[float], list[float]]:
        """Tokens and rounds of these prompts, as tau counts them."""
        found = [(self.by_key[key], self.tokens[key]) for key in keys]
        return [c.tau_tokens(tokens, 1) for c, tokens in found], [c.rounds or 0 for c, _ in found]

    def tau(self, keys: Sequence[str] | None = None) -> Interval:
        """tau_pooled with its interval over prompts."""
        return ratio_of_sums(*self.counts(self.keys if keys is None else keys))

    def conditional(self) -> list[float | None]:
        """Acceptance at each drafted position, given that it was reached; none where the server counts no positions."""
        return counters.acceptance(self.whole)[1]


@dataclass
class Served:
    """What a server did: its engine, the answers by prompt, its counts, and what a reader must know."""

    product: str
    engine: str
    answers: dict[str, Answer]
    counted: Counted
    notes: list[str] = field(default_factory=list)

    @property
    def gamma(self) -> int | None:
        """Positions that its counters know; None where it counts none."""
        return len(self.counted.whole.per_position) or None


def ask(session: Session, prompts: Sequence[Prompt], done: Callable[[str], None] | None = None) -> Served:
    """Every prompt asked once, one at a time, with the counters read around each. Raises ``UserError``."""
    session.warm(prompts, 1)
    check_counters(session)
    level: Level = paired([session], prompts, done)[session.name]
    session.levels[1] = level
    check_level(session, level)
    kept = [
        (row_key(prompt.id, 0.0), answer, c)
        for prompt, answer, c in zip(prompts, level.answers, level.counts, strict=True)
    ]
    good = [(key, answer, c) for key, answer, c in kept if not answer.fault]
    counted_ = Counted({key: c for key, _, c in good}, {key: answer.tokens for key, answer, _ in good})
    return Served(session.product, session.engine, {key: answer for key, answer, _ in good}, counted_, session.notes)


def by_pieces(
    session: Session, row: Row, starts: Sequence[int], tokens: int, index: int = 0
) -> list[counters.Counts | None]:
    """The counters of the server where it goes on with an answer of ours behind each of ``starts`` response tokens.

    None where it did not answer. Raises ``UserError`` as the session does.
    """
    found: list[counters.Counts | None] = []
    for start in starts:
        prompt = Prompt(f"{row.key}+{start}", [*row.prompt_ids, *row.response_ids[:start]])
        before = session.steady()
        answer = session.answer(prompt, index, tokens)
        after = session.read_after(before, answer.tokens)
        found.append(None if answer.fault else counters.difference(before, after, session.where))
    return found


def open_session(url: str, config: ServerConfig, prompts: Sequence[Prompt]) -> Session:
    """The server, ready to be measured. Raises ``UserError``."""
    return Session("server", url, config).open(prompts)


def engine_of(session: Session) -> str:
    """The name under which a family may say how this server's engine reads files; empty where nobody knows it."""
    if session.engine == counters.VLLM and session.version:
        return "vllm-" + ".".join(session.version.split(".")[:2])
    return "sglang" if session.engine == counters.SGLANG else ""


def connected(url: str, model: str | None) -> tuple[Connection, str]:
    """A connection, and the name of the model that it serves. Raises ``UserError``."""
    connection = Connection(url, 1)
    connection.open()
    try:
        names = patiently(connection.served_models)
        if model is not None and model not in names:
            raise UserError(f"the server at {url} serves {listed(names)}, not {model}")
        return connection, model or connection.the_model(names)
    except Unusable as error:
        connection.close()
        raise UserError(str(error)) from error
    except (Transient, Refused) as error:
        connection.close()
        raise UserError(f"the server at {url} cannot be used: {error}; is it up?") from error
    except UserError:
        connection.close()
        raise


# -- texts -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Texts:
    """How the server's answers compare with the target's own choices, given the server's words so far.

    ``choices`` tokens were compared, ``others`` of them are not the target's best, and lie ``behind`` it by these many
    units of logits, the most first. ``started`` answers of ``answers`` begin with another token.
    """

    answers: int
    choices: int
    others: int
    behind: tuple[float, ...]
    started: int

    @property
    def clear(self) -> int:
        """Choices that no rounding to bfloat16 explains."""
        return sum(gap > CLEAR for gap in self.behind)


# A gap between logits that rounding to bfloat16 does not bridge: logits of 16 to 32 are an eighth apart there.
CLEAR = 0.5


@torch.inference_mode()
def compare_texts(target: Target, prompts: Sequence[Prompt], answers: dict[str, Answer]) -> Texts | None:
    """Teacher-forced on the server's own answers; None where it gives no token ids."""
    total = others = started = count = 0
    behind: list[float] = []
    for prompt in prompts:
        answer = answers.get(row_key(prompt.id, 0.0))
        if answer is None or not answer.ids:
            continue
        count += 1
        ids = torch.tensor([[*prompt.ids, *answer.ids][:-1]], device=target.device)
        states_RH = target.forward(ids, taps=False).hidden_BTH[0, len(prompt.ids) - 1 :]
        best: list[int] = []
        for part, said in zip(states_RH.split(64), torch.tensor(answer.ids).split(64), strict=True):
            logits = target.logits(part).float()
            gaps = logits.max(-1).values - logits.gather(-1, said[:, None].to(logits.device))[:, 0]
            best += logits.argmax(-1).tolist()
            behind += [gap for gap in gaps.tolist() if gap > 0]
        total += len(answer.ids)
        others += sum(a != b for a, b in zip(best, answer.ids, strict=True))
        started += first_difference(best, answer.ids) == 0
    return Texts(count, total, others, tuple(sorted(behind, reverse=True)), started) if count else None


def same_rounds(served: Counted, here: Rounds) -> float:
    """How far apart the two are: the differences of tau, prompt by prompt, on average, and those of unconditional
    acceptance, summed over positions, where the server counts positions."""
    keys = [key for key in served.keys if here.by_key.get(key)]
    if not keys:
        return math.inf
    theirs, mine = ([n / m for n, m in zip(*side.counts(keys), strict=True)] for side in (served, here))
    apart = sum(abs(a - b) for a, b in zip(theirs, mine, strict=True)) / len(keys)
    positions, _ = counters.acceptance(counters.total(served.by_key[key] for key in keys))
    only = Rounds(here.gamma, {key: here.by_key[key] for key in keys})
    rounds = sum(map(len, only.by_key.values()))
    ours = [taken / rounds for taken in only.accepted()]
    return apart + sum(abs(a - b) for a, b in zip(positions, ours, strict=False))
