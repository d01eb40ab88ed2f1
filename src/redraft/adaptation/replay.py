"""On-policy replay after the first training: walk the present draft's rounds, train where they were lost, again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from redraft import provenance
from redraft.adaptation.stages import Say, run_training
from redraft.artifact import atomic_write_json, read_checked, read_json, write_checked
from redraft.data.store import Row
from redraft.features.store import FeatureStore
from redraft.progress import progress_bar
from redraft.rows import anchors
from redraft.target import Target
from redraft.train.replay import ReplayConfig, ReplayTrainer, replay_settings, replay_states
from redraft.train.trainer import TrainConfig, TrainResult

STATES_FILE, SUMMARY_FILE = "states.safetensors", "states.json"


def replay(
    draft: Any,
    target: Target,
    store: FeatureStore,
    rows: Sequence[Row],
    heldout: Sequence[Row],
    config: TrainConfig,
    settings: ReplayConfig,
    folder: Path,
    ledger: provenance.Ledger,
    say: Say = print,
) -> tuple[Any, list[TrainResult]]:
    """(draft, results of the passes). ``draft`` comes from the first training, with its trained parameters marked.

    Each pass walks the rounds of the draft as it then is, and trains in a folder of its own below ``folder``. A pass
    ends with the weights of its best held-out evaluation, its start among them, so it cannot make that figure worse.
    A killed run goes on. Features of all rows must be in ``store``. Raises ``UserError``.
    """
    results = []
    for number in range(1, settings.passes + 1):
        place = folder / f"pass-{number}"
        states = _states(draft, target, store, rows, config.gamma, settings, place, ledger, say)
        if not states:
            say("replay: every round went through; nothing is left to train on")
            break
        trainer = ReplayTrainer(
            draft, target, store, rows, heldout, replay_settings(config, settings), place / "train", states
        )
        results.append(run_training(trainer, ledger, say))
        draft = trainer.draft
    return draft, results


def _states(
    draft: Any,
    target: Target,
    store: FeatureStore,
    rows: Sequence[Row],
    gamma: int,
    settings: ReplayConfig,
    folder: Path,
    ledger: provenance.Ledger,
    say: Say,
) -> dict[str, Tensor]:
    """The weights of a pass, walked once and kept: a resumed pass must train on the states it began with."""
    path = folder / STATES_FILE
    if (folder / SUMMARY_FILE).exists():
        mend = f"delete the folder {folder} and give the same command again, which walks anew"
        return read_checked(path, mend) if read_json(folder / SUMMARY_FILE)["rows"] else {}
    folder.mkdir(parents=True, exist_ok=True)
    draft.eval()
    with ledger.stage("replay walk") as entry, progress_bar("replay walk", sum(map(anchors, rows))) as progress:
        found = replay_states(draft, target, rows, store, gamma, settings, progress=progress)
        tokens = sum(map(anchors, rows)) * gamma
        flops = provenance.forward_flops(draft.parameters_per_token, tokens)
        entry.add(tokens, flops, provenance.FORWARD_FORMULA)
    draft.train()
    if found.weights:
        write_checked(path, found.weights)
    record = {"rounds": found.rounds, "lost_rounds": found.lost_rounds, "rows": len(found.weights)}
    atomic_write_json(folder / SUMMARY_FILE, record)
    say(f"replay: {found.summary()}")
    return found.weights
