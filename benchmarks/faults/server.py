"""A server that talks nonsense now and then: does it end a run, leave a wrong row, hang, or come through as a trace?

    python benchmarks/faults/server.py --state out/faults-server.jsonl --out benchmarks/results/faults-server.json

A server of our own on the loopback (``answering/honest.py``) spoils a share of what it says, in one way a run
(``answering/kinds.py``): "once" is the first answer alone, then a tenth, a half, and all of them. Whether an answer is
spoiled is drawn from the seed, the prompt and how often it was asked. The doors: "regenerate" and "adapt" (with
``--server``), "bench" (one request at a time, and two), "check" (how the server reads prompts, and its counters), and
"scores" (the log-probabilities that ``distill`` asks for), and "pool" (two servers, one of which stays honest: rows
that are lost or doubled are wrong too). Requests have a second and three attempts.

Counted are: ``ended``, runs that one odd answer ended, or none; ``bad_rows``, kept rows, figures and findings that are
not those of the honest server; ``tracebacks``; ``hangs``, runs of more than 20 s, in which waiting for a processor that
others use does not count (``waited_seconds``). What may end a run are many odd answers: a server that says nothing
right (rate 1), a benchmark of which too many requests failed. Such runs end in one line and are counted as ``stopped``,
or they list what failed. Exit status 1 where anything is counted that should not be. What is done is kept in the state
file, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from faults.answering.honest import MODELS, Front, answer, scores  # noqa: E402
from faults.answering.kinds import Kind, every_kind  # noqa: E402
from redraft import provenance  # noqa: E402
from redraft.adaptation import sources  # noqa: E402
from redraft.adaptation.adapt import AdaptRun  # noqa: E402
from redraft.adaptation.check import served  # noqa: E402
from redraft.data import transport  # noqa: E402
from redraft.data.prompts import prompt_messages  # noqa: E402
from redraft.data.regenerate import regenerate  # noqa: E402
from redraft.data.server import ServerEngine, ask_tops  # noqa: E402
from redraft.data.shapes import Conversation  # noqa: E402
from redraft.data.store import Row, read_rows  # noqa: E402
from redraft.data.template import template_ids  # noqa: E402
from redraft.drafts.eagle3 import fresh_draft  # noqa: E402
from redraft.drafts.files import save_draft  # noqa: E402
from redraft.errors import UserError  # noqa: E402
from redraft.evaluate.load import ServerConfig  # noqa: E402
from redraft.evaluate.server import bench_servers  # noqa: E402
from redraft.evaluate.speed import Prompt  # noqa: E402
from redraft.files import atomic_write_json  # noqa: E402
from redraft.loading import tokenizer_hash  # noqa: E402
from redraft.settings.runs import AdaptConfig  # noqa: E402
from redraft.settings.sampler import Sampler  # noqa: E402
from redraft.target import Target  # noqa: E402

SECONDS, TIMEOUT, LIMIT, COUNT = 20.0, 1.0, 12, 8
ONCE, RATES = "once", (0.1, 0.5, 1.0)
SHORT: dict[str, Any] = {"concurrency": 4, "timeout": TIMEOUT, "attempts": 3, "backoff": 0.01}
MANY = [Conversation(f"t{i}", [{"role": "user", "content": f"question {i} of {i * i}"}]) for i in range(2 * COUNT)]
TALKS = MANY[:COUNT]  # "adapt" holds some back, and needs more


class World:
    """The tiny target that the honest server stands for, on disk and opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = Target(MODELS.build_model("llama", 0), MODELS.build_tokenizer(), name="tiny", taps=(1, 3, 5))
        self.target.save(folder / "target")
        meta = {
            "target": {"name": "tiny", "hash": self.target.content_hash()},
            "tokenizer_hash": tokenizer_hash(self.target.tokenizer),
        }
        save_draft(folder / "draft", fresh_draft(self.target, range(0, 60), seed=1), meta)
        lines = [json.dumps({"id": talk.id, "messages": talk.messages}) for talk in MANY]
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        # what a process does once is done here, and not in every child
        transport._certificates()
        assert all(map(importlib.import_module, ("redraft.data.wire", "prometheus_client.parser")))
        tokenizer = self.target.tokenizer
        self.prompts = [Prompt(t.id, template_ids(tokenizer, t.id, prompt_messages(t, ()))) for t in TALKS]


