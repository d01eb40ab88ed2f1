"""Settings that several commands have: the target and its machine, how it draws, and how it answers prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redraft.settings.base import AUTO, DtypeName, Settings, setting
from redraft.settings.sampler import Sampler, asked_samplers
from redraft.settings.texts import Address, FormatName

PROMPT_FORMS = "JSONL, ShareGPT, Alpaca, text lines, or datasets:NAME"
SHARED_DRAFT = "shared draft, when --draft is a private part"


class OnTarget(Settings):
    """Settings of a command that opens the target."""

    target: str = setting(..., "fine-tuned target: folder, hub id, or folder of a PEFT adapter", reads="model")
    adapter: str | None = setting(None, "PEFT adapter to merge into --target", reads="model")
    template_arg: dict[str, Any] = setting({}, "argument of its chat template, as enable_thinking=false; repeatable")
    dtype: DtypeName = setting(AUTO, "data type of the target: bfloat16, float32, or auto, the faster one here")
    device: str = setting("cpu", "torch device: cpu, cuda, cuda:1, ...")
    seed: int = setting(0, "seed of everything random")


class Sampled(OnTarget):
    """How the target draws."""

    temperature: float = setting(0.0, "0 is greedy")
    top_p: float = setting(1.0, "nucleus of sampling")
    top_k: int = setting(0, "likeliest tokens to sample from; 0 is all")

    @property
    def sampler(self) -> Sampler:
        """Raises ``UserError`` for values out of range and for filters of a greedy choice."""
        return asked_samplers([self.temperature], self.top_p, self.top_k)[0]


class Answered(OnTarget):
    """How the target, or a server of it, answers prompts."""

    top_p: float = setting(1.0, "nucleus of sampled answers")
    max_new_tokens: int = setting(256, "longest answer, in tokens", gt=1)
    server: Address | None = setting(None, "OpenAI-compatible server of the target; its key: REDRAFT_API_KEY")
    server_model: str | None = setting(None, "the target's name on that server")
    batch_size: int = setting(64, "sequences decoded together, or requests under way at --server", gt=0)

    def conflicts(self) -> Iterator[str]:
        if self.server_model and not self.server:
            yield "--server-model names the target on a server; give --server too, or leave it out"


class AnsweredRun(Answered):
    """A run that begins with the target's answers and ends with exports."""

    out: Path = setting(..., "run directory; a stopped run resumes from it")
    prompts: str | None = setting(None, f"prompts that the target answers ({PROMPT_FORMS})", reads="prompts")
    responses: str | None = setting(None, "log of served responses, as text or ids, instead of --prompts", reads="file")
    temperatures: tuple[float, ...] = setting((0.0,), "sampling temperature of the answers; repeatable")
    heldout_prompts: int = setting(24, "prompts kept back for early stopping", gt=0)
    exports: tuple[FormatName, ...] = setting((), "format to export: {formats}; repeatable")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if (self.prompts is None) == (self.responses is None):
            yield "give --prompts for the target to answer, or --responses with a log of served ones: one of the two"
