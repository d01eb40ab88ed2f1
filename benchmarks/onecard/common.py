"""What the sections of ``benchmarks/gpu.py`` share: where findings go, clocks, and random targets, drafts and rows.

Shape legend: P prompt tokens, R response tokens, K taps, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, LlamaConfig

from redraft.artifact import atomic_write_json
from redraft.data.store import Row
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft
from redraft.target import Facts, Head, Target

GIB = 2**30
PROMPT_SHARE = 8  # one in so many tokens of a row is the prompt's


@dataclass
class Section:
    """One section's settings, the seconds it may take, and the file that its findings are in after each of them."""

    name: str
    device: torch.device
    tiny: bool
    seconds: float
    file: Path
    work: Path
    model: Path | None = None
    found: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    # Names of findings that are checks and did not hold.
    broken: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds left of this section's share."""
        return self.seconds - (time.monotonic() - self.began)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def put(self, name: str, value: Any, holds: bool = True) -> None:
        """Keep a finding; ``holds`` is false of a check that failed."""
        self.found[name] = value
        if not holds:
            self.broken.append(name)
        atomic_write_json(self.file, {"found": self.found, "broken": self.broken})
        print(f"  {self.name}: {name}{'' if holds else ' DOES NOT HOLD'} ({self.left:.0f} s left)", flush=True)

    def attempt(self, name: str, find: Callable[[], dict[str, Any]], least: float = 0.0) -> None:
        """Keep what ``find`` gives, with the peak memory that it took. What it raises is its finding, and counts as a
        check that failed unless memory was short. With fewer than ``least`` seconds left it is not tried."""
        if self.left < least:
            self.put(name, {"skipped": f"{self.left:.0f} seconds were left, and it takes {least:.0f}"})
            return
        self.empty()
        try:
            found, holds = find(), True
            holds = bool(found.get("holds", True))
        except torch.OutOfMemoryError as error:
            found, holds = {"out_of_memory": first_line(error)}, True
        except Exception as error:  # one finding must not cost the others
            found, holds = {"error": f"{type(error).__name__}: {first_line(error)}"}, False
        if self.cuda:
            found["peak_gib"] = round(torch.cuda.max_memory_allocated(self.device) / GIB, 3)
        self.put(name, found, holds)

    def empty(self) -> None:
        """Give memory back, and count its peak anew."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds_of(self, work: Callable[[], Any], repeats: int = 5, warm_ups: int = 1) -> float:
        """The median of ``repeats`` times of ``work``, each until the device has done it."""
        for _ in range(warm_ups):
            work()
        found = []
        for _ in range(repeats):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - began)
        return statistics.median(found)


def first_line(error: BaseException) -> str:
    return " ".join(str(error).strip().partition("\n")[0].split())[:300]


class Operations(TorchDispatchMode):
    """Counts the operations of matrix products and attention while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


# -- models ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """A target's shape, as far as its draft and its head go by it."""

    hidden: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    draft_vocabulary: int
    layers: int = 32

    @cached_property
    def config(self) -> LlamaConfig:
        """Weights of a spread that keeps states of any width near 1."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=32768,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            tie_word_embeddings=False,
            initializer_range=self.hidden**-0.5,
        )


def make_target(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Target:
    """A random Llama of this shape, made where it belongs."""
    torch.manual_seed(seed)
    with device:
        return Target(AutoModelForCausalLM.from_config(shape.config, dtype=dtype).to(device), name="random")


def make_head(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Head:
    """The ends of a random target, which are all that training over stored features reads of it."""
    torch.manual_seed(seed)
    table, out = (torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype) for _ in range(2))
    embedding, norm = nn.Embedding(1, 1, device=device), nn.RMSNorm(shape.hidden, device=device, dtype=dtype)
    head = nn.Linear(1, 1, bias=False, device=device)
    embedding.weight, head.weight = nn.Parameter(table, False), nn.Parameter(out.mul_(shape.hidden**-0.5), False)
    return Head(
        Facts("random", shape.config, fingerprint=lambda: "random"), embedding, norm.requires_grad_(False), head
    )


def make_draft(shape: Shape, device: torch.device, seed: int = 0) -> Eagle3Draft:
    """A random EAGLE-3 draft in float32 for a target of this shape."""
    config = Eagle3Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.hidden // shape.heads,
        target_vocab_size=shape.vocabulary,
        target_hidden_size=shape.hidden,
        draft_vocab_size=shape.draft_vocabulary,
        taps=(2, shape.layers // 2, shape.layers - 3),
        max_position_embeddings=32768,
    )
    torch.manual_seed(seed)
    with device:
        draft = Eagle3Draft(config, torch.arange(shape.draft_vocabulary, device="cpu"))
    return draft.to(device)


# -- rows --------------------------------------------------------------------------------------------------------------
def make_rows(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[Row]:
    """Rows of random tokens, of so many tokens each, all of them sayable for a draft of this vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        prompt = max(1, length // PROMPT_SHARE)
        rows.append(Row(f"row{number}", ids[:prompt], ids[prompt:], 0.0, 0, 1.0, 0, "length", "random"))
    return rows


class RandomFeatures:
    """Features of any row, random and in the CPU's memory as a store's are; rows of a length share theirs."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def get(self, row: Any) -> tuple[Tensor, Tensor]:
        """Taps [P + R - 2, K*H] and final-norm states [R - 1, H]."""
        prompt, response = len(row.prompt_ids), len(row.response_ids)
        if (prompt, response) not in self.known:
            torch.manual_seed(1000 * prompt + response)
            sizes = ((prompt + response - 2, 3 * self.shape.hidden), (response - 1, self.shape.hidden))
            taps, hidden = (torch.randn(size, device=self.device, dtype=self.dtype).cpu() for size in sizes)
            self.known[prompt, response] = taps, hidden
        return self.known[prompt, response]
