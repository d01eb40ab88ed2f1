"""A whole study: every cell of the config, resumed wherever it was killed, into one results file."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from redraft import provenance
from redraft.adaptation.claim import check_files, fingerprints, settled
from redraft.adaptation.models import contestants, open_draft, open_target, template_prompts
from redraft.adaptation.runs import Log, Say, record_of, row_tokens
from redraft.adaptation.study.cells import CELL_FORMULAS, cell_folder, run_cell
from redraft.adaptation.study.figures import MAIN, derive
from redraft.adaptation.study.records import SCHEMA, Facts, Record
from redraft.adaptation.study.targets import Model, TargetWork, slug
from redraft.artifact import read_json, read_sealed, write_sealed
from redraft.errors import UserError
from redraft.evaluate.speed import SCHEMA as BENCH_SCHEMA
from redraft.evaluate.speed import BenchConfig, Prompt, bench
from redraft.inputs import typed
from redraft.locks import contents, held
from redraft.progress import Progress, progress_bar
from redraft.reports.load import BenchResult
from redraft.rows import anchors
from redraft.seals import digest
from redraft.settings.sampler import Sampler
from redraft.settings.shapes import DynamicTree, parse_shape
from redraft.settings.studies import ANY, NONE, Cell, StudyConfig
from redraft.settings.texts import parse_budget

CONFIG_FILE, RESULTS_FILE = "study.json", "results.json"
SETTINGS, FACTS, RECORD = "redraft.study-settings/1", "redraft.study-facts/1", "redraft.study-record/1"
# What may be changed or added to while results are kept: other cells, and what is said about them.
FREE = ("about", "grid", "cells", "speed", "keep_drafts")
NAMED = ("targets", "data", "methods", "selections", "starts")
# A bar counts thousandths of a cell trained on everything. What trains nothing is no part of it, unless nothing is
# trained at all.
CELL_UNITS = 1000
# Of it the part that no selection saves: loading, measuring.
LEAST_SHARE = 0.3


class Board:
    """One ``bar`` over all cells, ``done`` of its units behind.

    The training of the cell under way fills its units; any other stage is named beside the bar.
    """

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.done = self.shown = self.units = 0
        self.cell = ""

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Progress]:
        """The progress of a stage that counts up to ``total``."""
        yield Share(self, name, total or 1)

    @contextmanager
    def over(self, cell: Cell, units: int) -> Iterator[None]:
        """A cell, whose ``units`` are behind afterwards."""
        self.cell, self.units = cell.key, units
        self.show(self.done, cell.key)
        yield
        self.done += units
        self.show(self.done, cell.key)

    def show(self, done: int, now: str, tau: float | None = None) -> None:
        """One line on where the study is; the bar never goes back."""
        self.shown = max(done, self.shown)
        if self.bar is not None:
            self.bar.update(self.shown, now=now, heldout_tau=tau)


@dataclass(frozen=True)
class Share:
    """The progress of one stage on the board."""

    board: Board
    stage: str
    total: int

    def update(self, done: int, **fields: Any) -> None:
        board, share = self.board, min(1.0, done / self.total)
        if self.stage.endswith(": train"):
            board.show(board.done + round(share * board.units), board.cell, fields.get("heldout_tau"))
        else:
            board.show(board.done, f"{self.stage} {100 * share:.0f}%")


class StudyRun:
    """One study in one folder."""

    def __init__(self, config: StudyConfig, out: Path, say: Say = print) -> None:
        """Raises ``UserError`` when the folder belongs to a study of other settings."""
        self.config, self.folder, self.say = claim(config, out, say), out, say
        self.asked_dtype = config.dtype  # auto lets the types compete where speed is measured
        mark = read_json(out / CONFIG_FILE)["mark"]
        self.marks = {name: digest([mark, name]) for name in self.config.targets}
        self.ledger = provenance.Ledger.load(out / "ledger.json", mark)
        self.cells = list(config.all_cells())
        self.board = Board()
        specs = {entry.base_target for entry in config.targets.values() if entry.base_target is not None}
        self.bases = {spec: self._base(spec) for spec in sorted(specs)}

    def _base(self, spec: str) -> Model:
        c, name = self.config, f"base {spec}"
        opener = partial(open_target, spec, c.dtype, c.device, None, c.template_arg, self.folder)
        return Model(name, opener, self.folder / "bases" / slug(spec), c, self._log(name))

    def _log(self, name: str) -> Log:
        """The log of what is done with one target: the study's ledger and bar, and nothing said in between."""
        return Log(self.ledger, lambda text: None, f"{name}: ", self.board.stage)

    # -- running -----------------------------------------------------------------------------------------------
    def run(self) -> dict[str, Any]:
        """All cells that have no record yet, target by target; returns the results. Raises ``UserError``."""
        with held(self.folder, "folder of the study", self.say):
            return self._run()

    def _run(self) -> dict[str, Any]:
        counted = [cell for cell in self.cells if self.config.trains(cell.method)] or self.cells
        units = {cell: self._units(cell) if cell in counted else 0 for cell in self.cells}
        with progress_bar("study", sum(units.values()), "") as bar:
            self.board.bar = bar
            works = {name: self.work(name) for name in self.config.targets}
            self.board.done = sum(units[cell] for cell in self.cells if self.record_path(cell).exists())
            for name in self.config.targets:
                # A target that is done with is let go of.
                self._run_target(works.pop(name), [cell for cell in self.cells if cell.target == name], units)
            self.board.bar = None
        return self.write(finished=True)

    def _units(self, cell: Cell) -> int:
        """What the bar counts for a cell: less where a selection shortens the training."""
        budget = parse_budget(self.config.selection_of(cell.selection).budget if cell.selection != ANY else "100%")
        shorter = self.config.budget == "epochs" and budget.kind == "fraction"
        return round(CELL_UNITS * max(LEAST_SHARE, float(budget.amount))) if shorter else CELL_UNITS

    def work(self, name: str) -> TargetWork:
        """What the cells of a target share, its prompts read: bad ones are refused before any model is loaded."""
        work = TargetWork(name, self.folder, self.config, self._log(name), self.bases)
        _ = work.prompts
        if self.config.general is not None:
            _ = work.general
        return work

    def _run_target(self, work: TargetWork, cells: list[Cell], units: dict[Cell, int]) -> None:
        """The cells of one target, those of the same data together."""
        facts_path = work.folder / "facts.json"
        wanted = speed_cells(self.config, cells)
        open_cells = [cell for cell in cells if not self.finished(cell, wanted)]
        for cell in cells:
            if cell not in open_cells:  # a kill right behind its record left them
                self._drop_states(cell)
        kinds = list(dict.fromkeys((cell.data, cell.selection) for cell in cells))
        for cell in sorted(open_cells, key=lambda cell: kinds.index((cell.data, cell.selection))):
            keep = self.config.keep_drafts or cell in wanted
            with self.board.over(cell, units[cell]):
                record = run_cell(work, cell, keep)
            # The record says that a cell is done with: whatever the results read beside it must be there by then.
            known = self.facts_of(work.name) or {}
            write_sealed(facts_path, facts(work, known.get("data", {})), FACTS, self.marks[work.name])
            place = self.record_path(cell).parent
            files = {"files": fingerprints(place, "draft")} if keep else {}
            write_sealed(self.record_path(cell), record | files, RECORD, self.marks[work.name])
            self._drop_states(cell)
            self.write(finished=False)
            tokens, rounds = work.sets[MAIN].tokens, record["rounds"][MAIN]
            tau, seconds = sum(tokens) / sum(rounds), sum(record["seconds"].values())
            done = f"{len(self.records())} of {len(self.cells)} cells"
            self.say(f"{done}: {record['key']}: tau {tau:.3f} ({seconds:.0f} s)")
        if wanted:
            speed_of(work, wanted, self.asked_dtype, self.say, self.marks[work.name])

    def _drop_states(self, cell: Cell) -> None:
        """Remove what only a training that goes on needs."""
        shutil.rmtree(self.record_path(cell).parent / "train", ignore_errors=True)

    def finished(self, cell: Cell, wanted: list[Cell]) -> bool:
        """Whether a cell has its record, and its draft where speed is to be measured."""
        path = self.record_path(cell)
        return path.exists() and (cell not in wanted or (path.parent / "draft").is_dir())

    # -- results -----------------------------------------------------------------------------------------------
    def record_path(self, cell: Cell) -> Path:
        return cell_folder(self.folder, cell) / "record.json"

    def record_of(self, cell: Cell) -> dict[str, Any]:
        """The record of a finished cell. Raises ``UserError`` for damage, also of its draft."""
        path = self.record_path(cell)
        mend = f"delete {path} and give the same command again, which makes that cell anew"
        record = read_sealed(path, RECORD, self.marks[cell.target], mend)
        typed(Record, record, str(path), mend)
        if record["key"] != cell.key:
            raise UserError(f"{path} is the record of {record['key']} and not of {cell.key}; {mend}")
        check_files(path.parent, record.pop("files", {}), mend)
        return record

    def records(self) -> list[dict[str, Any]]:
        """Records of the finished cells, in the config's order."""
        return [self.record_of(cell) for cell in self.cells if self.record_path(cell).exists()]

    def facts_of(self, name: str) -> dict[str, Any] | None:
        """What is known of a target; none where no cell of it is done. Raises ``UserError`` for damage."""
        path = self.folder / "targets" / name / "facts.json"
        mend = "delete it with the records of its cells and give the same command again"
        if not path.exists():
            return None
        found = read_sealed(path, FACTS, self.marks[name], mend)
        typed(Facts, found, str(path), mend)
        return found

    def write(self, finished: bool) -> dict[str, Any]:
        """Write the results of what is finished, and return them; figures are worked out at the end alone."""
        config = self.config
        targets = {}
        for name in config.targets:
            if known := self.facts_of(name):
                places = sorted((self.folder / "targets" / name).glob("speed-*.json"))
                mend = "delete it and give the same command again, which measures it anew"
                speeds = [read_sealed(path, BENCH_SCHEMA, self.marks[name], mend) for path in places]
                for path, speed in zip(places, speeds, strict=True):
                    typed(BenchResult, speed, str(path), mend)
                targets[name] = known | ({"speed": speeds} if speeds else {})
        results: dict[str, Any] = {
            "schema": SCHEMA,
            "name": config.name,
            "about": config.about,
            "finished": finished,
            "config": json.loads(config.model_dump_json()),
            "setup": setup(config),
            "provenance": provenance.collect(seed=config.seed, device=config.device),
            "ledger": self.ledger.to_dict(),
            "targets": targets,
            "cells": self.records(),
        }
        if finished:
            results["figures"] = derive(results)
        write_sealed(self.folder / RESULTS_FILE, results, SCHEMA)
        return results