# -- doors: each gives the number of things kept that are wrong ------------------------------------------------------
def wrong_rows(path: Path, limit: int) -> int:
    wrong = 0
    for row in read_rows(path) if path.exists() and path.stat().st_size else []:
        ids, reason, _ = answer(row.prompt_ids, limit)
        wrong += (row.response_ids, row.finish_reason) != (ids, reason)
    return wrong


def regenerated(world: World, front: Front, folder: Path) -> Callable[[], int]:
    path = folder / "rows.jsonl"
    engine = ServerEngine(front.url, vocab_size=128, **SHORT)
    yield_ = partial(wrong_rows, path, LIMIT)
    _run(lambda: regenerate(engine, TALKS, world.target, [Sampler()], path, LIMIT), yield_)
    return yield_


def pooled(world: World, front: Front, folder: Path) -> Callable[[], int]:
    path, honest = folder / "rows.jsonl", Front(None, 0.0, 0)
    engine = ServerEngine([honest.url, front.url], vocab_size=128, **SHORT)

    def wrong() -> int:
        return wrong_rows(path, LIMIT)

    def work() -> None:
        regenerate(engine, MANY, world.target, [Sampler()], path, LIMIT)

    _run(work, wrong)
    keys = Counter(row.id for row in read_rows(path))
    return lambda: wrong() + sum(keys[talk.id] != 1 for talk in MANY)


def _run(work: Callable[[], Any], wrong: Callable[[], int]) -> None:
    """The work; where it ends with one line, what it kept is looked at all the same."""
    try:
        work()
    except UserError as error:
        error.wrong = wrong()  # type: ignore[attr-defined]
        raise


def adapted(world: World, front: Front, folder: Path) -> Callable[[], int]:
    sources.ServerEngine = partial(ServerEngine, **{k: v for k, v in SHORT.items() if k != "concurrency"})  # type: ignore[misc]
    values: dict[str, Any] = {
        "target": str(world.folder / "target"),
        "draft": str(world.folder / "draft"),
        "prompts": str(world.folder / "prompts.jsonl"),
        "out": folder / "run",
        "server": front.url,
        "dtype": "float32",
        "batch_size": 4,
        "max_new_tokens": LIMIT,
        "bench_prompts": 1,
        "bench_tokens": 4,
        "heldout_prompts": 3,
        "rank": 4,
        "gamma": 2,
        "train": {"epochs": 1, "batch_anchors": 128},
        "exports": (),
    }
    wrong = partial(wrong_rows, folder / "run" / "responses.jsonl", LIMIT)
    _run(lambda: AdaptRun(AdaptConfig(**values), lambda text: None).run(), wrong)
    return wrong


def benched(world: World, front: Front, folder: Path) -> Callable[[], int]:
    plain = Front(None, 0.0, 0, drafting=False)
    config = ServerConfig(max_new_tokens=LIMIT, timeout=TIMEOUT, concurrencies=(1, 2), eos_ids=(2,), vocab_size=128)
    result = bench_servers({"plain": plain.url, "new": front.url}, world.prompts, config, "tiny", {})

    def wrong() -> int:
        found, prompts = 0, {prompt.id: prompt.ids for prompt in world.prompts}
        for line in result["per_prompt"]:
            ids, _, accepted = answer(prompts[line["id"]], LIMIT)
            told = line["drafts"]["new"]
            said = (told["tokens"], told["rounds"], told["accepted_tokens"])
            found += said != (len(ids), len(accepted), sum(accepted))
        return found

    return wrong


