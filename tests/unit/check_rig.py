"""What the tests of the check share: drafts and servers that really have a fault, one each, on a trained tiny pair.

The pair lies in tests/artifacts/check, made by make_check.py beside it. ``FILES`` are drafts as somebody wrote them,
``ENGINES`` servers of a good draft; each is planted under the cause that must be named. Test files load this one with
``runpy``.
"""

from __future__ import annotations

import json
import runpy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from redraft.data.template import template_ids
from redraft.decode.engine import ChainDecoder
from redraft.drafts.files import save_draft
from redraft.drafts.opening import open_checkpoint
from redraft.loading import load_target
from redraft.target import Target

HERE = Path(__file__).resolve().parent
LOOPBACK = SimpleNamespace(**runpy.run_path(str(HERE / "loopback.py")))
PAIR = HERE.parent / "artifacts" / "check"
ASKS = PAIR / "prompts.jsonl"
PROMPTS, TOKENS, GAMMA = 12, 40, 4
LETTERS, ASKED = 12, 8

Change = Callable[[Any], Any]


# -- the pair --------------------------------------------------------------------------------------------------------
@cache
def model(name: str, whose: str = "check") -> Target:
    """Opened once for checks and once for engines: to find out which passes are its own takes longer than a check."""
    return load_target(str(PAIR / name), torch.float32, "cpu")


def draft_of(name: str, target: Target) -> Any:
    return open_checkpoint(PAIR / name, target, None, torch.float32).draft.bind(target).eval()


def letters_prompt(target: Target, text: str) -> list[int]:
    return template_ids(target.tokenizer, text, [{"role": "user", "content": text}])


def other_prompts(path: Path, count: int = PROMPTS, seed: int = 11) -> Path:
    """Questions of letters that do not follow from each other, unlike those of the training."""
    drawn = torch.randint(LETTERS, (count, ASKED), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = ["".join(chr(ord("A") + letter) for letter in line) for line in drawn]
    lines = [{"id": f"p{i:02}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# -- drafts as somebody wrote them -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class File:
    """A draft with a fault: ``write(folder)`` makes it; ``more`` are arguments of the check, ``other`` asks prompts
    unlike those of the training."""

    cause: str | None
    write: Callable[[Path], Path]
    more: dict[str, Any] = field(default_factory=dict)
    other: bool = False


def changed(
    name: str = "aligned",
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, torch.Tensor], Any], dict[str, torch.Tensor]] | None = None,
    record: Callable[[dict[str, Any]], None] | None = None,
) -> Callable[[Path], Path]:
    """A draft of the pair, saved with other fields in its config, other tensors, or another record."""

    def write(folder: Path) -> Path:
        draft = open_checkpoint(PAIR / name).draft
        meta = {k: v for k, v in json.loads((PAIR / name / "redraft.json").read_text()).items() if k in RECORDED}
        if record is not None:
            record(meta)
        state = {key: value.clone() for key, value in draft.state_dict().items()}
        if tensors is not None:
            state = tensors(state, draft.config)
        new = type(draft)(replace(draft.config, **(config or {})))
        if "d2t" in state:
            new.set_vocabulary(state["d2t"] + torch.arange(len(state["d2t"])))
        new.load_state_dict(state, strict=True, assign=True)
        save_draft(folder, new, meta)
        return folder

    return write


RECORDED = ("method", "target", "tokenizer_hash", "heldout")


