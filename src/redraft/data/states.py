"""Hidden states from a serving engine: answers and features in one pass, and the features of answers that are there.

vLLM's speculative method ``extract_hidden_states`` keeps the states behind chosen layers, and a connector (vLLM's
example for CUDA devices, ``assets/vllm/redraft_states.py`` for any) writes those of a request into a file that the
answer names: ``hidden_states`` [tokens, layers, width] in the order of the layers and ``token_ids`` [tokens], of the
prompt and the answer but for its last token. The state behind the last layer lacks the final norm, which is applied
here. Speculators writes its training data in the same form.

Nothing of a file is taken on trust: its tokens must be those of the request, its states as many, finite and as wide as
the target's, and the target's head must say of the final states what was answered. The first rows of a run are compared
at every tap with the target itself, of which one layer at a time is in memory (:func:`by_layers`).

Shape legend: A anchors, T tokens, L layers, H hidden size, K taps.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from redraft.data import transport
from redraft.data.generate import Completion, Request
from redraft.data.pool import Server
from redraft.data.server import ServerEngine, read_completion
from redraft.data.store import Failure
from redraft.data.transport import Refused, Transient, Unusable, shown
from redraft.errors import UserError
from redraft.features import RowFeatures
from redraft.loading.layers import states_by_layers
from redraft.loading.places import locate
from redraft.rows import TokenRow, anchors
from redraft.settings.sampler import Sampler
from redraft.target import FINAL, Head

# A file is written right behind its answer; who waits longer for it asks again.
WRITE_SECONDS, LOOK_SECONDS = 30.0, 0.01
# How far states may be from the target's own, by the type they come in: the largest distance of a tap over its norm.
FAR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# The share of greedy tokens that the head must name from the final states; rounding changes near ties.
NAMED = 0.9
CONNECTOR = Path(__file__).parents[1] / "assets/vllm/redraft_states.py"
WHERE = "kv_transfer_params"


class StateFolder:
    """The folder that a server writes states into, as this machine sees it, and how they are read."""

    def __init__(self, folder: Path, head: Head, taps: Sequence[int]) -> None:
        """``taps`` are those of the draft. Raises ``UserError`` where there is no such folder."""
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; name the one that the server writes hidden states into")
        self.folder, self.head, self.taps = folder.resolve(), head, tuple(taps)
        # Engines give the layers in their order, and each once.
        self.layers = sorted({k for k in taps if k != FINAL} | {head.layers})

    @property
    def token_bytes(self) -> int:
        """What the features of a token take at most, in the type of the head."""
        return self.head.hidden_size * self.head.dtype.itemsize * (len(self.taps) + 1)

    def command(self) -> str:
        """The command line of a vLLM server that writes what is read here."""
        method: dict[str, Any] = {"method": "extract_hidden_states", "num_speculative_tokens": 1}
        method["draft_model_config"] = {"hf_config": {"eagle_aux_hidden_state_layer_ids": self.layers}}
        connector: dict[str, Any] = {
            "kv_connector": "RedraftStates",
            "kv_connector_module_path": CONNECTOR.stem,
            "kv_role": "kv_producer",
        }
        connector["kv_connector_extra_config"] = {"shared_storage_path": str(self.folder)}
        place = self.head.name
        with suppress(UserError):  # a name of this package's own means nothing to a server
            place = locate(place)["pretrained_model_name_or_path"]
        words = ["vllm", "serve", place, "--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
        words += ["--speculative-config", json.dumps(method), "--kv-transfer-config", json.dumps(connector)]
        return f"PYTHONPATH={shlex.quote(str(CONNECTOR.parent))} {shlex.join(words)}"

    def take(self, answer: dict[str, Any], ids: Sequence[int], begin: int) -> tuple[Tensor, Tensor]:
        """The features [T - 2, K*H] and [A, H] of an answer of the server; ``ids`` [T] are prompt and response, which
        begins at ``begin``. The file is read and goes.

        Raises ``Unusable`` where the server gives no states, ``Transient`` where they do not fit.
        """
        given = answer.get(WHERE)
        place = given.get("hidden_states_path") if isinstance(given, dict) else None
        if not isinstance(place, str) or not place:
            raise Unusable(f"the server gives no hidden states; start it so: {self.command()}")
        path = self.folder / Path(place).name  # by its name alone: the server's machine may know the folder by another
        if path.suffix != ".safetensors":
            raise Transient(f"hidden states in a file called {shown(path.name)}")
        try:
            return self._features(self._read(path, list(ids[:-1])), begin)
        finally:
            for written in (path, path.with_name(f"{path.name}.lock")):
                written.unlink(missing_ok=True)

    def _read(self, path: Path, ids: list[int]) -> Tensor:
        """The states [T - 1, L, H]. Raises ``Transient``."""
        until = time.monotonic() + WRITE_SECONDS
        while True:
            try:
                found = load_file(path)
                break
            except FileNotFoundError:
                why = f"the file {path.name} of hidden states is not in {self.folder}"
            except (SafetensorError, OSError, ValueError) as error:  # the example connector writes it piece by piece
                why = f"{path} cannot be read ({error})"
            if time.monotonic() > until:
                raise Transient(f"{why}; is that the folder that the server writes to?")
            time.sleep(LOOK_SECONDS)
        return states_of(found, ids, len(self.layers), self.head.hidden_size)

    def _features(self, states_TLH: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        device = self.head.device
        with torch.inference_mode():
            final_TH = self.head.norm(states_TLH[:, -1].to(device)).to(states_TLH.dtype).cpu().clone()
        parts = [final_TH if k == FINAL else states_TLH[:, self.layers.index(k)] for k in self.taps]
        return torch.cat(parts, dim=-1)[:-1].clone(), final_TH[begin:].clone()


def states_of(found: dict[str, Tensor], ids: Sequence[int], layers: int, width: int) -> Tensor:
    """The states [T, L, H] of a file, of the tokens ``ids`` [T] and those alone. Raises ``Transient``."""
    states, tokens = found.get("hidden_states"), found.get("token_ids")
    if states is None or tokens is None:
        raise Transient(f"a file of hidden states that has {', '.join(sorted(found)) or 'nothing'}")
    if states.ndim != 3 or states.shape[1:] != (layers, width) or states.dtype not in FAR:
        raise Transient(
            f"hidden states of shape {tuple(states.shape)} and type {states.dtype} where {layers} layers of {width} "
            "are needed: the server was started for another draft or target"
        )
    if len(states) < len(ids) or tokens.tolist()[: len(ids)] != list(ids):
        raise Transient(
            f"hidden states of {len(states)} tokens where {len(ids)} were computed, or of other ones; start the server "
            "with --no-enable-prefix-caching"
        )
    if not bool(torch.isfinite(states).all()):
        raise Transient("hidden states with NaN or infinity")
    return states[: len(ids)]


# -- asking ------------------------------------------------------------------------------------------------------------
class StatesEngine(ServerEngine):
    """Servers whose answers bring their features along. All write into one folder: engines name files by random ids."""

    def __init__(
        self,
        url: str | Sequence[str],
        states: StateFolder,
        model: str | None = None,
        concurrency: int = 32,
        **how: Any,
    ) -> None:
        super().__init__(url, model, concurrency, **how)
        self.states = states

    def answer(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        tokenizer: Any,
        eos_ids: Sequence[int],
        features: bool = False,
        **how: Any,
    ) -> Iterator[Completion | Failure]:
        """As :meth:`ServerEngine.answer`, with ``features`` those of every answer of two tokens or more."""
        if not features:
            yield from super().answer(requests, max_new_tokens, tokenizer, eos_ids)
            return

        def attempt(request: Request, server: Server) -> Completion:
            body = transport.completion_body(request, server.model, max_new_tokens)
            value = server.complete(body | {WHERE: {"include_output_tokens": True}})
            limits = (max_new_tokens, tokenizer, eos_ids, self.vocab_size)
            found = read_completion(value, request, *limits, open_end=True)
            ids, begin = [*request.prompt_ids, *found.response_ids], len(request.prompt_ids)
            taken = self.states.take(value, ids, begin)
            if len(found.response_ids) < 2:
                return found
            check_final(self.states.head, taken[1], found.response_ids, request.sampler)
            return replace(found, features=taken)

        yield from self.ask([(request.key, request) for request in requests], attempt)


class ServedFeatures:
    """The features of responses that are there: the server reads each of them as one prompt."""

    def __init__(self, engine: StatesEngine) -> None:
        self.engine, self.states = engine, engine.states

    def row_bytes(self, row: TokenRow) -> int:
        """See :class:`~redraft.features.FeatureProducer`; of states in two bytes a number."""
        if not anchors(row):
            return 0
        tokens = len(row.prompt_ids) + anchors(row) - 1
        return 2 * self.states.head.hidden_size * (tokens * len(self.states.taps) + anchors(row))

    def batches(
        self, rows: Sequence[TokenRow], have: Collection[str] = (), batch_tokens: int = 2048
    ) -> Iterator[list[RowFeatures]]:
        """One row at a time, as the server ends them. Raises ``UserError`` for a row that it refuses."""

        def attempt(row: TokenRow, server: Server) -> RowFeatures:
            ids = [*row.prompt_ids, *row.response_ids]
            body = transport.completion_body(Request(row.key, ids[:-1], Sampler()), server.model, 1)
            value = server.complete(body | {WHERE: {"include_output_tokens": True}})
            return RowFeatures(row, *self.states.take(value, ids, len(row.prompt_ids)))

        wanted = [(row.key, row) for row in rows if anchors(row) and row.key not in have]
        for outcome in self.engine.ask(wanted, attempt):
            if isinstance(outcome, Failure):
                raise UserError(
                    f"the server at {self.engine.url} gave no hidden states of {outcome.key}: {outcome.reason}"
                )
            yield [outcome]


# -- whether they are the target's own ---------------------------------------------------------------------------------
def check_final(head: Head, hidden_AH: Tensor, response_ids: Sequence[int], sampler: Sampler) -> None:
    """Raise ``Refused`` where the head does not say of the final states [A, H] what a greedy answer says."""
    if not sampler.greedy:
        return
    with torch.inference_mode():
        said_A = head.logits(hidden_AH.to(head.device, head.dtype)).argmax(-1).cpu()
    named = float((said_A == torch.tensor(list(response_ids[1:]))).float().mean())
    if named < NAMED:
        raise Refused(
            f"of the final hidden states the target's head gives {named:.0%} of the greedy answer: they are of another "
            "model, or of other positions (prefix caching and chunked prefill lose some; turn both off)"
        )


@dataclass(frozen=True)
class Text:
    """A text of which the last tokens stand for a response."""

    key: str
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]


def states_of_texts(engine: StatesEngine, texts: Sequence[Sequence[int]]) -> list[RowFeatures]:
    """What a server gives of ``texts`` of token ids, in their order. Raises ``UserError``."""
    rows = [Text(f"text {n}", ids[: len(ids) // 2], ids[len(ids) // 2 :]) for n, ids in enumerate(texts, 1)]
    found = {one.row.key: one for batch in ServedFeatures(engine).batches(rows) for one in batch}
    return [found[row.key] for row in rows if row.key in found]


def compare(
    served: Mapping[str, Sequence[RowFeatures]],
    states: StateFolder,
    texts: Sequence[Sequence[int]],
    adapter: str | None = None,
) -> str:
    """Hold what each server gave of ``texts`` against the target's own states; what came of it in words.

    A target with an ``adapter``, or a quantised one, has no layers that could be read one at a time. Raises
    ``UserError`` that names a server whose states are another model's.
    """
    head, taps = states.head, states.taps
    if adapter or head.rounding:
        return (
            "not compared at the taps, since the target is quantised or has an adapter; final states are, with answers"
        )
    depths, worst = [k for k in taps if k != FINAL], 0.0
    dtypes = sorted({rows[0].hidden.dtype for rows in served.values()}, key=str)
    for dtype in dtypes:  # of servers in one precision the target is read once
        own = []
        for ids, (layers, final_TH) in zip(texts, states_by_layers(head.name, dtype, list(texts), depths), strict=True):
            by_tap = dict(zip(depths, layers, strict=True)) | {FINAL: final_TH}
            own.append((torch.cat([by_tap[k] for k in taps], -1)[:-2], final_TH[len(ids) // 2 : -1]))
        for url, rows in served.items():
            if rows[0].hidden.dtype == dtype:
                worst = max(worst, check_taps(rows, own, taps, f"the server at {url}"))
    servers = f" at each of {len(served)} servers" if len(served) > 1 else ""
    numbers = " and ".join(str(dtype)[6:] for dtype in dtypes)
    return f"those of {len(texts)} prompts are within {worst:.1g} of the target's own{servers}, as {numbers} numbers"


def check_taps(
    found: Sequence[RowFeatures], own: Sequence[tuple[Tensor, Tensor]], taps: Sequence[int], who: str = "the server"
) -> float:
    """The largest distance of states from the target's own over their norm, at any tap. Raises ``UserError`` beyond
    what the type's rounding explains; it names ``who`` gave them."""
    worst = 0.0
    for row, (taps_TKH, hidden_AH) in zip(found, own, strict=True):
        width = hidden_AH.shape[-1]
        sides = zip(row.taps.split(width, -1), taps_TKH.split(width, -1), strict=True)
        pairs = [*zip(map(str, taps), sides, strict=True), ("final", (row.hidden, hidden_AH))]
        for name, (theirs, ours) in pairs:
            apart = float((theirs.double() - ours.double()).norm() / ours.double().norm())
            if not apart <= FAR[row.hidden.dtype]:
                raise UserError(
                    f"{who}: its states at tap {name} of {row.row.key} are {apart:.2g} away from the target's own "
                    f"(at most {FAR[row.hidden.dtype]:.0e} is rounding): it serves another model, other layers or "
                    "another precision; start it for this target and draft"
                )
            worst = max(worst, apart)
    return worst
