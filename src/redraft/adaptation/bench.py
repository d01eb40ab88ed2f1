"""``redraft bench``: prompts from files or suites, a shape that is named or found out, and what the answers scored."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from redraft import provenance
from redraft.adaptation.models import contestants, open_proposer
from redraft.adaptation.probe import greedy_answers
from redraft.adaptation.questions import Questions
from redraft.adaptation.steps import TargetSpec, check_output
from redraft.artifact import atomic_write_json
from redraft.data.template import template_record
from redraft.decode.auto import Pick, pick_shape
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
from redraft.settings.measure import BenchSettings
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape, Shape, parse_shape
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
    opened = {name: open_proposer(source, target, base_draft)[0] for name, source in drafts.items()}
    taps = {draft.config.taps for draft in opened.values()}
    if s.static and len(taps) > 1:
        raise UserError("with --static all drafts must read the same layers; measure these in runs of their own")
    prompts = questions.read(target)
    targets = contestants(target, spec.dtype, spec.open)
    for each in targets.values():
        each.tap(next(iter(taps)))
    picked = ""
    if shape is None:  # the fastest for the last draft; the shortest chain is measured where no draft pays off
        name, last = list(opened.items())[-1]
        # A dynamic tree's tokens are no draws from the draft, so sampled drafts choose among chains; and so does a
        # target whose text is not its own under a tree's mask.
        trees = None if (s.sampler.greedy or s.greedy_drafts) and target.paths.masked else ()
        with progress_bar("gamma=auto", None, "shapes"):
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


# -- the shape -------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def run_lengths(
    target: Target, draft: Draft, prompts: Sequence[Prompt], max_new_tokens: int, longest: int
) -> list[list[int]]:
    """How many proposals in a row are right from each anchor of each greedy response, at most ``longest``."""
    draft = draft.eval().to(target.device)
    with greedy_answers(target, draft, prompts, max_new_tokens) as (rows, store):
        return [runs for _, runs in draft.walk(target).runs(rows, store, longest)]


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
        walked = run_lengths(target, draft, prompts, max_new_tokens, longest)
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
    if config.sampler.greedy and found.target.device.type == "cpu":
        for name in figures:
            parted: list[divergence.Divergence | None] = []
            for prompt, plain, own in zip(prompts, found.expected[name], found.runs[name], strict=True):
                exact = exact or (None if plain == own.ids else in_float32())
                low = found.targets[name]
                parted.append(divergence.explain(prompt.ids, plain, own.ids, exact, low) if exact else None)
            figures[name]["divergence"] = divergence.summary(parted)
    decode = found.target.tokenizer.decode
    outputs = {name: [decode(run.ids, skip_special_tokens=True) for run in runs] for name, runs in found.runs.items()}
    scores = quality_table(prompts, outputs)
    if scores:
        found.result["plain_quality"] = scores[PLAIN]
    for name in figures if scores else ():
        figures[name]["quality"] = scores[name]
    return found.result
