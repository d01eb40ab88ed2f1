"""The training loop of everything that is trained here; a run that was killed goes on, on a CPU to the
same bits.

A step is the sum of its parts' gradients (gradient accumulation); a part is a callable that gives a scalar already
divided by what the whole step counts, over all its parts and all workers. Weights, optimiser state, position in the
data and every metric of the curve so far are in the checkpoint; what a step draws at random is a function of seed and
step. A loss or gradient that is not finite stops the run before any weight is changed, so that no checkpoint ever
holds it.

The checkpoint is tensors and JSON, replaced as one, without pickle.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor, nn

from redraft.arithmetic import choose_dtype
from redraft.artifact import atomic_write_text, read_checked, read_json, read_sealed, write_checked, write_sealed
from redraft.errors import UserError
from redraft.files import append_text, use_folder
from redraft.inputs import json_lines, there, typed
from redraft.progress import Progress
from redraft.seals import digest, sealed, unsealed
from redraft.settings.training import LoopConfig
from redraft.training.optimizer import Optimizers, learning_rate, make_optimizers, muon_type
from redraft.training.workers import SINGLE, Workers, sum_gradients

Named = list[tuple[str, nn.Parameter]]
Entry = TypeVar("Entry")
BEST_FILE, STATE_FILE = "best.safetensors", "state.json"
# The entry of an identity that names what a draft was before it was trained; empty for a new draft.
OLD_DRAFT = "old draft"
SCHEMA, CURVE = "redraft.checkpoint/1", "redraft.curve/1"


@dataclass
class Step:
    """One optimiser step: the parts that this worker computes, the supervised tokens of all workers' parts, and the
    position in the data behind it."""

    parts: Sequence[Callable[[], Tensor]]
    tokens: int
    position: dict[str, Any] = field(default_factory=dict)


def onward(order: Callable[[int], Sequence[Entry]], begin: int) -> Iterator[Entry]:
    """The entries of ``order(0)``, ``order(1)`` and so on in a row, from number ``begin`` on, without end."""
    for epoch in itertools.count():
        entries = order(epoch)
        yield from entries[begin:]
        begin = max(0, begin - len(entries))


Steps = Callable[[int, dict[str, Any]], Iterator[Step]]
"""The steps of a run, from a number and a position in the data on."""


@dataclass
class LoopResult:
    """The outcome. ``best`` and ``start`` are values of the metric that picks the best weights; ``history`` lists
    (step, metric)."""

    best: float
    start: float
    best_step: int
    steps: int
    tokens: int
    seconds: float
    stopped_early: bool
    history: list[tuple[int, float]]


class TrainingLoop:
    """A run over ``total`` of ``steps``. ``evaluate`` gives the metric that picks the best weights."""

    def __init__(
        self,
        model: nn.Module,
        trained: Named,
        steps: Steps,
        total: int,
        evaluate: Callable[[], float],
        config: LoopConfig,
        folder: Path,
        identity: dict[str, Any],
        *,
        precision: str,
        metric: str = "heldout_tau",
        higher_is_better: bool = True,
        before: Callable[[], int] | None = None,
        workers: Workers = SINGLE,
    ) -> None:
        """``trained`` are the parameters of ``model`` that move, in float32; losses are computed in ``precision``.

        ``precision`` may be ``auto``; what a run was begun in is in its checkpoint, and it goes on so on any machine.
        ``identity`` says what else the checkpoint in ``folder`` belongs to. ``before`` is done once, ahead of the
        first evaluation, and gives the supervised tokens that it took. ``metric`` names what ``evaluate`` gives in
        ``curve.jsonl``. Raises ``UserError`` for another's checkpoint.
        """
        if not trained:
            raise ValueError("no parameter requires a gradient")
        self.model, self.trained, self.steps, self.total = model, trained, steps, total
        self.measure, self.config, self.before, self.workers = evaluate, config, before, workers
        self.metric, self.sign = metric, 1 if higher_is_better else -1
        self.device = trained[0][1].device
        self.precision = choose_dtype(precision, self.device.type)
        names = {"config": config.identity(), "trained": [n for n, _ in trained], "steps": total}
        names["shapes"] = [list(p.shape) for _, p in trained]
        self.folder, self.curve = folder, folder / "curve.jsonl"
        # Whether the run had ended before this process came to it: then nothing is spent here.
        self.done_before = False
        self.checkpoint = Checkpoint(folder, names | identity)

    # -- the loop ----------------------------------------------------------------------------------------------
    def run(self, reporter: Progress | None = None) -> LoopResult:
        """Train to the end, or until patience is out. On return the model holds the weights of the best evaluation.

        A killed run, started again with the same arguments, ends with the same bits on a CPU; of CUDA that has not
        been shown. Raises ``UserError`` when a loss or a gradient is not finite; the checkpoint before it stays.
        """
        optimizers = make_optimizers(self.trained, self.config.optimizer, self.config.weight_decay)
        self.workers.spread(self.model.state_dict().values())
        stored = self.checkpoint.load(self.trained, optimizers)
        self.workers.wait()  # nobody writes before all have looked
        state = stored or self.start(optimizers)
        # A run of before this was recorded took what it was given, and torch's own arithmetic.
        used = state.setdefault("arithmetic", {"precision": self.precision, "muon": "bfloat16"})
        self.precision, optimizers.muon = used["precision"], used["muon"]
        self.done_before = self.ended(state)
        if self.workers.writes:
            self.mend_curve(state["step"])
        self.model.train()
        began = saved = time.monotonic()
        spent = state["seconds"]
        # Closed at once when the loop ends early: a source may hold a thread.
        with closing(self.steps(state["step"], state["position"])) as steps:  # type: ignore[type-var]
            while not self.ended(state):
                self.advance(next(steps), optimizers, state, reporter)
                state["seconds"] = spent + time.monotonic() - began
                due = state["step"] % self.config.evaluate_every == 0 or state["step"] == self.total
                if due:
                    self.evaluation(state)
                if due or time.monotonic() - saved >= self.config.save_seconds:
                    self.save(optimizers, state)
                    saved = time.monotonic()
        self.workers.wait()
        self.checkpoint.load_best(self.trained, state["best_step"])
        self.model.eval()
        history = [(int(step), float(metric)) for step, metric in state["history"]]
        kept = {k: state[k] for k in ("best", "start", "best_step", "tokens", "seconds")}
        return LoopResult(**kept, steps=state["step"], stopped_early=state["step"] < self.total, history=history)

    def start(self, optimizers: Optimizers) -> dict[str, Any]:
        """The state before the first step, on disk."""
        began = time.monotonic()
        tokens = self.before() if self.before else 0
        seconds = time.monotonic() - began if tokens else 0.0
        metric = self.evaluate()
        state: dict[str, Any] = {"step": 0, "tokens": tokens, "seconds": seconds, "best": metric, "start": metric}
        state |= {"best_step": 0, "history": [[0, metric]], "segment": [0.0, 0], "position": {}}
        state["arithmetic"] = {"precision": self.precision, "muon": muon_type(self.device, self.precision)}
        if self.workers.writes:
            atomic_write_text(self.curve, "")
            self.checkpoint.save_best(self.trained, 0)
        self.save(optimizers, state)
        return state

    def save(self, optimizers: Optimizers, state: dict[str, Any]) -> None:
        """The state as it is, on disk."""
        if self.workers.writes:
            self.checkpoint.save(self.trained, optimizers, state)

    def evaluate(self) -> float:
        """The metric as the weights stand: one worker measures, and all get the same number."""
        self.model.eval()
        with torch.no_grad(), self.autocast():
            found = self.measure() if self.workers.writes else 0.0
        self.model.train()
        return self.summed(found)

    def summed(self, value: float) -> float:
        """A number summed over the workers."""
        if self.workers.size == 1:
            return value
        return float(self.workers.sum(torch.tensor([value], dtype=torch.float64, device=self.device)))

    def ended(self, state: dict[str, Any]) -> bool:
        """Whether all steps are done, or patience is out."""
        patience = self.config.patience * self.config.evaluate_every
        return state["step"] >= self.total or 0 < patience <= state["step"] - state["best_step"]

    def advance(self, step: Step, optimizers: Optimizers, state: dict[str, Any], reporter: Progress | None) -> None:
        """One optimiser step and its entries in ``state``."""
        loss = self.step(step.parts, optimizers, state["step"])
        state["step"] += 1
        state["tokens"] += step.tokens
        state["position"] = step.position
        state["segment"] = [state["segment"][0] + loss, state["segment"][1] + 1]
        if reporter:
            reporter.update(
                state["tokens"], loss=loss, step=state["step"], **{self.metric: float(state["history"][-1][1])}
            )

    def evaluation(self, state: dict[str, Any]) -> None:
        """Measure, keep the weights if they are the best so far, and write the curve's line."""
        metric = self.evaluate()
        state["history"].append([state["step"], metric])
        better = self.sign * metric > self.sign * state["best"]
        if better:
            state["best"], state["best_step"] = metric, state["step"]
        total, count = state["segment"]
        state["segment"] = [0.0, 0]
        if not self.workers.writes:
            return
        if better:
            self.checkpoint.save_best(self.trained, state["step"])
        entry = {"step": state["step"], "tokens": state["tokens"], "seconds": round(state["seconds"], 1)}
        entry |= {"loss": total / count, self.metric: metric}
        append_text(self.curve, json.dumps(sealed(entry, CURVE, self.checkpoint.mark)) + "\n")

    def mend_curve(self, step: int) -> None:
        """Drop lines behind the checkpoint: a kill between the two would leave them there twice. Raises ``UserError``
        for one that is damaged or another run's."""
        if not there(self.curve):
            return
        mend = "delete that line (the curve is for the eye) and give the same command again"
        kept = ""
        for number, entry in json_lines(self.curve, finite=False, torn=True):
            where = f"{self.curve}:{number}"
            plain = unsealed(entry, where, mend, CURVE, self.checkpoint.mark) if isinstance(entry, dict) else entry
            if typed(Line, plain, where, mend).step <= step:
                kept += json.dumps(entry) + "\n"
        if kept.encode() != self.curve.read_bytes():
            atomic_write_text(self.curve, kept)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def step(self, parts: Sequence[Callable[[], Tensor]], optimizers: Optimizers, step: int) -> float:
        """Gradients of all parts, then one move of the weights; the step's loss. Raises ``UserError`` (see run)."""
        total = 0.0
        for number, part in enumerate(parts):
            # As one worker alone would number its parts.
            loss = self.loss(part, step, number * self.workers.size + self.workers.rank)
            loss.backward()
            total += float(loss.detach())
        sum_gradients((p for _, p in self.trained), self.workers)
        norm = float(torch.nn.utils.clip_grad_norm_([p for _, p in self.trained], self.config.clip))
        if not math.isfinite(norm):
            self.stop(f"the gradient became {norm}", step)
        config = self.config
        optimizers.step(learning_rate(step, self.total, config.learning_rate, config.warmup))
        return self.summed(total)

    def loss(self, part: Callable[[], Tensor], step: int, number: int = 0) -> Tensor:
        """The loss of a part of a step. What it draws is a function of seed, step and the part's number, so that a
        resumed run draws the same. Raises ``UserError`` when it is not finite."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), self.autocast():
            torch.manual_seed(random.Random(f"{self.config.seed}/{step}/{number}").getrandbits(63))
            loss = part()
        value = float(loss.detach())
        if not math.isfinite(value):
            self.stop(f"the loss became {value}", step)
        return loss

    def stop(self, what: str, step: int) -> None:
        """Raise the ``UserError`` of a run that cannot go on."""
        path = self.checkpoint.path
        good = read_json(path, finite=False)["state"]["step"] if there(path) else None
        kept = "" if good is None else f"the last good checkpoint is that of step {good} in {self.folder}; "
        raise UserError(f"{what} at step {step} of {self.total}; {kept}lower the learning rate")


# -- on disk, as it must be to be gone on with -------------------------------------------------------------------------
@dataclass
class Line:
    """A line of the training curve, as far as resuming asks."""

    step: NonNegativeInt


@dataclass
class State:
    """What a checkpoint says of the training; ``history`` lists (step, metric), where it is watched."""

    step: NonNegativeInt
    history: list[tuple[NonNegativeInt, float]] = field(default_factory=list)
    tokens: NonNegativeInt = 0
    seconds: NonNegativeFloat = 0.0
    best: float = 0.0
    start: float = 0.0
    best_step: NonNegativeInt = 0
    segment: tuple[float, float] = (0.0, 0)
    position: dict[str, Any] = field(default_factory=dict)


@dataclass
class Stored:
    """``state.json``."""

    identity: dict[str, Any]
    file: Annotated[str, Field(pattern=r"^state-\d+\.safetensors$")]
    state: State


# -- on disk ---------------------------------------------------------------------------------------------------------
class Checkpoint:
    """``state.json`` names the tensor file that belongs to it, so that no half-written pair is ever read."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Raises ``UserError`` when the folder holds a run of another config, or a damaged one."""
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.mark = digest(self.identity)
        use_folder(folder)
        self.path = folder / STATE_FILE
        self._mend = f"delete the folder {folder} and give the same command again, which trains anew"
        if there(self.path):
            stored = self._stored()["identity"]
            if OLD_DRAFT in self.identity and not stored.get(OLD_DRAFT):
                stored[OLD_DRAFT] = self.identity[OLD_DRAFT]  # most runs did not say it once
            if stored.keys() != self.identity.keys():
                raise UserError(f"{folder} was begun by another version of redraft; delete it to train anew")
            if stored != self.identity:
                changed = sorted(k for k in stored if stored[k] != self.identity[k])
                raise UserError(
                    f"{folder} belongs to a run with another {', '.join(changed)}; "
                    "give another run directory or the settings it was started with"
                )

    def _stored(self) -> dict[str, Any]:
        """``state.json``. Raises ``UserError`` when it is damaged; older ones have no seal, and the oldest nothing like
        it."""
        stored = read_sealed(self.path, SCHEMA, None, self._mend)
        check = stored.pop("checksum", None)
        typed(Stored, stored, f"{self.path} is damaged", self._mend)
        if not {"identity", "file", "state"} <= stored.keys() or check not in (None, digest(stored)):
            raise UserError(f"{self.path} is damaged: it no longer says what was written; {self._mend}")
        return stored

    def save(self, trained: Named, optimizers: Optimizers, state: dict[str, Any]) -> None:
        """Write weights, optimisers and ``state`` as one. Raises ``UserError`` on a full disk; the last one stays."""
        tensors: dict[str, torch.Tensor] = {f"weight/{name}": p for name, p in trained}
        tensors |= {f"optimizer/{key}": value for key, value in optimizers.state().items()}
        name = f"state-{state['step']:07d}.safetensors"
        write_checked(self.folder / name, tensors, run=self.mark, step=str(state["step"]))
        write_sealed(self.path, {"identity": self.identity, "file": name, "state": state}, SCHEMA)
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, trained: Named, optimizers: Optimizers) -> dict[str, Any] | None:
        """Restore weights and optimisers in place; ``None`` when there is nothing to resume.

        Raises ``UserError`` that names the damaged file, also for the best weights, which are read only at the end.
        """
        if not there(self.path):
            return None
        stored = self._stored()
        state = stored["state"]
        if (self.folder / BEST_FILE).exists() or state["step"] != state.get("best_step", state["step"]):
            self._best()  # of which step will be asked at the end: a kill may have left those of a later one
        tensors = read_checked(self.folder / stored["file"], self._mend, run=self.mark, step=str(state["step"]))
        self._copy("weight/", tensors, trained, stored["file"])
        prefix = "optimizer/"
        optimizers.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        return state

    def save_best(self, trained: Named, step: int) -> None:
        """Write the weights as they stand, after ``step`` steps, as the best so far. Raises ``UserError``."""
        write_checked(self.folder / BEST_FILE, dict(trained), run=self.mark, step=str(step))

    def load_best(self, trained: Named, step: int) -> None:
        """Put the best weights, those of ``step``, in place. Raises ``UserError`` when their file is damaged."""
        self._copy("", self._best(step=str(step)), trained, BEST_FILE)

    def _best(self, **known: str) -> dict[str, torch.Tensor]:
        return read_checked(self.folder / BEST_FILE, self._mend, run=self.mark, **known)

    def _copy(self, prefix: str, tensors: dict[str, torch.Tensor], trained: Named, file: str) -> None:
        if missing := sorted({prefix + name for name, _ in trained} - set(tensors)):
            raise UserError(f"{self.folder / file} is damaged: it lacks {missing[0]}; {self._mend}")
        with torch.no_grad():
            for name, parameter in trained:
                parameter.copy_(tensors[prefix + name])


def stored_identity(folder: Path) -> dict[str, Any] | None:
    """What the training in ``folder`` says it is; None where none has begun. Raises ``UserError``."""
    path = folder / STATE_FILE
    stored = read_json(path, finite=False) if there(path) else None
    found = stored.get("identity") if isinstance(stored, dict) else None
    return found if isinstance(found, dict) else None


def stored_precision(folder: Path, unrecorded: str) -> str | None:
    """The data type that the training in ``folder`` computes in; None where none has begun. Raises ``UserError``.

    ``unrecorded`` stands for that of a run of before this was recorded.
    """
    path = folder / STATE_FILE
    if not there(path):
        return None
    return str(read_json(path, finite=False)["state"].get("arithmetic", {}).get("precision", unrecorded))


def rows_digest(keys: list[str]) -> str:
    """A short fingerprint of which rows a run trains on."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16]