def other_order(state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """``fc`` as a training writes it that put the highest layer first."""
    parts = state["fc.weight"].chunk(len(config.taps), 1)
    return state | {"fc.weight": torch.cat(parts[::-1], 1)}


def rolled_head(state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """A new map over old rows: every row of the head stands for the token of its neighbour."""
    return state | {"lm_head.weight": state["lm_head.weight"].roll(5, 0)}


def twice_normed(state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """The weights of a training that norms the state by the embedding's norm first, and then by its own."""
    first, own = state["midlayer.input_layernorm.weight"].float(), state["midlayer.hidden_norm.weight"].float()
    return state | {"midlayer.hidden_norm.weight": own / first * first.square().mean().sqrt()}


def useless_norm(state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """A norm before fc that no training had."""
    width = len(config.taps) * config.target_hidden_size
    generator = torch.Generator().manual_seed(5)
    return state | {"input_norm.weight": torch.randn(width, generator=generator).mul(0.8).exp()}


def other_embedding(state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """A table of embeddings that the draft was not trained with."""
    table = torch.randn(config.target_vocab_size, config.hidden_size, generator=torch.Generator().manual_seed(6))
    return state | {"embed_tokens.weight": table * 0.05}


def fewer_words(state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """A vocabulary without a third of the letters."""
    ids = state["d2t"] + torch.arange(len(state["d2t"]))
    kept = (ids < 46).nonzero().flatten()
    said = torch.isin(torch.arange(config.target_vocab_size), ids[kept])
    return state | {
        "d2t": ids[kept] - torch.arange(len(kept)),
        "t2d": said,
        "lm_head.weight": state["lm_head.weight"][kept],
    }


def for_the_target(meta: dict[str, Any]) -> None:
    meta["target"] = {"name": "target", "hash": model("target").content_hash()}
    meta.pop("heldout", None)


def without_record(meta: dict[str, Any]) -> None:
    meta.pop("heldout", None)


def another_tokenizer(meta: dict[str, Any]) -> None:
    meta["tokenizer_hash"] = "0" * 16


def plain_rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}


def few_ids() -> int:
    ids = open_checkpoint(PAIR / "aligned").draft.vocabulary()
    return int((ids < 46).sum())


BASE = {"base_target": str(PAIR / "base")}
FILES: dict[str, File] = {
    "layers one too high": File("layers_off_by_one", changed(config={"taps": (3, 4, 6)})),
    "layers one too low": File("layers_off_by_one", changed(config={"taps": (1, 2, 4)})),
    "layers in reverse": File("layers_in_other_order", changed(tensors=other_order)),
    "norm before the head left out": File("norm_missing", changed(config={"head_norm": False})),
    "norm that was not trained": File("norm_extra", changed(config={"norm_before_fc": True}, tensors=useless_norm)),
    "norm applied twice in training": File("norm_doubled", changed(tensors=twice_normed)),
    "state handed on behind the norm": File("norm_side", changed(config={"norm_output": True})),
    "new map over old rows": File("map_scrambled", changed(tensors=rolled_head)),
    "base of the angles lost": File("rope_lost", changed(config=plain_rope(1e6))),
    "another embedding": File("embedding_replaced", changed(config={"own_embedding": True}, tensors=other_embedding)),
    "taught by the base": File("base_teacher", changed("stale", record=for_the_target), BASE),
    "made for the base": File("stale", changed("stale", record=without_record), BASE),
    "made for the base, by its record": File("stale", changed("stale")),
    "words missing": File(
        "vocabulary", lambda folder: changed(config={"draft_vocab_size": few_ids()}, tensors=fewer_words)(folder)
    ),
    "another tokenizer": File("other_tokenizer", changed(record=another_tokenizer)),
    "one step in training": File("too_long_drafts", changed("short", record=without_record)),
    "other prompts than in training": File("other_text", changed(), other=True),
    "nothing": File(None, changed()),
    "nothing, beside its base": File(None, changed(), BASE),
    "nothing, without a record": File(None, changed(record=without_record)),
}


# -- servers of a good draft -----------------------------------------------------------------------------------------
class Engine:
    """An engine that decodes with redraft's own chain and counts as vLLM does. What it gets wrong is given to it:

    ``name`` is the draft that it was given (of the pair, or a folder), ``pair`` its target; ``draft`` and ``target``
    change what it computes with; ``gamma`` is what it drafts; behind position ``thread`` its draft proposes nonsense.
    ``reads(ids)`` is what it makes of the token ids of a prompt; ``chat(tokenizer, messages)`` and ``encode(tokenizer,
    text)`` give the ids of messages and of texts.
    """

    def __init__(self, **fault: Any) -> None:
        right = {"name": "aligned", "pair": "target", "draft": None, "target": None, "gamma": GAMMA, "thread": None}
        self.fault = SimpleNamespace(**right | fault)
        self.model = model(self.fault.pair, "engine")
        if self.fault.target is not None:
            self.model = model.__wrapped__(self.fault.pair)
            self.fault.target(self.model)
        draft = draft_of(self.fault.name, self.model)
        self.decoder = _Decoder(self.model, self.fault.draft(draft) if self.fault.draft else draft, self.fault.gamma)
        self.decoder.thread = self.fault.thread
        self.counts = {"rounds": 0, "accepted": 0, "tokens": 0, "drafted": 0}
        self.per_position = [0] * GAMMA
        self.lock = threading.Lock()
        engine = self

        class Handler(_Handler):
            engine_of = engine

        self.server = LOOPBACK.Server(Handler)
        self.url = self.server.url

    def stop(self) -> None:
        self.server.stop()

    def ids(self, path: str, body: dict[str, Any]) -> list[int]:
        """The token ids of a request, as this engine reads it."""
        tokenizer = self.model.tokenizer
        if "messages" in body:
            chat = getattr(self.fault, "chat", None)
            if chat is not None:
                return chat(tokenizer, body["messages"])
            text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            return tokenizer.encode(text, add_special_tokens=False)
        if isinstance(body["prompt"], str):
            encode = getattr(self.fault, "encode", None)
            return (
                encode(tokenizer, body["prompt"])
                if encode
                else tokenizer.encode(body["prompt"], add_special_tokens=False)
            )
        reads = getattr(self.fault, "reads", None)
        return reads(body["prompt"]) if reads else body["prompt"]

    def answer(self, ids: list[int], limit: int) -> list[int]:
        """Decode a little further than asked, so that every round that starts within the limit counts in full."""
        with self.lock, torch.inference_mode():
            done = self.decoder.generate(ids, limit + GAMMA + 1)
            answer, produced = done.ids[:limit], 1
            for one in done.rounds:
                if produced >= len(answer):
                    break
                self.counts["rounds"] += 1
                self.counts["accepted"] += one.accepted
                self.counts["drafted"] += self.fault.gamma
                for position in range(one.accepted):
                    self.per_position[position] += 1
                produced += one.accepted + 1
            self.counts["tokens"] += len(answer)
        return answer

    def metrics(self) -> str:
        lines = ["process_start_time_seconds 1000"]
        names = {
            "generation_tokens": self.counts["tokens"],
            "spec_decode_num_drafts": self.counts["rounds"],
            "spec_decode_num_draft_tokens": self.counts["drafted"],
            "spec_decode_num_accepted_tokens": self.counts["accepted"],
        }
        for name, value in names.items():
            lines += [f"# TYPE vllm:{name}_total counter", f'vllm:{name}_total{{engine="0"}} {float(value)}']
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        lines.append(f"# TYPE {name} counter")
        for position, value in enumerate(self.per_position[: self.fault.gamma]):
            lines.append(f'{name}{{engine="0",position="{position}"}} {float(value)}')
        return "\n".join(lines) + "\n"


class _Decoder(ChainDecoder):
    thread: int | None = None

    def propose(self, request: Any) -> Any:
        proposed, probabilities = super().propose(request)
        if self.thread is not None and len(request.prompt_ids) + len(request.ids) > self.thread:
            proposed = [3] * len(proposed)
        return proposed, probabilities


class _Handler(LOOPBACK.Handler):
    engine_of: Engine

    def do_GET(self) -> None:
        engine = self.engine_of
        if self.path == "/v1/models":
            self.say(200, json.dumps({"data": [{"id": "tiny"}]}))
        elif self.path == "/metrics":
            with engine.lock:
                self.say(200, engine.metrics())
        elif self.path == "/version":
            self.say(200, json.dumps({"version": "0.33.0"}))
        else:
            self.say(404, "not found")

    def do_POST(self) -> None:
        engine, body = self.engine_of, self.body()
        ids = engine.ids(self.path, body)
        answer = engine.answer(ids, body["max_tokens"])
        reason = "length" if len(answer) == body["max_tokens"] else "stop"
        choice = {"index": 0, "text": "".join(f"<{i}>" for i in answer), "finish_reason": reason}
        choice |= {"token_ids": answer, "prompt_token_ids": ids}
        usage = {"completion_tokens": len(answer), "prompt_tokens": len(ids)}
        if not body.get("stream"):
            self.say(200, json.dumps({"choices": [choice], "usage": usage}))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in ({"choices": [choice]}, {"choices": [], "usage": usage}):
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def say(self, status: int, text: str) -> None:
        self.out(status, text.encode())


def with_config(**fields: Any) -> Change:
    def change(draft: Any) -> Any:
        draft.config = replace(draft.config, **fields)
        return draft

    return change


def state_normed_twice(draft: Any) -> Any:
    layer = draft.midlayer
    layer.hidden_norm = torch.nn.Sequential(layer.input_layernorm, layer.hidden_norm)
    return draft


def no_state_norm(draft: Any) -> Any:
    draft.midlayer.hidden_norm = torch.nn.Identity()
    return draft


def flat_in_a_window(state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Attention that looks at all places nearly alike: of use where a window leaves it few."""
    return state | {"midlayer.self_attn.q_proj.weight": state["midlayer.self_attn.q_proj.weight"] * 0.1}


def lost_angles(draft: Any) -> Any:
    new = type(draft)(replace(draft.config, **plain_rope(10000.0)))
    new.set_vocabulary(draft.vocabulary())
    new.load_state_dict(draft.state_dict(), strict=True)
    return new


def no_map(draft: Any) -> Any:
    draft.d2t.zero_()
    return draft


def no_embedding(draft: Any) -> Any:
    draft.embed_tokens = torch.nn.Embedding(draft.config.target_vocab_size, draft.config.hidden_size)
    torch.nn.init.zeros_(draft.embed_tokens.weight)
    return draft


def rounded(steps: int) -> Callable[[Target], None]:
    """Weights rounded to so many steps on either side of zero, with a scale for every row."""

    def change(target: Target) -> None:
        with torch.no_grad():
            for name, weight in target.model.named_parameters():
                if weight.ndim == 2 and "layers" in name:
                    scale = weight.abs().amax(1, keepdim=True) / steps
                    weight.copy_((weight / scale).round() * scale)

    return change


def rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def bos_again(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer.encode(rendered(tokenizer, messages), add_special_tokens=False)]


def template_again(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    once = rendered(tokenizer, messages)
    return tokenizer.encode(rendered(tokenizer, [{"role": "user", "content": once}]), add_special_tokens=False)


def system_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    more = [{"role": "system", "content": "be brief"}, *messages]
    return tokenizer.encode(rendered(tokenizer, more), add_special_tokens=False)


def letter_by_letter(tokenizer: Any, text: str) -> list[int]:
    """Another tokenizer: no special tokens, no merges."""
    return [4 + ord(character) % 100 for character in text]


ENGINES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "layers one too high": ("layers_off_by_one", {"draft": with_config(taps=(3, 4, 6))}),
    "layers in reverse": ("layers_in_other_order", {"draft": with_config(taps=(5, 3, 2))}),
    "norm before the head left out": ("norm_missing", {"draft": with_config(head_norm=False)}),
    "norm of the state left out": ("norm_missing", {"draft": no_state_norm}),
    "state normed twice": ("norm_doubled", {"draft": state_normed_twice}),
    "state handed on behind the norm": ("norm_side", {"draft": with_config(norm_output=True)}),
    "base of the angles lost": ("rope_lost", {"draft": lost_angles}),
    "map of zeros": ("map_scrambled", {"draft": no_map}),
    "embedding of zeros": ("embedding_replaced", {"draft": no_embedding}),
    "window read as none": (
        "window_lost",
        {
            "write": changed(config={"windows": (5,)}, tensors=flat_in_a_window, record=without_record),
            "draft": with_config(windows=()),
        },
    ),
    "first token twice in ids": ("bos_doubled", {"reads": lambda ids: [0, *ids]}),
    "first token twice in messages": ("bos_doubled", {"chat": bos_again}),
    "template twice": ("template_doubled", {"chat": template_again}),
    "another template": ("other_template", {"chat": system_prompt}),
    "prompt cut": ("prompt_changed", {"reads": lambda ids: ids[4:]}),
    "another tokenizer": ("other_tokenizer", {"encode": letter_by_letter}),
    "target rounded": ("target_quantised", {"target": rounded(2)}),
    "another target": ("other_target", {"pair": "base"}),
    "short context": ("short_context", {"thread": 44}),
    "fewer drafted than asked": ("engine_limit", {"gamma": 2}),
    "nothing": (None, {}),
}


def served(name: str, folder: Path) -> tuple[str | None, Path, dict[str, Any]]:
    """Of ``ENGINES``: the cause, the draft that is given to check and server alike, and the arguments of the engine.

    A draft of its own is written into ``folder``.
    """
    cause, fault = ENGINES[name]
    if "write" not in fault:
        return cause, PAIR / "aligned", fault
    path = fault["write"](folder)
    return cause, path, {key: value for key, value in fault.items() if key != "write"} | {"name": path}
