"""How much memory a training step takes on one long row, beside a build from before rows were trained in blocks.

    python benchmarks/scale/training.py --old PATH_OF_A_CHECKOUT

An EAGLE-3 draft of the shape that serves an 8B target: one layer of width 4096, 32 heads on 8 key heads, inner width
14336, three taps; random weights, low-rank updates as the default method trains them, features and head in bfloat16.
Every step (loss, gradient, optimiser) runs in a process of its own, the same code on both builds, and its tensors are
followed one by one. Told of each:

- ``peak_mb``: the most bytes that tensors took at once, weights, features and the target's embedding and head included;
- ``activations_mb``: the same beside weights, gradients, optimiser state, and what was there before the step;
- ``largest_tensor_mb``: the largest tensor that is neither of these nor of the shape of a weight, whose copies in
  bfloat16 autocast makes;
- ``resident_mb``: the highest resident memory of the process.

Where products would take too long they are left out (``products: false``): a product gives zeros of its shape, and all
else is done. Tensors are the same, their numbers are not; what products allocate inside themselves is then missing, and
pages that nobody writes are not resident. What the old build takes at lengths that this machine cannot hold is the
parabola through what it took at three lengths. The command fails where a figure misses what is asked of it.
"""

from __future__ import annotations

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
OLD = (512, 1024, 1536, 2048)
MB, MOST_ROW_MB, MOST_TENSOR_MB, MOST_RATIO = 10**6, 8000, 512, 0.5


# -- one step, in a process of its own ---------------------------------------------------------------------------------
def made(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers of a small size."""
    return torch.empty(tuple(shape), dtype=dtype).uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(seed))


def made_target() -> Any:
    """What an objective reads of a target."""
    head, embedding = nn.Linear(1, 1, bias=False), nn.Embedding(1, 1)
    for layer in (head, embedding):
        layer.weight = nn.Parameter(made((WHOLE, HIDDEN), torch.bfloat16), requires_grad=False)
    facts = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "vocab_size": WHOLE, "hidden_size": HIDDEN}
    return SimpleNamespace(head=head, embedding=embedding, scale_logits=lambda logits: logits, **facts)


def made_draft(words: int, method: str) -> Eagle3Draft:
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
        name: made(x.shape, torch.float32) if x.is_floating_point() else x for name, x in draft.state_dict().items()
    }
    draft.load_state_dict(state, assign=True)
    if words < WHOLE:
        draft.set_vocabulary(torch.arange(words))
    return prepare(draft, method, PrivateSize())[0].train()


@dataclass
class MadeFeatures:
    """One row's features."""

    row: Row
    found: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        pairs = len(self.row.prompt_ids) + len(self.row.response_ids) - 2
        answers = len(self.row.response_ids) - 1
        self.found = made((pairs, 3 * HIDDEN), torch.bfloat16), made((answers, HIDDEN), torch.bfloat16)

    def get(self, row: Row) -> tuple[Tensor, Tensor]:
        return self.found


class Follow(TorchDispatchMode):
    """The bytes of all tensors that operations make, for as long as they live, and the largest of them."""

    PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}

    def __init__(self, weights: Sequence[Tensor], products: bool) -> None:
        super().__init__()
        self.products, self.live, self.peak, self.largest, self.largest_copy = products, 0, 0, (0, ""), 0
        shapes = [tuple(weight.shape) for weight in weights]
        self.shapes = {*shapes, *(shape[::-1] for shape in shapes)}
        self.sizes: dict[int, int] = {}
        self.gradients = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.PRODUCTS and not self.products:
            a, b = args[-2:]
            result: Any = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=a.dtype)
        else:
            result = function(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else (result,):
            if torch.is_tensor(found):
                self.note(found, str(function))
        return result

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


def step(tokens: int, words: int, method: str, products: bool) -> dict[str, Any]:
    """One training step on one row of so many tokens."""
    torch.manual_seed(0)
    ids = torch.randint(0, REDUCED, (tokens,)).tolist()
    row = Row("row", ids[:PROMPT], ids[PROMPT:], 0.0, 0, 1.0, 0, "length", "hash")
    target, draft, source = made_target(), made_draft(words, method), MadeFeatures(row)
    trained = [(name, p) for name, p in draft.named_parameters() if p.requires_grad]
    objective = draft.objective(target, TrainConfig())
    parameters = [*draft.parameters(), target.head.weight, target.embedding.weight]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in (*parameters, *source.found)}
    before = sum(storages.values())
    follow = Follow([*draft.parameters(), target.head.weight], products)
    began = time.monotonic()
    with follow:
        batch = objective.collate([row], source).to(torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(batch)
        loss.backward()
    gradients = sum(p.grad.nbytes for _, p in trained if p.grad is not None)
    seconds = time.monotonic() - began
    after = 0
    if products:
        optimizers = make_optimizers(trained, "adamw", 0.01)
        optimizers.step(1e-4)
        after = sum(value.nbytes for value in optimizers.state().values())
    del batch
    return {
        "tokens": tokens,
        "vocabulary": words,
        "method": method,
        "products": products,
        "peak_mb": round((before + follow.peak) / MB, 1),
        "activations_mb": round((follow.peak - gradients) / MB, 1),
        "weights_and_features_mb": round(before / MB, 1),
        "gradients_mb": round(gradients / MB, 1),
        "optimiser_mb": round(after / MB, 1),
        "largest_tensor_mb": round(follow.largest[0] / MB, 1),
        "largest_tensor": follow.largest[1],
        "largest_weight_copy_mb": round(follow.largest_copy / MB, 1),
        "resident_mb": resident(),
        "loss": float(loss.detach()) if products else None,
        "seconds": round(seconds, 1),
    }
