"""Do sampled answers follow the target exactly, through the decoders themselves, with drafts that are wrong on purpose?

    python benchmarks/faults/draws.py --out benchmarks/results/faults-draws.json
    python benchmarks/faults/draws.py --plant "bonus from the draft"

Every decoder draws answers of up to four tokens from a target of twelve tokens (``drawing/world.py``), under three
samplers, with a draft that puts its mass where the target has little, one that is certain of one token, and a uniform
one. What the target can say is enumerated, so every test is against the exact distribution: whole answers, the first
token, the tokens behind an accepted one and behind a rejection, the bonus token, where answers end, the last token
that the limit allows, shorter limits, and whether rows that are decoded beside each other are independent
(``drawing/counting.py``). Plain sampling, which writes a draft's training text, is tested in the same way.

Published are all p-values, and the least one after Holm's correction for their number; exit status 1 where that is
below 0.01. ``--plant`` puts one fault (``drawing/plants.py``) into decoding and says what the tests make of it; exit
status 1 where the least p is not below a millionth. A whole run draws under every fault too.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# The batched decoder and this script's parts, from wherever it is started.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from losslessness import Log  # noqa: E402

from faults.drawing.counting import Tested, compared, every_test, holm, whole  # noqa: E402
from faults.drawing.drawn import DECODERS, WRITER, Draws, draws_of, written  # noqa: E402
from faults.drawing.plants import PLANTS  # noqa: E402
from faults.drawing.world import DRAFTS, LIMIT, PROMPTS, SAMPLERS, V, World, make_world  # noqa: E402
from redraft import provenance  # noqa: E402
from redraft.files import atomic_write_json  # noqa: E402
from redraft.settings.sampler import Sampler  # noqa: E402

# Of the draws of a cell so many more at each shorter limit.
SHORTER = 5
BELOW, PLANTED_BELOW = 0.01, 1e-6
# The target whose tokens depend most on what stands before the last one, among the first few seeds.
TARGET = 6
EVERY = (*DECODERS, WRITER)


@dataclass(frozen=True)
class Job:
    """One decoder under one sampler with one draft, or plain sampling under all of them; with a fault or without."""

    decoder: str
    sampler: int
    draft: str
    draws: int
    seed: int
    plant: str = ""


def jobs_of(decoders: Sequence[str], draws: int, single: int, seed: int) -> list[Job]:
    """The honest jobs. Decoders of one sequence at a time, which are dear, share ``single`` draws a sampler among the
    drafts; batches draw ``draws`` with every draft."""
    found = []
    for decoder in decoders:
        if decoder == WRITER:
            found.append(Job(decoder, -1, "none", draws, seed))
            continue
        for sampler in range(len(SAMPLERS)):
            for draft in DRAFTS:
                count = draws if decoder == "batched" else -(-single // len(DRAFTS))
                # Seeds of different cells do not meet, and those of a cell are the same whichever others run.
                cell = (EVERY.index(decoder) * len(SAMPLERS) + sampler) * len(DRAFTS) + DRAFTS.index(draft)
                found.append(Job(decoder, sampler, draft, count, (seed * 1000 + cell) * 1_000_000))
    return found


def planted_jobs(names: Sequence[str], draws: int, seed: int) -> list[Job]:
    """For every fault and decoder that shows it, one job."""
    return [
        Job(decoder, PLANTS[name].sampler, PLANTS[name].draft, draws, (seed * 1000 + 900) * 1_000_000, name)
        for name in names
        for decoder in PLANTS[name].decoders
    ]


def run(job: Job) -> list[dict[str, Any]]:
    """The tests of one job, as rows of the result file."""
    world = make_world(TARGET)
    if not job.plant:
        return list(rows(job, world))
    try:
        with PLANTS[job.plant].planted():
            return list(rows(job, world))
    except (IndexError, ValueError) as error:  # a fault may break a decoder outright, and that is no test's finding
        raise RuntimeError(f"{job.plant}: {error}") from error


def timed(job: Job) -> dict[str, Any]:
    """The tests of one job and the processor's seconds that it took."""
    began = time.process_time()
    return {"tests": run(job), "seconds": time.process_time() - began}