def checked(world: World, front: Front, folder: Path) -> Callable[[], int]:
    connection, model = served.connected(front.url, None)
    messages = [prompt_messages(talk, ()) for talk in TALKS]
    connection.timeout = TIMEOUT
    faults, notes = served.read_prompts(connection, model, world.prompts, messages, world.target.tokenizer)
    connection.close()
    config = ServerConfig(max_new_tokens=LIMIT, timeout=TIMEOUT, eos_ids=(2,), vocab_size=128)
    session = served.open_session(front.url, config, world.prompts)
    found = served.ask(session, world.prompts)
    session.close()
    prompts = {f"{prompt.id}@T0": prompt.ids for prompt in world.prompts}
    honest = {key: answer(ids, LIMIT) for key, ids in prompts.items()}
    bad = sum(told.ids != honest[key][0] for key, told in found.answers.items())
    bad += sum(c.rounds != len(honest[key][2]) for key, c in found.counted.by_key.items())
    return lambda: bad + len(faults) + len(notes)


def scored(world: World, front: Front, folder: Path) -> Callable[[], int]:
    rows = []
    for prompt in world.prompts:
        ids, reason, _ = answer(prompt.ids, LIMIT)
        rows.append(Row.of(prompt.id, prompt.ids, ids, Sampler(), reason, "cafe"))
    path = folder / "tops.jsonl"
    engine = ServerEngine(front.url, vocab_size=128, **SHORT)

    def wrong() -> int:
        found = 0
        for line in path.read_text().splitlines() if path.exists() else []:
            said = json.loads(line)
            row = next(row for row in rows if row.key == said["key"])
            honest = scores([*row.prompt_ids, *row.response_ids], 4)[len(row.prompt_ids) + 1 :]
            ids = [[int(i) for i in entry or {}] for entry in honest]
            found += said["top"] != [ids, [[e["logprob"] for e in (entry or {}).values()] for entry in honest]]
        return found

    _run(lambda: ask_tops(engine, 4, rows, path), wrong)
    return wrong


DOORS = {
    "regenerate": regenerated,
    "scores": scored,
    "bench": benched,
    "check": checked,
    "adapt": adapted,
    "pool": pooled,
}


def applies(door: str, kind: Kind) -> bool:
    """Whether a door ever asks for what this kind spoils."""
    if kind.door == "metrics":
        return door in ("bench", "check")
    if kind.scored or door == "scores":
        return door == "scores" and (kind.scored or kind.raw is not None or kind.door == "models")
    return not (kind.whole and door in ("bench", "check"))


# -- one run, in a process of its own ----------------------------------------------------------------------------------
def outcome(world: World, door: str, kind: Kind, rate: float | str, seed: int, folder: Path) -> dict[str, Any]:
    """How a run ends, in the process that is there for it."""
    front = Front(kind, 1.0, seed, most=1) if rate == ONCE else Front(kind, float(rate), seed)
    found: dict[str, Any] = {"end": "done", "said": "", "bad": 0}
    try:
        found["bad"] = DOORS[door](world, front, folder)()
    except UserError as error:
        found |= {"end": "stopped", "said": str(error)[:300], "bad": getattr(error, "wrong", 0)}
        if len(str(error).splitlines()) > 1:
            found["end"] = "traceback"
    except BaseException:
        found |= {"end": "traceback", "said": traceback.format_exc()[-2000:]}
    front.stop()
    return found | {"odd": front.odd}


def waited(process: int) -> float:
    """Seconds that the thread of a process which waited longest for a processor did so. A hang waits for other things,
    or has one; 0 where the system does not say."""
    found = [0]
    with suppress(OSError, ValueError, IndexError):
        for task in Path(f"/proc/{process}/task").iterdir():
            found.append(int((task / "schedstat").read_text().split()[1]))
    return max(found) / 1e9


def run(world: World, door: str, kind: Kind, rate: float | str, seed: int) -> dict[str, Any]:
    """The outcome of a run in a child, which is ended when it takes longer than it may."""
    folder = Path(tempfile.mkdtemp(prefix="redraft-faults-"))
    began, place, starved = time.monotonic(), folder / "outcome.json", 0.0
    child = os.fork()
    if child == 0:
        began = time.process_time()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            found = outcome(world, door, kind, rate, seed, folder)
            place.write_text(json.dumps(found | {"cpu_seconds": round(time.process_time() - began, 2)}))
        finally:
            os._exit(0)
    ended, look = 0, SECONDS
    while not ended and time.monotonic() - began < SECONDS + starved:
        ended = os.waitpid(child, os.WNOHANG)[0]
        time.sleep(0.01)
        if not ended and time.monotonic() - began > look:
            starved, look = max(starved, waited(child)), look + 1
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    lost = {"end": "hang" if not ended else "traceback", "said": "", "bad": 0, "odd": 0}
    found = json.loads(place.read_text()) if place.exists() and ended else lost
    shutil.rmtree(folder, ignore_errors=True)
    what = {"door": door, "kind": kind.name, "rate": rate, "seed": seed}
    took = {"seconds": round(time.monotonic() - began, 2)} | ({"waited_seconds": round(starved, 2)} if starved else {})
    return what | found | took


