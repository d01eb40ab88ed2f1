"""``redraft bench``: prompts from files or suites, a shape that is named or found out, and what the answers scored.

None of the prompts is one that the draft was trained on. All come through the target's chat template; later turns of a
suite stand behind the target's own replies.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from redraft import provenance
from redraft.adaptation.models import TargetSpec, check_output, contestants, open_any, template_prompts
from redraft.adaptation.probe import greedy_answers
from redraft.artifact import atomic_write_json
from redraft.data.answers import UnclearReply, reply_message
from redraft.data.overlap import refuse_overlap, trained_conversations
from redraft.data.prompts import check_length, read_conversations, user_turns
from redraft.data.store import read_rows
from redraft.data.suites import Suite, SuiteItem, load_suite, run_turns
from redraft.data.template import template_ids, template_record
from redraft.data.turns import RESULTS, Message
from redraft.decode.auto import Pick, pick_shape
from redraft.decode.engine import PlainDecoder
from redraft.decode.static import StaticTarget
from redraft.drafts.base import Draft
from redraft.drafts.opening import AnyDraft
from redraft.errors import UserError
from redraft.evaluate import divergence
from redraft.evaluate.figures import PLAIN
from redraft.evaluate.quality import quality_table
from redraft.evaluate.speed import BenchConfig, Prompt, bench
from redraft.progress import progress_bar
from redraft.settings.base import AUTO
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape, Shape, parse_shape
from redraft.settings.steps import BenchSettings, CheckSettings, ProbeSettings
from redraft.target import Target

# Prompts that every tree decodes (and, when the target samples, every chain).
DECODED_PROMPTS = 3


def bench_files(
    s: BenchSettings, spec: TargetSpec, drafts: Mapping[str, AnyDraft], base_draft: AnyDraft | None = None
) -> dict[str, Any]:
    """The paired benchmark of drafts by name; writes the result to ``s.out`` and returns it. Raises ``UserError``.

    ``drafts`` and ``spec`` are what the settings name, opened or not. Where ``spec`` names no data type, plain decoding
    and every draft compete in float32 and bfloat16 on a CPU. Static steps have fixed shapes, which CUDA records once
    and replays (:mod:`redraft.decode.static`).
    """
    check_output(s.out, ".json")
    shape: Shape | None = None if s.shape == AUTO else parse_shape(s.shape)
    questions = Questions(s)
    target = spec.open()
    opened = {name: open_any(source, target, base_draft).draft for name, source in drafts.items()}
    taps = {draft.config.taps for draft in opened.values()}
    if s.static and len(taps) > 1:
        raise UserError("with --static all drafts must read the same layers; measure these in runs of their own")
    prompts = questions.read(target)
    targets = contestants(target, spec.dtype, spec.open, next(iter(taps)))
    picked = ""
    if shape is None:  # the fastest for the last draft; the shortest chain is measured where no draft pays off
        name, last = list(opened.items())[-1]
        # A dynamic tree's tokens are no draws from the draft, so sampled drafts choose among chains; and so does a
        # target whose text is not its own under a tree's mask.
        trees = None if (s.sampler.greedy or s.greedy_drafts) and target.paths.masked else ()
        with progress_bar("shape auto", None, "shapes"):
            pick = auto_shape(target, last, prompts, s.sampler, trees=trees, greedy_drafts=s.greedy_drafts, seed=s.seed)
        shape, picked = pick.shape or ChainShape(1), f"for {name}: {pick.sentence}"
    if s.static:
        longest = max(len(prompt.ids) for prompt in prompts) + s.max_new_tokens
        targets = {name: StaticTarget(each, (1, shape.depth + 1), longest + 1) for name, each in targets.items()}
    config = BenchConfig(shape, s.sampler, s.greedy_drafts, s.max_new_tokens, s.seed)
    record = provenance.collect(s.seed, spec.device, template_record(target.tokenizer))
    result = measure(targets, opened, prompts, config, record, lambda: spec.open("float32"))
    result["setup"] |= {"static_shapes": s.static} | ({"picked": picked} if picked else {})
    atomic_write_json(s.out, result)
    return result


# -- the prompts ---------------------------------------------------------------------------------------------------
class Questions:
    """The prompts of a measurement, from a prompt file, named suites, or both.

    Files are read at once, before anything large is loaded. Raises ``UserError`` for bad ones, for unknown categories,
    and when nothing is asked.
    """

    def __init__(self, s: BenchSettings | CheckSettings | ProbeSettings) -> None:
        if s.prompts is None and not s.suite:
            raise UserError("nothing to measure on; give --prompts FILE or --suite NAME")
        self.settings = s
        self.conversations = read_conversations(s.prompts)[: s.limit] if s.prompts else []
        self.suites = [load_suite(text, s.data, s.limit, s.seed) for text in s.suite]

    @property
    def replies(self) -> bool:
        """Whether there are later turns, which stand behind the target's own replies."""
        items = (item.conversation for suite in self.suites for item in suite.items)
        return any(user_turns(conversation) > 1 for conversation in items)

    def read(self, target: Any) -> list[Prompt]:
        """All prompts as the target's chat template makes them.

        ``target`` needs a tokenizer and a context, and where there are ``replies`` its weights too.
        Raises ``UserError`` for bad prompts, and for those that a draft was trained on.
        """
        s = self.settings
        if isinstance(s, BenchSettings) and s.trained_on is not None:
            asked = [*self.conversations, *(item.conversation for suite in self.suites for item in suite.items)]
            trained = trained_conversations(read_rows(s.trained_on), target.tokenizer)
            refuse_overlap(trained, asked, " and ".join(filter(None, [s.prompts, *s.suite])))
        found = template_prompts(self.conversations, target, s.max_new_tokens)
        return found + suite_prompts(self.suites, target, s.max_new_tokens)


