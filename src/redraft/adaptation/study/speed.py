"""Wall-clock speed of chosen cells: one paired run a shape and temperature, every draft on the same prompts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from redraft.adaptation.models import contestants, open_draft, template_prompts
from redraft.adaptation.runs import Say, record_of
from redraft.adaptation.study.answers import slug
from redraft.adaptation.study.cells import cell_folder
from redraft.adaptation.study.targets import TargetWork
from redraft.artifact import atomic_write_json
from redraft.evaluate.speed import BenchConfig, Prompt, bench
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import DynamicTree, parse_shape
from redraft.settings.studies import ANY, NONE, Cell, StudyConfig


def speed_cells(config: StudyConfig, cells: list[Cell]) -> list[Cell]:
    """The cells of one target whose speed is measured: of every method the first on the first data, unselected.

    Starts with a draft of their own are left out: all drafts of a run are of one family.
    """
    if config.speed is None:
        return []
    found: dict[str, Cell] = {}
    for cell in cells:
        if config.speed.methods is not None and cell.method not in config.speed.methods:
            continue
        plain = cell.data in (ANY, next(iter(config.data))) and cell.selection in (ANY, NONE)
        if plain and config.start_of(cell.start).draft is None:
            found.setdefault(cell.method, cell)
    return list(found.values())


def speed_of(work: TargetWork, cells: list[Cell], dtype: str, say: Say) -> None:
    """Measure what has no result yet and write each run beside the target's facts. Raises ``UserError``.

    With ``dtype`` auto the data types compete.
    """
    config, wanted = work.config, work.config.speed
    assert wanted is not None
    shapes = wanted.shapes or (f"chain:{config.gamma}",)
    names = {cell.method: cell_folder(work.root, cell) / "draft" for cell in cells}
    runs = [(shape, temperature) for shape in shapes for temperature in wanted.temperatures]
    keys = " ".join(cell.key for cell in cells)
    paths = {run: work.folder / f"speed-{slug(f'{run[0]} T{run[1]:g} {keys}')}.json" for run in runs}
    left = [run for run in runs if not paths[run].exists()]
    if not left:
        return
    drafts: dict[str, Any] = {
        name: open_draft(folder, work.target).draft.to(work.target.device) for name, folder in names.items()
    }
    targets = contestants(work.target, dtype, work.open_again, next(iter(drafts.values())).config.taps)
    prompts = _prompts(work, wanted.prompts)
    for run in left:
        shape, temperature = parse_shape(run[0]), run[1]
        record = record_of(work.target, config.seed)
        # A dynamic tree holds the draft's likeliest tokens, which are no draws from it.
        greedy = temperature > 0 and isinstance(shape, DynamicTree)
        how = BenchConfig(shape, Sampler(temperature), greedy, config.evaluation_tokens, config.seed, traces=0)
        with work.log.counted("speed", None) as (_, progress):
            result = bench(targets, drafts, prompts, how, record, lambda done, what: progress.update(0))
        atomic_write_json(paths[run], result.result)
        say(f"{work.name}: speed as {how.shape.describe()}, {how.sampler.describe()}")


def _prompts(work: TargetWork, count: int) -> list[Prompt]:
    """The first evaluation prompts, tasks in turn."""
    found: list[Prompt] = []
    for turn in itertools.zip_longest(*work.prompts.evaluation.values()):
        for task, conversation in zip(work.prompts.evaluation, turn, strict=True):
            if conversation is not None and len(found) < count:
                asked = template_prompts([conversation], work.target, work.config.evaluation_tokens)
                found.append(replace(asked[0], task=task))
    return found