def setup(config: StudyConfig) -> dict[str, Any]:
    """What every table says below its figures."""
    first = next(iter(config.data))
    rules = {
        "tokens": f"every training run sees as many supervised tokens as the set number of epochs over all of {first}",
        "epochs": "every training run passes over its own rows for the set number of epochs",
    }
    walk = "rounds walked over stored answers of the target; expected rounds where the text is sampled"
    if tree := config.tree_shape:
        walk += f"; beside the chain a {tree.describe()} of the draft's likeliest tokens"
    return {
        "chain": f"chain of {config.gamma}",
        "walk": walk,
        "budget": rules[config.budget],
        "train": vars(config.train_config("kl", 0)) | {"loss": "of the cell", "seed": "of the cell"},
        "flops": CELL_FORMULAS,
        "reference": {"data": first, "seeds": "the same, or the first"},
    }


def facts(work: TargetWork, data: dict[str, Any]) -> dict[str, Any]:
    """What is known of a target, and the prompts that its rounds belong to; ``data`` of an earlier run stay."""
    prompts: Any = work.prompts
    for name, rows in work.known_rows.items():
        generated = work.config.data[name].kind in ("regenerated", "self")
        data[name] = {
            "kind": work.config.data[name].kind,
            "rows": len(rows),
            "tokens": sum(map(anchors, rows)),
            "generated_tokens": row_tokens(rows) if generated else 0,
        }
    return {
        "target": work.target.name,
        "hash": work.target.content_hash(),
        "base_target": work.entry.base_target,
        "draft": work.entry.draft,
        "target_parameters_per_token": work.target.parameters_per_token,
        "prompts": {"train": len(prompts.train), "heldout": len(prompts.heldout)}
        | {f"evaluation {task}": len(part) for task, part in prompts.evaluation.items()},
        "dropped_as_overlap": prompts.dropped,
        "data": data,
        "sets": {name: asked.to_dict() for name, asked in work.sets.items()},
    }


