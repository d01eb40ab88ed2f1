"""``redraft bench``: prompts from files or suites, a shape that is named or found out, and what the answers scored."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.adaptation.auto import auto_shape
from redraft.adaptation.models import TargetSpec, check_output, contestants, open_any
from redraft.adaptation.questions import Questions
from redraft.artifact import atomic_write_json
from redraft.data.template import template_record
from redraft.decode.static import StaticTarget
from redraft.drafts.base import Draft
from redraft.drafts.opening import AnyDraft
from redraft.errors import UserError
from redraft.evaluate import divergence
from redraft.evaluate.quality import PLAIN, quality_table
from redraft.evaluate.speed import BenchConfig, Measured, Prompt, bench
from redraft.progress import progress_bar
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import ChainShape, Shape, check_drafts, parse_shape
from redraft.target import Target

AUTO = "auto"


@dataclass(frozen=True)
class How:
    """How the prompts are decoded. ``shape`` is as :func:`parse_shape` reads it, or ``auto``; ``static`` gives steps
    fixed shapes, which CUDA records once and replays (:mod:`redraft.decode.static`)."""

    shape: str = "chain:5"
    sampler: Sampler = field(default_factory=Sampler)
    greedy_drafts: bool = False
    max_new_tokens: int = 128
    seed: int = 0
    static: bool = False


def bench_files(
    spec: TargetSpec,
    drafts: Mapping[str, AnyDraft],
    questions: Questions,
    out: Path,
    how: How,
    base_draft: AnyDraft | None = None,
) -> dict[str, Any]:
    """The paired benchmark of drafts by name; writes the result to ``out`` and returns it. Raises ``UserError``.

    Where ``spec`` names no data type, plain decoding and every draft compete in float32 and bfloat16 on a CPU.
    """
    check_output(out, ".json")
    wanted = None if how.shape == AUTO else parse_shape(how.shape)
    if wanted is not None:
        check_drafts(wanted, how.sampler.greedy or how.greedy_drafts)
    questions.conversations  # noqa: B018  a bad prompt file is refused before anything large is loaded
    target = spec.open()
    opened = {name: open_any(source, target, base_draft).draft for name, source in drafts.items()}
    taps = {draft.config.taps for draft in opened.values()}
    if how.static and len(taps) > 1:
        raise UserError("with --static all drafts must read the same layers; measure these in runs of their own")
    prompts = questions.read(target, how.max_new_tokens, how.seed)
    targets = contestants(target, spec.dtype, spec.open, next(iter(taps)))
    shape, picked = (wanted, None) if wanted else _pick(target, list(opened.items())[-1], prompts, how)
    shape = shape or ChainShape(1)
    if how.static:
        longest = max(len(prompt.ids) for prompt in prompts) + how.max_new_tokens
        targets = {name: StaticTarget(each, (1, shape.depth + 1), longest + 1) for name, each in targets.items()}
    config = BenchConfig(shape, how.sampler, how.greedy_drafts, how.max_new_tokens, how.seed)
    record = provenance.collect(how.seed, spec.device, template_record(target.tokenizer))
    result = measure(targets, opened, prompts, config, record, lambda: spec.open("float32"))
    result["setup"]["static_shapes"] = how.static
    if picked:
        result["setup"]["picked"] = picked
    atomic_write_json(out, result)
    return result


def _pick(target: Target, named: tuple[str, Draft], prompts: Sequence[Prompt], how: How) -> tuple[Shape | None, str]:
    """The fastest shape for the last draft; the shortest chain is measured where no draft pays off."""
    name, draft = named
    sampled = not (how.sampler.greedy or how.greedy_drafts)
    # A dynamic tree's tokens are no draws from the draft, so sampled drafts choose among chains; and so does a target
    # whose text is not its own under a tree's mask.
    trees: Sequence[Shape] | None = () if sampled or not target.paths.masked else None
    with progress_bar("gamma=auto", None, "shapes"):
        pick = auto_shape(
            target, draft, prompts, how.sampler, trees=trees, greedy_drafts=how.greedy_drafts, seed=how.seed
        )
    return pick.shape, f"for {name}: {pick.sentence}"


def measure(
    targets: Mapping[str, Target],
    drafts: Mapping[str, Draft],
    prompts: Sequence[Prompt],
    config: BenchConfig,
    record: Mapping[str, Any],
    in_float32: Callable[[], Target] | None = None,
) -> dict[str, Any]:
    """:func:`redraft.evaluate.speed.bench` with a progress bar, near-ties explained and answers scored.

    ``in_float32`` opens the target in float32, where texts differ that were decoded in another type alone; without it
    these stay unexplained.
    """
    done = itertools.count(1)
    with progress_bar("bench", len(prompts) * (1 + len(drafts)), "answers") as progress:
        progress.update(0, now="choosing data types")

        def tick(tokens: int, what: str) -> None:
            # The contest of data types goes before what is counted.
            progress.update(next(done) if what.startswith("prompt ") else 0, tokens=tokens, now=what)

        found = bench(targets, drafts, prompts, config, record, tick)
    exact = (lambda: targets["float32"]) if "float32" in targets else in_float32
    if config.sampler.greedy and found.target.device.type == "cpu" and exact is not None:
        explain_differences(found, prompts, exact)
    score_answers(found, prompts)
    return found.result


def explain_differences(found: Measured, prompts: Sequence[Prompt], in_float32: Callable[[], Target]) -> None:
    """Say of every text that is not plain decoding's whether the target's two best tokens nearly tie where they part.

    A draft's text is held against plain decoding in the draft's own data type. ``in_float32`` gives the target in
    float32, asked only where texts differ.
    """
    exact: Target | None = None
    for name, figures in found.result["drafts"].items():
        parted: list[divergence.Divergence | None] = []
        for prompt, expected, own in zip(prompts, found.expected[name], found.runs[name], strict=True):
            if expected == own.ids:
                parted.append(None)
                continue
            exact = exact or in_float32()
            parted.append(divergence.explain(prompt.ids, expected, own.ids, exact, found.targets[name]))
        figures["divergence"] = divergence.summary(parted)


def score_answers(found: Measured, prompts: Sequence[Prompt]) -> None:
    """Put the task scores of plain and speculative answers beside each other, where the prompts have references."""
    tokenizer = found.target.tokenizer
    outputs = {
        name: [tokenizer.decode(run.ids, skip_special_tokens=True) for run in runs] for name, runs in found.runs.items()
    }
    scores = quality_table(prompts, outputs)
    if not scores:
        return
    found.result["plain_quality"] = scores[PLAIN]
    for name, figures in found.result["drafts"].items():
        figures["quality"] = scores[name]
