"""Settings from files and flags: recipes are merged key by key, one setting has one value, unknown names are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redraft.cli.generate import pairs
from redraft.errors import UserError
from redraft.settings.base import merged, read, underscored
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.settings.steps import TrainSettings
from redraft.settings.studies import parse_study

ADAPT: dict[str, Any] = {"target": "t", "draft": "d", "prompts": "p", "out": "o"}
DISTILL: dict[str, Any] = {"target": "t", "out": "o", "prompts": "p", "text": ["x.txt"]}


def adapt(**given: Any) -> AdaptConfig:
    return AdaptConfig(**ADAPT | given)


def distill(**given: Any) -> DistillConfig:
    return read(DistillConfig, None, DISTILL | given)


# -- merging ---------------------------------------------------------------------------------------------------------
def test_flags_and_the_blocks_of_a_file_hold_together(tmp_path: Path) -> None:
    path = tmp_path / "adapt.yaml"
    path.write_text(
        "target: t\ndraft: d\nprompts: p\nout: o\n"
        "train: {epochs: 4, learning-rate: 2e-3, clip: 3}\nprivate: {alpha: 9, on: [q_proj]}\n"
    )
    found = read(AdaptConfig, path, {"train": {"learning_rate": 1e-3}, "private": {"alpha": 2.0}, "gamma": 2})
    train, size = found.train_config(), found.private_size
    assert (train.epochs, train.learning_rate, train.clip, train.gamma) == (4, 1e-3, 3, 2)
    assert (size.alpha, size.on) == (2.0, ("q_proj",))
    path.write_text(
        "target: t\nout: o\nprompts: p\ntext: [x.txt]\nalign: {epochs: 2, warmup: 0.1}\npretrain: {tokens: 5000}\n"
    )
    other = read(DistillConfig, path, {"align": {"epochs": 1.0}, "pretrain": {"length": 64}})
    assert (other.align_config().epochs, other.align_config().warmup) == (1, 0.1)
    assert (other.pretrain_config().tokens, other.pretrain_config().length) == (5000, 64)


def test_what_is_no_block_is_not_lost_under_a_flag() -> None:
    assert merged({"train": None, "gamma": 3}, {"train": {"clip": 2}}) == {"train": {"clip": 2}, "gamma": 3}
    with pytest.raises(UserError, match="train must hold settings as `name: value` lines, not 'epochs=4'"):
        merged({"train": "epochs=4"}, {"train": {"clip": 2}})
    with pytest.raises(UserError, match=r"a.yaml: train has batch_anchors twice"):
        underscored({"train": {"batch-anchors": 1, "batch_anchors": 2}}, "a.yaml")


# -- one setting, one value ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gamma": 3, "train": {"gamma": 7}}, "gamma is 3 and train gamma is 7"),
        ({"loss": "tv", "train": {"loss": "kl"}}, "loss is tv and train loss is kl"),
        ({"seed": 1, "train": {"seed": 2}}, "seed is 1 and train seed is 2"),
        ({"seed": 0, "train": {"seed": 2}}, "seed is 0 and train seed is 2"),
        ({"rank": 4, "private": {"rank": 8}}, "rank is 4 and private rank is 8"),
        ({"private_width": 64, "private": {"width": 32}}, "private-width is 64 and private width is 32"),
    ],
)
def test_two_values_of_one_setting_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"{said}: two values of one setting; give it once"):
        adapt(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"gamma": 3, "align": {"gamma": 7}},
        {"loss": "kl", "align": {"loss": "tvdpp"}},
        {"text_share": 0.2, "align": {"text_share": 0.1}},
        {"seed": 1, "align": {"seed": 2}},
        {"seed": 1, "pretrain": {"seed": 2}},
        {"align": {"seed": 1}, "pretrain": {"seed": 2}},
    ],
)
def test_two_values_in_distill(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="two values of one setting; give it once"):
        distill(**given)


def test_a_value_in_a_block_alone_is_the_runs_and_the_same_twice_is_one() -> None:
    found = adapt(train={"gamma": "7", "loss": "tv", "seed": 3})
    assert (found.gamma, found.loss, found.seed) == (7, "tv", 3)
    assert (found.train_config().gamma, found.train_config().loss, found.train_config().seed) == (7, "tv", 3)
    assert adapt(gamma=7, train={"gamma": 7.0}).gamma == 7
    assert adapt(rank=8, private={"rank": 8}).private_size.rank == 8
    assert adapt(private={"rank": 8}).private_size.rank == 8 and adapt(private={"rank": None}, rank=4).rank == 4
    other = distill(align={"gamma": 4, "text_share": 0.3}, pretrain={"seed": 5})
    assert (other.gamma, other.text_share, other.seed, other.align_config().seed) == (4, 0.3, 5, 5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"server_model": "m"}, "--server-model names the target on a server"),
        ({"top_p": 0.9}, "--top-p filters what is sampled, and all --temperatures are 0"),
        ({"server": "http://me:hush@h:1"}, "REDRAFT_API_KEY"),
        ({"server": "h:1"}, "is no address"),
        ({"server": "http://h:1,h:2"}, "'h:2' is no address"),
        ({"server": ["http://h:1", "http://me:hush@h:2"]}, "REDRAFT_API_KEY"),
        ({"server": "http://h:1,http://h:1/v1/"}, "server http://h:1 is given twice"),
        ({"gama": 3}, r"unknown setting gama \(did you mean gamma\?\)"),
        ({"max_new_token": 3}, r"unknown setting max-new-token \(did you mean max-new-tokens\?\)"),
        ({"train": {"epoch": 3}}, r"unknown setting epoch \(did you mean epochs\?\) in train"),
        ({"private": {"experst": 3}}, r"unknown setting experst \(did you mean experts\?\) in private"),
    ],
)
def test_settings_that_go_astray_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        adapt(**given)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("given", ["http://h:1,http://h:2", ["http://h:1", "http://h:2"], ["http://h:1, http://h:2"]])
def test_servers_are_several_with_commas_or_repeated(given: Any) -> None:
    assert adapt(server=given).server == ("http://h:1", "http://h:2") == distill(server=given).server
    assert adapt(server=None).server == () == adapt().server and adapt(server="http://h:1").server == ("http://h:1",)


def test_unknown_names_in_a_study_and_in_distill() -> None:
    with pytest.raises(UserError, match=r"unknown setting promts \(did you mean prompts\?\) in targets t"):
        parse_study({"name": "n", "targets": {"t": {"target": "t", "draft": "d", "promts": ["p"]}}})
    with pytest.raises(UserError, match=r"unknown setting heldout-promts \(did you mean heldout-prompts\?\)"):
        distill(heldout_promts=3)
    with pytest.raises(UserError, match="--server-model names the target on a server"):
        distill(server_model="m")


def test_flags_that_are_given_twice() -> None:
    assert pairs(["epochs=4", "batch-anchors = 5e3", "epochs=4"]) == {"epochs": "4", "batch_anchors": "5e3"}
    with pytest.raises(UserError, match=r"setting epochs is given twice, as 4 and as 5"):
        pairs(["epochs=4", "epochs=5"])
    with pytest.raises(UserError, match=r"'epochs' is not understood; write NAME=VALUE"):
        pairs(["epochs"])
    train = {"target": "t", "responses": "r", "out": "o", "draft": "d"}
    assert TrainSettings(**train, epochs=4, setting={"epochs": 4.0, "clip": 2}).train_config().clip == 2
    with pytest.raises(UserError, match="batch-anchors is 5 and setting batch_anchors is 6: two values"):
        TrainSettings(**train, batch_anchors=5, setting={"batch_anchors": 6})


def test_a_mistake_in_a_file_of_settings_names_the_file(tmp_path):
    file = tmp_path / "adapt.yaml"
    file.write_text("target: t\ndraft: d\nprompts: p\nout: o\ngama: 3\n")
    with pytest.raises(UserError, match=r"adapt\.yaml: unknown setting gama \(did you mean gamma\?\)"):
        read(AdaptConfig, file)
    with pytest.raises(UserError, match="missing") as flags:
        read(AdaptConfig, None, {"draft": "d"})
    assert ".yaml" not in str(flags.value)