# -- wall-clock speed: one paired run a shape and temperature, every draft on the same prompts -------------------------
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


def speed_of(work: TargetWork, cells: list[Cell], dtype: str, say: Say, mark: str) -> None:
    """Measure what has no result yet and write each run beside the target's facts, with ``mark``. Raises ``UserError``.

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
        write_sealed(paths[run], result.result, BENCH_SCHEMA, mark)
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


# -- the folder ------------------------------------------------------------------------------------------------------
def claim(config: StudyConfig, folder: Path, say: Say | None = None) -> StudyConfig:
    """Take the folder, or check that it holds the same study; the settings with the data type of the study.

    Cells and names may be added, and anything changed while nothing else is in the folder. Raises ``UserError``.
    """
    with held(folder, "folder of the study", say):
        return _claimed(config, folder, say)


def _claimed(config: StudyConfig, folder: Path, say: Say | None) -> StudyConfig:
    path = folder / CONFIG_FILE
    config = settled(config, path, say)
    values = json.loads(config.model_dump_json())
    mark = digest(values)  # by which the study's files are told from another's, for good
    if path.exists():
        mend = "give another folder, or delete this one and begin anew"
        # A setting that is newer than some studies.
        stored = {"template_arg": {}} | read_sealed(path, SETTINGS, None, mend)
        mark = stored.pop("mark", mark)
        changed = sorted(key for key in {*stored, *values} - {*FREE, *NAMED} if stored.get(key) != values.get(key))
        for kind in NAMED:
            old, new = stored.get(kind, {}), values[kind]
            changed += [f"{kind} {name}" for name in old if name in new and old[name] != new[name]]
        if next(iter(stored.get("data", {})), None) != next(iter(values["data"])):
            changed.append("first data")
        if changed and not ("targets" in stored and contents(folder) == [path]):
            raise UserError(
                f"{folder} belongs to a study with another {', '.join(changed)}; give another folder, or the same "
                "settings to go on with it"
            )
    elif contents(folder):
        raise UserError(f"{folder} holds other files; give a new or empty folder")
    write_sealed(path, values | {"mark": mark}, SETTINGS)
    return config