# -- all of them -------------------------------------------------------------------------------------------------------
def plan(doors: list[str], seeds: list[int], rates: list[float | str]) -> Iterator[tuple[str, Kind, float | str, int]]:
    for door in doors:
        kinds = [kind for kind in every_kind() if applies(door, kind)]
        yield from ((door, kind, rate, seed) for seed in seeds for rate in rates for kind in kinds)


def summary(runs: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """The result: totals, and how runs ended by door and kind."""
    by: dict[str, dict[str, Any]] = {}
    for one in runs:
        place = by.setdefault(one["door"], {}).setdefault(one["kind"], Counter())
        place.update({one["end"]: 1, "bad_rows": one["bad"], "odd_answers": one["odd"]})
    ended = [one for one in runs if one["end"] == "stopped" and one["odd"] <= 1]
    return {
        "schema": "redraft.faults-server/1",
        "provenance": provenance.collect(seeds[0], "cpu"),
        "kinds": len({one["kind"] for one in runs}),
        "rates": list(dict.fromkeys(one["rate"] for one in runs)),
        "runs": len(runs),
        "odd_answers": sum(one["odd"] for one in runs),
        "ended": len(ended),
        "bad_rows": sum(one["bad"] for one in runs),
        "tracebacks": sum(one["end"] == "traceback" for one in runs),
        "hangs": sum(one["end"] == "hang" for one in runs),
        "slowest_seconds": max(one["seconds"] for one in runs),
        "stopped": {
            str(rate): sum(o["end"] == "stopped" and o["rate"] == rate for o in runs) for rate in (ONCE, *RATES)
        },
        "by": {
            door: {kind: {k: n for k, n in c.items() if n} for kind, c in found.items()} for door, found in by.items()
        },
        "faults": [one for one in runs if one in ended or one["bad"] or one["end"] in ("traceback", "hang")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="JSON lines of the runs that are done")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--door", choices=[*DOORS], action="append", help="only these; repeatable")
    parser.add_argument("--kind", action="append", help="only these kinds; repeatable")
    parser.add_argument("--rate", action="append", choices=[ONCE, *map(str, RATES)], help="only these; repeatable")
    parser.add_argument("--seed", type=int, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = options.seed or [1]
    rates = [rate if rate == ONCE else float(rate) for rate in options.rate or (ONCE, *RATES)]
    options.state.parent.mkdir(parents=True, exist_ok=True)
    lines = options.state.read_text().splitlines() if options.state.exists() else []
    done = {(o["door"], o["kind"], o["rate"], o["seed"]): o for o in map(json.loads, lines)}
    planned = plan(options.door or [*DOORS], seeds, rates)
    left = [one for one in planned if (one[0], one[1].name, *one[2:]) not in done]
    left = [one for one in left if not options.kind or one[1].name in options.kind]
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder)) if left else None
        gc.freeze()
        for door, kind, rate, seed in left:
            assert world is not None
            key = (door, kind.name, rate, seed)
            done[key] = run(world, door, kind, rate, seed)
            with options.state.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
            one = done[key]
            print(*key, one["end"], one["odd"], one["bad"], one["seconds"], one["said"][:100], sep=" | ", flush=True)
    result = summary(list(done.values()), seeds)
    atomic_write_json(options.out, result)
    print(json.dumps({k: v for k, v in result.items() if k not in ("by", "provenance", "faults")}, indent=1))
    sys.exit(bool(result["ended"] or result["bad_rows"] or result["tracebacks"] or result["hangs"]))


if __name__ == "__main__":
    main()