def suite_prompts(suites: Sequence[Suite], target: Target, max_new_tokens: int) -> list[Prompt]:
    """The prompts of the suites.

    A conversation of several user turns gives one prompt a turn. Between them stand the target's own replies, greedy
    and of at most ``max_new_tokens``, so that all contestants of a benchmark get the same prompts; this generation is
    no part of any measurement.

    Raises ``UserError`` for suites that share prompts' ids, and for a first turn that leaves no room to answer; a
    conversation ends before a turn that outgrows the context, that stands behind a tool's result, or behind a reply
    whose answer cannot be told from its thoughts.
    """
    owner: dict[str, str] = {}
    for suite in suites:
        for item in suite.items:
            if item.id in owner:
                raise UserError(f"--suite {suite.name}: prompt {item.id} is already in {owner[item.id]}; name one only")
            owner[item.id] = suite.name
    items = [item for suite in suites for item in suite.items]
    return [prompt for item in items for prompt in _turn_prompts(item, target, max_new_tokens)]


def _turn_prompts(item: SuiteItem, target: Target, max_new_tokens: int) -> list[Prompt]:
    found: list[Prompt] = []

    def reply(messages: list[Message]) -> Message:
        answer = PlainDecoder(target).generate(found[-1].ids, max_new_tokens)
        return reply_message(target.tokenizer, found[-1].ids, answer.ids, target.eos_ids)

    with contextlib.suppress(UnclearReply):
        for number, messages in enumerate(run_turns(item.conversation, reply)):
            if any(message["role"] in RESULTS for message in messages):
                break
            id = f"{item.id}#{number}" if number else item.id  # as in the keys of response rows
            ids = template_ids(target.tokenizer, id, messages)
            try:
                check_length(id, len(ids), max_new_tokens, target.context)
            except UserError:
                if number == 0:
                    raise
                break
            found.append(Prompt(id, ids, item.task, item.reference))
    return found


# -- the shape -------------------------------------------------------------------------------------------------------
def auto_shape(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    sampler: Sampler | None = None,
    longest: int = 8,
    trees: Sequence[Shape] | None = None,
    greedy_drafts: bool = False,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> Pick:
    """The fastest shape for these prompts on this machine, or no draft; ``Pick.sentence`` says why.

    A greedy target answers all prompts, batched, for the acceptance of every chain of up to ``longest``; the first
    three are decoded by every tree (:mod:`redraft.decode.auto`). Raises ``UserError`` without prompts, for ``longest``
    below 1, or when the answers are too short to measure anything.
    """
    walked: list[list[int]] | None = None
    if longest >= 1 and (sampler is None or sampler.greedy):
        draft = draft.eval().to(target.device)
        with torch.inference_mode(), greedy_answers(target, draft.taps, prompts, max_new_tokens) as (rows, store):
            walked = [runs for _, runs in draft.walk(target).runs(rows, store, longest)]
    ids = [prompt.ids for prompt in prompts[:DECODED_PROMPTS]]
    return pick_shape(target, draft, ids, walked, longest, trees, sampler, greedy_drafts, max_new_tokens, seed)


# -- the measurement -------------------------------------------------------------------------------------------------
def measure(
    targets: Mapping[str, Target],
    drafts: Mapping[str, Draft],
    prompts: Sequence[Prompt],
    config: BenchConfig,
    record: Mapping[str, Any],
    in_float32: Callable[[], Target],
) -> dict[str, Any]:
    """:func:`redraft.evaluate.speed.bench` with a progress bar, differing texts explained and answers scored.

    A draft's text is held against plain decoding in the draft's own data type: where the two part, do the target's two
    best tokens nearly tie? ``in_float32`` opens the target in float32, where only another type is at hand.
    """
    done = itertools.count(1)
    with progress_bar("bench", len(prompts) * (1 + len(drafts)), "answers") as progress:
        progress.update(0, now="choosing data types")

        def tick(tokens: int, what: str) -> None:
            # The contest of data types goes before what is counted.
            progress.update(next(done) if what.startswith("prompt ") else 0, tokens=tokens, now=what)

        found = bench(targets, drafts, prompts, config, record, tick)
    figures, exact = found.result["drafts"], targets.get("float32")
    if config.sampler.greedy and found.targets[PLAIN].device.type == "cpu":
        for name in figures:
            parted: list[divergence.Divergence | None] = []
            for prompt, plain, own in zip(prompts, found.expected[name], found.runs[name], strict=True):
                exact = exact or (None if plain == own.ids else in_float32())
                low = found.targets[name]
                parted.append(divergence.explain(prompt.ids, plain, own.ids, exact, low) if exact else None)
            figures[name]["divergence"] = divergence.summary(parted)
    decode = found.targets[PLAIN].tokenizer.decode
    outputs = {name: [decode(run.ids, skip_special_tokens=True) for run in runs] for name, runs in found.runs.items()}
    scores = quality_table(prompts, outputs)
    if scores:
        found.result["plain_quality"] = scores[PLAIN]
    for name in figures if scores else ():
        figures[name]["quality"] = scores[name]
    return found.result