def rows(job: Job, world: World) -> Iterator[dict[str, Any]]:
    """Draw at every limit and test."""
    for limit in (LIMIT, *range(2, LIMIT)):
        count, seed = (
            (job.draws, job.seed) if limit == LIMIT else (job.draws // SHORTER, job.seed + limit * 100_000_000)
        )
        found: dict[Sampler, Draws]
        if job.decoder == WRITER:
            found = written(world, count, limit, seed)
        else:
            sampler = SAMPLERS[job.sampler]
            found = {sampler: draws_of(job.decoder, world, sampler, job.draft, count, limit, seed)}
        for sampler, draws in found.items():
            probs = world.probs(sampler)
            tests = every_test(draws, probs) if limit == LIMIT else compared(f"limit of {limit}", *whole(draws, probs))
            for tested in tests:
                yield row(job, sampler, tested, count) | {"ended_inside": draws.ended_inside}


def row(job: Job, sampler: Sampler, tested: Tested, count: int) -> dict[str, Any]:
    """One line of the result file; ``counted`` are the draws that entered the test."""
    cell = {"decoder": job.decoder, "sampler": sampler.describe(), "draft": job.draft, "draws": count}
    told = asdict(tested)
    if not math.isfinite(tested.statistic):  # what cannot be was drawn; JSON has no infinity
        told["statistic"] = None
    return ({"plant": job.plant} if job.plant else {}) | cell | told


def least(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every fault and decoder the test that sees it best."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for one in found:
        key = one["plant"], one["decoder"]
        if key not in best or one["p"] < best[key]["p"]:
            best[key] = one
    return list(best.values())


def summary(found: Sequence[dict[str, Any]], planted: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result file without its provenance."""
    ps = [one["p"] for one in found]
    for one, corrected in zip(found, holm(ps), strict=True):
        one["p_corrected"] = corrected
    return {
        "schema": "redraft.draws/1",
        "setup": {
            "vocabulary": V,
            "limit": LIMIT,
            "prompts": PROMPTS,
            "target_seed": TARGET,
            "correction": "Holm over all tests",
        },
        "tests": len(ps),
        "share_below_0.05": sum(p < 0.05 for p in ps) / max(1, len(ps)),
        "least_p": min(ps, default=1.0),
        "least_p_corrected": min((one["p_corrected"] for one in found), default=1.0),
        "planted_greatest_p": max((one["p"] for one in planted), default=None),
        "draws": list(found),
        "planted": list(planted),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoders", default=",".join(EVERY), help="which of them to run, with commas between (all)")
    parser.add_argument("--draws", type=int, default=30_000, help="draws of each sampler and draft in batches (30000)")
    parser.add_argument(
        "--single-draws", type=int, default=30_000, help="draws of each sampler, one sequence at a time (30000)"
    )
    parser.add_argument("--planted-draws", type=int, default=3_000, help="draws under each fault (3000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant", choices=list(PLANTS), metavar="NAME", help=f"one of: {'; '.join(PLANTS)}")
    parser.add_argument("--work", type=Path, help="keeps what is finished here; the same command goes on from it")
    parser.add_argument("--out", type=Path, help="the result file")
    options = parser.parse_args()
    options.decoders = options.decoders.split(",")
    unknown = [name for name in options.decoders if name not in EVERY]
    if unknown:
        parser.error(f"there is no decoder {unknown[0]!r}; known: {', '.join(EVERY)}")
    return options


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    found, planted = list[dict[str, Any]](), list[dict[str, Any]]()
    jobs = planted_jobs([options.plant] if options.plant else list(PLANTS), options.planted_draws, options.seed)
    if not options.plant:
        jobs = jobs_of(options.decoders, options.draws, options.single_draws, options.seed) + jobs
    log = Log(options.work / "draws.jsonl", {"target": TARGET}) if options.work else None
    seconds = 0.0
    for number, job in enumerate(jobs, 1):
        done = log.once(str(job), lambda: timed(job)) if log else timed(job)  # noqa: B023
        (planted if job.plant else found).extend(done["tests"])
        seconds += done["seconds"]
        worst = min(done["tests"], key=lambda one: one["p"])
        name = f"{job.plant or job.draft}, {job.decoder}, {worst['sampler']}"
        print(f"{number} of {len(jobs)}: {name}: least p {worst['p']:.2g} ({worst['test']})", flush=True)
    result = {"provenance": provenance.collect(options.seed, "cpu")} | summary(found, least(planted))
    result["processor_seconds"] = round(seconds, 1)
    if options.out:
        atomic_write_json(options.out, result)
    print(f"{result['tests']} tests, least p {result['least_p']:.2g}, corrected {result['least_p_corrected']:.2g}")
    seen = all(one["p"] < PLANTED_BELOW for one in result["planted"])
    return 0 if seen and result["least_p_corrected"] >= BELOW else 1


if __name__ == "__main__":
    sys.exit(main())
