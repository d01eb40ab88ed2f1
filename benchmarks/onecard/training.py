"""Training on the device: the same step twice, a run that stops and goes on, a process group of one, and the gradients
of the unroll beside the same in float64 on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.common import RandomFeatures, Section, Shape, make_draft, make_head, make_rows
from redraft.drafts.groups import prepare
from redraft.progress import Progress
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.training.optimizer import make_optimizers
from redraft.training.trainer import Trainer
from redraft.training.workers import SINGLE, Workers, backend

SHAPE = Shape(512, 8, 4, 1024, 4096, 2048)
TINY = Shape(32, 4, 2, 64, 128, 64)
CONFIG = TrainConfig(epochs=2, batch_anchors=700, evaluate_every=3, learning_rate=1e-3, patience=0, save_seconds=0)
# How far loss and gradients may be from those in float64, of their length.
CLOSE = {"float32": 1e-4, "bfloat16": 5e-2}


class Stopped(Exception):
    """Somebody ends the run."""


class StopAt(Progress):
    """Ends a run in the middle."""

    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, done: int, **fields: Any) -> None:
        if fields.get("step") == self.step:
            raise Stopped


class Rig:
    """A head, rows with features, and trainers over them."""

    def __init__(self, section: Section, dtype: str) -> None:
        self.section, self.shape = section, TINY if section.tiny else SHAPE
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.head = make_head(self.shape, section.device, self.dtype)
        lengths = (9, 14, 23, 40) if section.tiny else (60, 130, 250, 400, 90, 310)
        self.rows = make_rows(lengths, self.shape.draft_vocabulary)
        self.features = RandomFeatures(self.shape, section.device, self.dtype)

    def trainer(self, folder: str, method: str = "lora", workers: Workers = SINGLE) -> Trainer:
        draft, _ = prepare(make_draft(self.shape, self.section.device), method, PrivateSize(rank=8))
        config = replace(CONFIG, batch_anchors=40) if self.section.tiny else CONFIG
        place = Path(self.section.work) / folder
        return Trainer(draft, self.head, self.features, self.rows[1:], self.rows[:1], config, place, workers=workers)


def run(section: Section) -> None:
    for dtype, method in (("float32", "lora"), ("bfloat16", "lora"), ("bfloat16", "full")):
        section.attempt(f"a step twice, {method} in {dtype}", lambda: twice(Rig(section, dtype), method))  # noqa: B023
    for dtype in ("float32", "bfloat16"):
        section.attempt(f"stopped and gone on with, in {dtype}", lambda: resumed(Rig(section, dtype), dtype))  # noqa: B023
    section.attempt("a process group of one", lambda: group_of_one(Rig(section, "float32")))
    for dtype in ("float32", "bfloat16"):
        section.attempt(f"unroll beside float64, in {dtype}", lambda: beside(Rig(section, dtype), dtype))  # noqa: B023
    section.attempt("fused attention", lambda: fused(section))


# -- bits --------------------------------------------------------------------------------------------------------------
def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    """Whether all tensors are equal to the last bit, and how far they are apart at most."""
    apart = {name: float((one[name].double() - other[name].double()).abs().max()) for name in one}
    return {"same_bits": not any(apart.values()), "apart_at_most": max(apart.values())}


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.trained}


def one_step(rig: Rig, folder: str, method: str) -> dict[str, Tensor]:
    """The weights behind one optimiser step from the same start."""
    trainer = rig.trainer(folder, method)
    optimizers = make_optimizers(trainer.trained, trainer.config.optimizer, trainer.config.weight_decay)
    step = next(trainer.steps(0, {}))
    trainer.loop.step(step.parts, optimizers, 0)
    return weights(trainer)


def twice(rig: Rig, method: str) -> dict[str, Any]:
    """The same step twice; where the bits differ, once more with torch's own repeatable kernels."""
    found = same_bits(one_step(rig, "one", method), one_step(rig, "other", method))
    if not found["same_bits"]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            again = same_bits(one_step(rig, "third", method), one_step(rig, "fourth", method))
        finally:
            torch.use_deterministic_algorithms(False)
        found["with_repeatable_kernels"] = again
    return found


