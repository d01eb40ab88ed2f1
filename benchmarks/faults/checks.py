"""What it costs to look at fingerprints: training on stored features, with and without, in turns.

    python benchmarks/faults/checks.py --work out/checks --out benchmarks/results/faults-checks.json

A repetition trains the same draft on the same stored features twice, once as it is and once without fingerprints (those
of features taken for right unseen, none made of checkpoints or looked at), in an order that alternates; what is told is
the ratio of their seconds (of processor time and of the clock), its median, its quarters and its range, and the time of
a fingerprint over a gibibyte.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import rig
import torch

from redraft import artifact, features, provenance
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.groups import prepare
from redraft.features import FeatureStore
from redraft.files import atomic_write_json
from redraft.rows import anchors
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.target import Target
from redraft.training.trainer import Trainer

SCHEMA = "redraft.checks/1"
# A model whose features weigh something: 12 KB a token.
SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(options.work, ignore_errors=True)
    target = Target(rig.TINY["build_model"]("llama", 0, **SHAPE), rig.TINY["build_tokenizer"](), taps=(1, 3, 5))
    rows = made_rows(options.rows)
    store = FeatureStore(options.work / "features", {})
    store.build(target, rows)
    size = sum(path.stat().st_size for path in (options.work / "features").glob("shard-*"))
    draft, pairs = fresh_draft(target, range(0, 100), seed=1), []
    for number in range(options.repeats):
        found: dict[bool, dict[str, float]] = {}
        for checked in (True, False) if number % 2 else (False, True):
            found[checked] = trained(options.work, target, draft, rows, checked)
        pairs.append({"with": found[True], "without": found[False]})
        print(number, pairs[-1], flush=True)
    ratios = {kind: [pair["with"][kind] / pair["without"][kind] for pair in pairs] for kind in ("processor", "clock")}
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": provenance.collect(0, "cpu"),
        "bytes_of_features": size,
        "seconds_a_gibibyte": seconds_a_gibibyte(),
        "pairs": pairs,
        "ratio": {kind: spread(all_) for kind, all_ in ratios.items()},
    }
    if options.out is not None:
        atomic_write_json(options.out, result)
    print(result["ratio"], result["seconds_a_gibibyte"])
    sys.exit(0 if result["ratio"]["processor"]["median"] < 1.02 else 1)


def made_rows(count: int) -> list[Any]:
    """Rows of 48 prompt and 96 response tokens, none of them what a model said."""
    from redraft.data.store import Row

    order = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 100, (count, 144), generator=order).tolist()
    rows = [Row(f"r{n}", ids[:48], ids[48:], 0.0, 0, 1.0, 0, "length", "") for n, ids in enumerate(tokens)]
    return [row for row in rows if anchors(row)]


def trained(work: Path, target: Target, draft: Any, rows: list[Any], checked: bool) -> dict[str, float]:
    """Seconds of a whole training that opens the store anew."""
    shutil.rmtree(work / "train", ignore_errors=True)
    ready, _ = prepare(copy.deepcopy(draft), "fc", PrivateSize())
    config = TrainConfig(epochs=2, batch_anchors=768, evaluate_every=8, save_seconds=1e9)
    with nullcontext() if checked else unseen():
        began, clock = time.process_time(), time.monotonic()
        store = FeatureStore(work / "features", {})
        Trainer(ready, target, store, rows[:-4], rows[-4:], config, work / "train").run()
        return {"processor": time.process_time() - began, "clock": time.monotonic() - clock}


@contextmanager
def unseen() -> Iterator[None]:
    """Nothing is fingerprinted: not the features that are read, not the checkpoints that are written and read."""
    with (
        mock.patch.object(features.FeatureStore, "_is_sound", lambda self, *_: True),
        mock.patch.object(artifact, "tensors_hash", lambda _: "0" * 16),
    ):
        yield


def spread(ratios: list[float]) -> dict[str, Any]:
    """Median, quarters and ends of the ratios."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": middle, "quarters": [low, high], "range": [min(ratios), max(ratios)]}


def seconds_a_gibibyte() -> float:
    """Processor seconds of a fingerprint over a gibibyte."""
    state = {"x": torch.ones(2**26, dtype=torch.uint8)}
    began = time.process_time()
    artifact.tensors_hash(state)
    return (time.process_time() - began) * 2**30 / 2**26


if __name__ == "__main__":
    main()
