"""Hidden states from a serving engine: the target's own features, or one line that says why not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from redraft.data import states
from redraft.data.generate import Completion, Request
from redraft.data.states import ServedFeatures, StateFolder, StatesEngine, check_taps, compare, states_of_texts
from redraft.data.store import Failure, Row
from redraft.errors import UserError
from redraft.features import ComputedFeatures, FeatureStore, RowFeatures
from redraft.loading.layers import states_by_layers
from redraft.settings.sampler import Sampler
from redraft.target import FINAL, Target

Spoil = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


ONE = threading.Lock()  # the target keeps what it caught of one pass


class Engine(StatesEngine):
    """What a vLLM with the connector does, without the wire: greedy answers of the target, their states in a file."""

    def __init__(self, target: Target, folder: StateFolder, place: Path) -> None:
        super().__init__("http://127.0.0.1:9", folder, "tiny", 1, attempts=2, backoff=0.0)
        self.servers[0].complete = self.complete  # type: ignore[method-assign]
        self.target, self.place, self.number = target, place, 0
        self.spoil: Spoil = lambda found: found
        self.params: Any = ...

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        with ONE:
            return self.answered(body)

    def answered(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, said = list(body["prompt"]), list[int]()
        with torch.inference_mode():
            for _ in range(body["max_tokens"]):
                step = self.target.forward(torch.tensor([ids + said]))
                said.append(int(self.target.logits(step.hidden_BTH[0, -1]).argmax()))
            whole = torch.tensor([(ids + said)[:-1]])
            raw = self.target.model(whole, output_hidden_states=True).hidden_states
            last = dict[str, torch.Tensor]()
            hook = self.target.norm.register_forward_pre_hook(lambda _, given: last.update(x=given[0]))
            self.target.model(whole)
            hook.remove()
        layers = [last["x"][0] if k == self.target.layers else raw[k][0] for k in self.states.layers]
        self.number += 1
        path = self.place / f"cmpl-{self.number}.safetensors"
        save_file(self.spoil({"hidden_states": torch.stack(layers, 1), "token_ids": whole[0]}), path)
        given = {"hidden_states_path": f"/elsewhere/{path.name}"} if self.params is ... else self.params
        choice = {"index": 0, "token_ids": said, "text": "", "finish_reason": "length"}
        return {"model": "tiny", "choices": [choice], "kv_transfer_params": given}


@pytest.fixture(scope="module")
def target(tiny_target: Callable[..., Target]) -> Target:
    return tiny_target("llama")


@pytest.fixture(params=[(1, 3, 5), (2, 4, FINAL)], ids=str)
def engine(target: Target, tmp_path: Path, request: pytest.FixtureRequest) -> Engine:
    target.tap(request.param)
    return Engine(target, StateFolder(tmp_path, target.head_part, request.param), tmp_path)


def ask(engine: Engine, tokens: int = 6) -> list[Completion | Failure]:
    requests = [Request(f"r{i}", [4 + i, 9, 17 + i, 30], Sampler(), 0) for i in range(3)]
    found = engine.answer(requests, tokens, engine.target.tokenizer, (), features=True)
    return sorted(found, key=lambda one: one.request.key if isinstance(one, Completion) else one.key)


def row(found: Completion) -> Row:
    ids = list(found.request.prompt_ids), found.response_ids
    return Row(found.request.key, *ids, 0.0, 0, 1.0, 0, "length", "hash")


def test_answers_bring_the_features_that_the_target_computes(engine: Engine, tmp_path: Path) -> None:
    found = ask(engine)
    assert len(found) == 3
    for one in found:
        assert isinstance(one, Completion) and one.features is not None and len(one.response_ids) == 6
        for theirs, ours in zip(one.features, ComputedFeatures(engine.target).get(row(one)), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.glob("*.safetensors")), "what was read goes"
    (single, *_) = ask(engine, tokens=1)
    assert isinstance(single, Completion) and single.features is None and len(single.response_ids) == 1


def test_stored_answers_are_read_as_one_prompt(engine: Engine, tmp_path: Path) -> None:
    rows = [Row(f"s{i}", [5, 6 + i, 7], [11, 12 + i, 13, 40][: 2 + i], 0.7, 0, 1.0, 0, "stop", "h") for i in range(3)]
    store = FeatureStore(tmp_path / "features", {"target": "tiny"})
    store.build(ServedFeatures(engine), rows)
    for each in rows:
        for theirs, ours in zip(store.get(each), ComputedFeatures(engine.target).get(each), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def cut(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[1:].clone() for name, tensor in found.items()}


def no_number(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found["hidden_states"][2, 0, 3] = float("nan")
    return found


SPOILT: dict[str, tuple[Spoil, str]] = {
    "prefix caching": (cut, "hidden states of 8 tokens where 9 were computed.*--no-enable-prefix-caching"),
    "another text": (lambda f: f | {"token_ids": f["token_ids"] + 1}, "or of other ones"),
    "no number": (no_number, "NaN or infinity"),
    "a layer too few": (lambda f: f | {"hidden_states": f["hidden_states"][:, 1:].contiguous()}, "another draft or"),
    "another width": (lambda f: f | {"hidden_states": f["hidden_states"][..., :-8].contiguous()}, "of shape"),
    "no tokens": (lambda f: {"hidden_states": f["hidden_states"]}, "that has hidden_states"),
    "another model": (
        lambda f: f | {"hidden_states": -f["hidden_states"]},
        "of the greedy answer: they are of another",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_states_that_do_not_fit_are_no_features(target: Target, kind: str, tmp_path: Path) -> None:
    spoil, says = SPOILT[kind]
    engine = Engine(target, StateFolder(tmp_path, target.head_part, (1, 3, 5)), tmp_path)
    engine.spoil = lambda found: spoil(found) if engine.number == 1 else found
    (first, *others) = ask(engine)  # it is asked for again
    if kind == "another model":
        assert isinstance(first, Failure)
    assert all(isinstance(one, Completion) and one.features is not None for one in others)
    engine.spoil = spoil
    if kind == "another model":
        assert all(isinstance(one, Failure) and says.split(".*")[0] in one.reason for one in ask(engine))
    else:
        with pytest.raises(UserError, match=says):
            ask(engine)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_server_without_states_is_told_how_to_begin(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "WRITE_SECONDS", 0.05)
    engine = Engine(target, StateFolder(tmp_path, target.head_part, (1, 3, 5)), tmp_path)
    engine.params = None
    with pytest.raises(
        UserError, match=r"gives no hidden states; start it so: PYTHONPATH=\S+ vllm serve .*\[1, 3, 5, 6\]"
    ):
        ask(engine)
    engine.params = {"hidden_states_path": "/elsewhere/gone.safetensors"}
    with pytest.raises(UserError, match=f"gone.safetensors of hidden states is not in {tmp_path}"):
        ask(engine)
    with pytest.raises(UserError, match="is no folder"):
        StateFolder(tmp_path / "absent", target.head_part, (1, 3, 5))


def test_states_are_compared_with_the_target_a_layer_at_a_time(target: Target, tmp_path: Path) -> None:
    target.tap((1, 3, 5))
    target.save(tmp_path / "target")
    rows = [Row("a", [5, 6, 7], [11, 12, 13, 40], 0.0, 0, 1.0, 0, "length", "h")]
    found = [RowFeatures(one, *ComputedFeatures(target).get(one)) for one in rows]
    (layers, final), *_ = states_by_layers(str(tmp_path / "target"), torch.float32, [[5, 6, 7, 11, 12, 13]], (1, 3, 5))
    own = [(torch.cat(layers, -1)[:-1], final[3:])]
    assert check_taps(found, own, (1, 3, 5)) < 1e-5
    with pytest.raises(UserError, match="at tap 3 of a@T0 are .* away from the target's own"):
        swapped = torch.cat([layers[0], layers[2], layers[1]], -1)[:-1]
        check_taps(found, [(swapped, final[3:])], (1, 3, 5))


def test_two_servers_write_into_one_folder(target: Target, tmp_path: Path) -> None:
    """Engines call a file by a random id; one file serves no two answers, whoever wrote it."""
    folder = StateFolder(tmp_path, target.head_part, (1, 3, 5))
    first, second = Engine(target, folder, tmp_path), Engine(target, folder, tmp_path)
    second.number = 100
    both = StatesEngine(["http://127.0.0.1:9", "http://127.0.0.1:10"], folder, "tiny", 2, attempts=2, backoff=0.0)
    both._meet = lambda threads: both._admit(both.servers)  # type: ignore[method-assign]
    for server, engine in zip(both.servers, (first, second), strict=True):
        server.complete = engine.complete  # type: ignore[method-assign]
    requests = [Request(f"r{i}", [4 + i, 9, 17 + i, 30], Sampler(), 0) for i in range(12)]
    found = list(both.answer(requests, 6, target.tokenizer, (), features=True))
    assert {one.request.key for one in found if isinstance(one, Completion)} == {one.key for one in requests}
    for one in found:
        assert isinstance(one, Completion) and one.features is not None
        for theirs, ours in zip(one.features, ComputedFeatures(target).get(row(one)), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert first.number > 0 and second.number > 100 and not list(tmp_path.glob("*.safetensors"))


def test_every_server_is_compared_and_the_odd_one_named(target: Target, tmp_path: Path) -> None:
    target.tap((1, 3, 5))
    target.save(tmp_path / "target")
    texts = [[5, 6, 7, 11, 12, 13], [9, 8, 7, 14, 15, 16]]
    head = StateFolder(tmp_path, target.head_part, (1, 3, 5))
    head.head.name, name = str(tmp_path / "target"), head.head.name
    try:
        served = {}
        for url in ("http://a:1", "http://b:2"):
            served[url] = states_of_texts(Engine(target, head, tmp_path), texts)
        assert "within" in compare(served, head, texts) and "each of 2 servers" in compare(served, head, texts)
        odd = [RowFeatures(one.row, one.taps * 1.5, one.hidden) for one in served["http://b:2"]]
        with pytest.raises(UserError, match="the server at http://b:2: its states at tap 1 of"):
            compare(served | {"http://b:2": odd}, head, texts)
    finally:
        head.head.name = name
