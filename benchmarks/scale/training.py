"""How much memory a training step takes on one long row, beside a build from before rows were trained in blocks.

    python benchmarks/scale/training.py --old PATH_OF_A_CHECKOUT

An EAGLE-3 draft of the shape that serves an 8B target: one layer of width 4096, 32 heads on 8 key heads, inner width
14336, three taps; random weights, low-rank updates as the default method trains them, features and head in bfloat16.
Every step (loss and gradient) is the same code on both builds, each in processes of its own, and its tensors are
followed one by one. Told of each:

- ``peak_mb``: the most bytes that tensors took at once, weights, features and the target's embedding and head included;
- ``activations_mb``: the same beside weights, gradients, optimiser state, and what was there before the step;
- ``largest_tensor_mb``: the largest tensor that is neither of these nor of the shape of a weight, whose copies in
  bfloat16 autocast makes;
- ``resident_mb``: the highest resident memory of the process.

``numbers: false`` says that nothing large was computed: an operation that would make more than ``LEAST`` numbers makes
room for them and leaves them as they are, so that no page is touched and any length can be followed, also where there
is not that much memory. What is alive at once is the same, as the lengths that were done both ways show; what
the kernels of products allocate inside themselves is in ``resident_mb`` alone.

The command fails where a figure misses what is asked of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from redraft import provenance
from redraft.artifact import atomic_write_json
from redraft.data.store import Row
from redraft.drafts.eagle3.module import Eagle3Config, Eagle3Draft
from redraft.drafts.groups import prepare
from redraft.settings.training import PrivateSize, TrainConfig
from redraft.training.optimizer import make_optimizers

SCHEMA = "redraft.training-memory/1"
ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "scale-training.json"
HIDDEN, INNER, HEADS, KEY_HEADS, WHOLE, REDUCED = 4096, 14336, 32, 8, 128_256, 32_000
PROMPT = 256  # tokens of a row that are not the answer's
CURVE = (1024, 2048, 4096, 8192, 16384)
CHECKED = 384  # done both ways
FOLLOWED = (2048, 4096, 8192)  # of the old build; longer rows make single tensors larger than this machine
LEAST = 1 << 20
MB, MOST_ROW_MB, MOST_TENSOR_MB, MOST_RATIO = 10**6, 8000, 512, 0.5


# -- one step, in a process of its own ---------------------------------------------------------------------------------
def made(shape: Sequence[int], dtype: torch.dtype, numbers: bool, seed: int = 0) -> Tensor:
    """Random numbers of a small size, or room for them, which nobody touches."""
    if not numbers:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.empty(tuple(shape), dtype=dtype).uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(seed))


def made_target(numbers: bool) -> Any:
    """What an objective reads of a target."""
    head, embedding = nn.Linear(1, 1, bias=False), nn.Embedding(1, 1)
    for layer in (head, embedding):
        layer.weight = nn.Parameter(made((WHOLE, HIDDEN), torch.bfloat16, numbers), requires_grad=False)
    facts = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "vocab_size": WHOLE, "hidden_size": HIDDEN}
    return SimpleNamespace(head=head, embedding=embedding, scale_logits=lambda logits: logits, **facts)


def made_draft(words: int, method: str, numbers: bool) -> Eagle3Draft:
    """A draft of the shape, ready to be trained."""
    config = Eagle3Config(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HIDDEN // HEADS,
        target_vocab_size=WHOLE,
        target_hidden_size=HIDDEN,
        draft_vocab_size=words,
        taps=(2, 16, 29),
        max_position_embeddings=2 * CURVE[-1],
    )
    with torch.device("meta"):
        draft = Eagle3Draft(config, torch.arange(words, device="cpu"))
    state = {
        name: made(x.shape, torch.float32, numbers) if x.is_floating_point() else x
        for name, x in draft.state_dict().items()
    }
    draft.load_state_dict(state, assign=True)
    if words < WHOLE:
        draft.set_vocabulary(torch.arange(words))
    return prepare(draft, method, PrivateSize())[0].train()


@dataclass
class MadeFeatures:
    """One row's features."""

    row: Row
    numbers: bool
    found: Any = field(init=False)

    def __post_init__(self) -> None:
        pairs = len(self.row.prompt_ids) + len(self.row.response_ids) - 2
        answers = len(self.row.response_ids) - 1
        shapes = (pairs, 3 * HIDDEN), (answers, HIDDEN)
        self.found = tuple(made(shape, torch.bfloat16, self.numbers) for shape in shapes)

    def get(self, row: Row) -> tuple[Tensor, Tensor]:
        return self.found