def resumed(rig: Rig, dtype: str) -> dict[str, Any]:
    """A whole run beside one that was stopped behind a step. The checkpoint must give back what it was given; whether
    the bits are those of the whole run is what the device's kernels allow."""
    whole = rig.trainer("whole")
    result = whole.run()
    first = rig.trainer("stopped")
    stop = max(2, result.steps // 2)
    try:
        first.run(StopAt(stop))
    except Stopped:
        pass
    second = rig.trainer("stopped")
    other = second.run()
    found = same_bits(weights(whole), weights(second))
    found |= {"steps": result.steps, "stopped_in_step": stop, "held_out_tau": [result.best_tau, other.best_tau]}
    close = found["apart_at_most"] <= (1e-4 if dtype == "float32" else 1e-2)
    return found | {"holds": other.steps == result.steps and close}


def group_of_one(rig: Rig) -> dict[str, Any]:
    """Collectives of the kinds that training uses, and a run within the group beside one without."""
    alone = rig.trainer("alone")
    alone.run()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend(), store=store, rank=0, world_size=1)
    try:
        kept = True
        for device, dtype in (
            ("cpu", torch.float32),
            (rig.section.device, torch.float32),
            (rig.section.device, torch.float64),
        ):
            numbers = torch.arange(1000, device=device, dtype=dtype)
            summed = numbers.clone()
            torch.distributed.all_reduce(summed)
            torch.distributed.broadcast(summed, 0)
            kept &= torch.equal(summed, numbers)
        torch.distributed.barrier()
        within = rig.trainer("within", workers=Workers.present())
        within.run()
    finally:
        torch.distributed.destroy_process_group()
    found = same_bits(weights(alone), weights(within))
    return {"backend": backend(), "collectives": kept} | found | {"holds": kept and found["apart_at_most"] <= 1e-4}


# -- the unroll --------------------------------------------------------------------------------------------------------
def beside(rig: Rig, dtype: str) -> dict[str, Any]:
    """Loss and gradients on the device, and of the same weights, features and rows in float64 on the CPU."""
    trainer = rig.trainer("beside", "full")
    batch = trainer.objective.collate(rig.rows, rig.features)
    with trainer.loop.autocast():
        loss = trainer.objective(batch.to(rig.section.device))
    loss.backward()
    exact = copy.deepcopy(trainer.draft).cpu().double()
    exact.zero_grad(set_to_none=True)
    head = copy.deepcopy(rig.head)
    for part in (head.embedding, head.norm, head.head):
        part.to("cpu", torch.float64)
    precise = replace_tensors(batch)
    twin = exact.objective(head, trainer.config)(precise)
    twin.backward()
    apart, lengths = [], []
    for (_, ours), (_, theirs) in zip(trainer.draft.named_parameters(), exact.named_parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        apart.append(float((ours.grad.cpu().double() - theirs.grad).norm()))
        lengths.append(float(theirs.grad.norm()))
    relative = {
        "loss": abs(float(loss.detach()) - float(twin.detach())) / abs(float(twin.detach())),
        "gradients": sum(a**2 for a in apart) ** 0.5 / sum(n**2 for n in lengths) ** 0.5,
    }
    return {"apart_of_their_length": relative, "holds": max(relative.values()) <= CLOSE[dtype]}


def replace_tensors(batch: Any) -> Any:
    """The batch on the CPU, its numbers in float64."""
    moved = {name: value.cpu() if torch.is_tensor(value) else value for name, value in vars(batch).items()}
    doubled = {name: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in moved.items()}
    return replace(batch, **doubled)


def fused(section: Section) -> dict[str, Any]:
    """Whether the fused attention of long rows, where there is one, may be used here, by type and width of a head."""
    try:
        from redraft.drafts.eagle import flex
    except ImportError:
        return {"skipped": "this checkout has no fused attention"}
    if not section.cuda:
        return {"skipped": "it is used on CUDA alone"}
    widths = (64, 128)
    return {
        f"{str(dtype).removeprefix('torch.')}, heads of {width}": flex.usable(section.device, dtype, width)
        for dtype in (torch.float32, torch.bfloat16)
        for width in widths
    }