def as_meta(x: Any) -> Any:
    """The same tensor without numbers."""
    if not torch.is_tensor(x):
        return torch.device("meta") if isinstance(x, torch.device) else x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def room(x: Tensor) -> Tensor:
    """Memory for a tensor; a small one is filled, since somebody may look at it."""
    found = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
    return found if x.numel() >= LEAST else found.fill_(1)


def makes_more(function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether small tensors make a large one, as an outer product does."""
    sizes = sorted(x.numel() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x))
    bound = math.prod(sizes[-2:])
    if bound < LEAST or function._schema.is_mutable or torch.Tag.dynamic_output_shape in function.tags:
        return False
    found = function(*tree_map(as_meta, args), **tree_map(as_meta, kwargs))
    return any(torch.is_tensor(x) and x.numel() >= LEAST for x in tree_leaves(found))


class Follow(TorchDispatchMode):
    """The bytes of all tensors that operations make, for as long as they live, and the largest of them."""

    def __init__(self, weights: Sequence[Tensor], known: Sequence[Tensor], numbers: bool) -> None:
        """``weights`` tell what copies of weights look like; ``known`` are there already and count for nothing."""
        super().__init__()
        self.numbers, self.live, self.peak, self.largest, self.largest_copy = numbers, 0, 0, (0, ""), 0
        shapes = [tuple(weight.shape) for weight in weights]
        self.shapes = {*shapes, *(shape[::-1] for shape in shapes)}
        self.sizes: dict[int, int] = {x.untyped_storage()._cdata: 0 for x in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.result(function, args, kwargs or {})
        for found in result if isinstance(result, tuple | list) else (result,):
            if torch.is_tensor(found):
                self.note(found, str(function))
        return result

    def result(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operation gives, or room for it."""
        given = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        returns = function._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        # What is counted and chosen by is done: whole numbers, and the weights of positions.
        whole = not any(x.is_floating_point() for x in given)
        small = max((x.numel() for x in given), default=0) < LEAST
        if self.numbers or view or whole or (small and not makes_more(function, args, kwargs)):
            return function(*args, **kwargs)
        if function is torch.ops.aten.index.Tensor:  # a mask's result is as long as the mask says
            parts = [[x] if x is None or x.dtype != torch.bool else x.nonzero().unbind(-1) for x in args[1]]
            args = (args[0], [x for part in parts for x in part])
        if function._schema.is_mutable:
            return args[0] if returns else None
        shapes = function(*tree_map(as_meta, args), **tree_map(as_meta, kwargs))
        return tree_map(lambda x: room(x) if torch.is_tensor(x) else x, shapes)

    def note(self, found: Tensor, name: str) -> None:
        storage = found.untyped_storage()
        size, key = storage.nbytes(), storage._cdata
        if key in self.sizes or not size:
            return
        self.sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, key)
        if tuple(found.shape) in self.shapes:
            self.largest_copy = max(self.largest_copy, size)
        elif size > self.largest[0]:
            self.largest = (size, f"{name} {list(found.shape)} {found.dtype}")

    def forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def resident() -> float:
    """Highest resident memory of this process in MB; not by getrusage, which counts what it was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")) / MB, 1)


def step(tokens: int, words: int, method: str, numbers: bool) -> dict[str, Any]:
    """One training step on one row of so many tokens."""
    torch.manual_seed(0)
    ids = torch.randint(0, REDUCED, (tokens,)).tolist()
    row = Row("row", ids[:PROMPT], ids[PROMPT:], 0.0, 0, 1.0, 0, "length", "hash")
    target, draft, source = made_target(numbers), made_draft(words, method, numbers), MadeFeatures(row, numbers)
    trained = [(name, p) for name, p in draft.named_parameters() if p.requires_grad]
    objective = draft.objective(target, TrainConfig())
    weights = [*draft.parameters(), target.head.weight, target.embedding.weight]
    # The rows of the head that the draft's vocabulary has are a weight too, where the objective took a copy.
    known = [*weights, *source.found, objective.head_DF]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in known}
    before = sum(storages.values())
    follow = Follow(weights, known, numbers)
    began = time.monotonic()
    with follow:
        batch = objective.collate([row], source).to(torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(batch)
        loss.backward()
    gradients = sum(p.grad.nbytes for _, p in trained if p.grad is not None)
    seconds = time.monotonic() - began
    after = 0
    if numbers:
        optimizers = make_optimizers(trained, "adamw", 0.01)
        optimizers.step(1e-4)
        after = sum(value.nbytes for value in optimizers.state().values())
    return {
        "tokens": tokens,
        "vocabulary": words,
        "method": method,
        "numbers": numbers,
        "peak_mb": round((before + follow.peak) / MB, 1),
        "activations_mb": round((follow.peak - gradients) / MB, 1),
        "weights_and_features_mb": round(before / MB, 1),
        "gradients_mb": round(gradients / MB, 1),
        "optimiser_mb": round(after / MB, 1) if numbers else None,
        "largest_tensor_mb": round(follow.largest[0] / MB, 1),
        "largest_tensor": follow.largest[1],
        "largest_weight_copy_mb": round(follow.largest_copy / MB, 1),
        "resident_mb": resident() if numbers else None,
        "loss": float(loss.detach()) if numbers else None,
        "seconds": round(seconds, 1),
    }


# -- a step as the quickstart takes it ---------------------------------------------------------------------------------
def quick(steps: int) -> dict[str, Any]:
    """Seconds of the processor that a step takes at the quickstart's shape: 768 positions of 6 rows."""
    torch.manual_seed(0)
    hidden, words, whole = 576, 16_384, 49_152
    head, embedding = nn.Linear(hidden, whole, bias=False), nn.Embedding(whole, hidden)
    facts = {"device": torch.device("cpu"), "dtype": torch.float32, "vocab_size": whole, "hidden_size": hidden}
    target = SimpleNamespace(head=head, embedding=embedding, scale_logits=lambda logits: logits, **facts)
    target.head.requires_grad_(False)
    target.embedding.requires_grad_(False)
    shape = {"hidden_size": hidden, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    sizes = {"target_vocab_size": whole, "target_hidden_size": hidden, "draft_vocab_size": words}
    config = Eagle3Config(**shape, **sizes, head_dim=64, taps=(2, 15, 27))
    draft = prepare(Eagle3Draft(config, torch.arange(words)), "lora", PrivateSize())[0].train()
    ids = torch.randint(0, words, (6, 210)).tolist()
    rows = [Row(f"r{n}", row[:81], row[81:], 0.0, 0, 1.0, 0, "length", "hash") for n, row in enumerate(ids)]
    features = {row.key: (torch.randn(208, 3 * hidden), torch.randn(128, hidden)) for row in rows}
    source: Any = SimpleNamespace(get=lambda row: features[row.key])
    objective = draft.objective(target, TrainConfig())
    batch, spent, losses = objective.collate(rows, source), [], []
    for _ in range(steps + 1):
        draft.zero_grad()
        began = time.process_time()
        loss = objective(batch)
        loss.backward()
        spent.append(time.process_time() - began)
        losses.append(float(loss.detach()))
    bits = sum(float(p.grad.double().sum()) for p in draft.parameters() if p.grad is not None)
    return {"seconds": spent[1:], "loss": losses[-1], "gradient": bits}


# -- both builds -------------------------------------------------------------------------------------------------------
def child(build: Path, kind: str, *given: str) -> list[dict[str, Any]]:
    """What a process of this file says, with the code of a build: one figure for each of what it is given."""
    environment = os.environ | {"PYTHONPATH": str(build / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", kind, *given]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=build) as process:
        assert process.stdout is not None
        found = []
        for line in process.stdout:
            print(build.name, line, end="", flush=True)
            found.append(json.loads(line))
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return found


def steps(build: Path, *given: tuple[int, int, str, int]) -> list[dict[str, Any]]:
    """Steps of (tokens, vocabulary, method, numbers)."""
    return child(build, "step", *(",".join(map(str, each)) for each in given))


def parabola(points: Sequence[tuple[float, float]], at: float) -> float:
    """The parabola through three points, there."""
    return sum(y * math.prod((at - other) / (x - other) for other, _ in points if other != x) for x, y in points)


def speed(builds: dict[str, Path], repeats: int) -> dict[str, Any]:
    """Steps of both builds in turn, each first in every other pair."""
    orders = [list(builds.items())[:: 1 if n % 2 else -1] for n in range(repeats)]
    runs = [{name: child(build, "quick", "6")[0] for name, build in order} for order in orders]
    ratios = [statistics.median(run["old"]["seconds"]) / statistics.median(run["new"]["seconds"]) for run in runs]
    same = all(run["old"][key] == run["new"][key] for run in runs for key in ("loss", "gradient"))
    times = {name: statistics.median([s for run in runs for s in run[name]["seconds"]]) for name in builds}
    return {"processor_seconds": times, "old_over_new": ratios, "same_bits": same}


def revision(build: Path) -> str:
    command = ["git", "-C", str(build), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def measured(builds: dict[str, Path], repeats: int) -> dict[str, Any]:
    """All figures."""

    wide_ones = [(4096, WHOLE, "lora", 0), (4096, WHOLE, "full", 0)]
    ends = {"old": FOLLOWED, "new": CURVE}
    asked = {
        name: [*wide_ones, *((n, REDUCED, "lora", 0) for n in (CHECKED, *lengths))] for name, lengths in ends.items()
    }
    followed = {name: steps(build, *asked[name]) for name, build in builds.items()}
    wide, whole, check = ({name: found[n] for name, found in followed.items()} for n in range(3))
    old, new = ({found["tokens"]: found for found in followed[name][3:]} for name in builds)
    done = {name: steps(build, (CHECKED, REDUCED, "lora", 1))[0] for name, build in builds.items()}
    points = [(n, found["peak_mb"]) for n, found in old.items()]
    row, old_row = new[CURVE[-1]], parabola(points, CURVE[-1])
    return {
        "long_row": {
            "tokens": row["tokens"],
            "peak_mb": row["peak_mb"],
            "old_peak_mb": round(old_row, 1),
            "old_peak": f"by arithmetic: the parabola through the peaks at {', '.join(map(str, FOLLOWED))} tokens",
            "peak_ratio": round(row["peak_mb"] / old_row, 4),
            **{key: row[key] for key in ("activations_mb", "largest_tensor_mb", "largest_tensor")},
        },
        "training_memory": {
            "tokens": 4096,
            "vocabulary": WHOLE,
            "largest_tensor_mb": max(each["new"]["largest_tensor_mb"] for each in (wide, whole)),
            "peak_ratio": round(wide["new"]["peak_mb"] / wide["old"]["peak_mb"], 4),
            "peak_ratio_full": round(whole["new"]["peak_mb"] / whole["old"]["peak_mb"], 4),
            "activations_ratio": round(wide["new"]["activations_mb"] / wide["old"]["activations_mb"], 4),
            "lora": wide,
            "full": whole,
        },
        "curve": [{key: new[n][key] for key in ("tokens", "peak_mb", "activations_mb")} for n in CURVE],
        "old_curve": [{key: old[n][key] for key in ("tokens", "peak_mb", "activations_mb")} for n in FOLLOWED],
        "done_both_ways": {"with_numbers": done, "followed": check},
        "speed": speed(builds, repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="checkout of the build to compare with")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs that are timed")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *given = options.child
        for one in given:
            if kind == "quick":
                found = quick(int(one))
            else:
                tokens, words, method, numbers = one.split(",")
                found = step(int(tokens), int(words), method, numbers == "1")
            print(json.dumps(found), flush=True)
        return
    if options.old is None or not (options.old / "src" / "redraft").is_dir():
        raise SystemExit("--old: give the checkout of the build to compare with")
    builds = {"old": options.old.resolve(), "new": ROOT}
    found = measured(builds, options.repeats)
    record = {"schema": SCHEMA, "old_revision": revision(builds["old"]), **found}
    atomic_write_json(RESULT, record | {"provenance": provenance.collect(seed=0)})
    row, wide = found["long_row"], found["training_memory"]
    missed = [
        f"{name} is {value:,} and not below {most:,}"
        for name, value, most in (
            ("peak of a long row in MB", row["peak_mb"], MOST_ROW_MB),
            ("largest tensor in MB", wide["largest_tensor_mb"], MOST_TENSOR_MB),
            ("peak beside the old build's", wide["peak_ratio"], MOST_RATIO),
        )
        if value > most
    ]
    if missed:
        raise SystemExit("; ".join(missed))


if __name__ == "__main__":
    main()
