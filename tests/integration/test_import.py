"""`redraft import`: the table, the folder it writes, and what is left behind where it refuses (nothing)."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from redraft.drafts.opening import open_checkpoint
from redraft.registries import EXPORTERS

SHARED = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "contracts" / "export_families.py")))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A draft and the config of its target, which is all that is read of one."""
    monkeypatch.chdir(tmp_path)
    SHARED.TARGET.config.save_pretrained("target")
    EXPORTERS.get("plain")(SHARED.EAGLE3.make(), "theirs", SHARED.TARGET)
    return tmp_path


def test_a_draft_is_written_in_our_own_format_and_every_value_is_told(place, redraft):
    code, out, _ = redraft("import theirs --target target --out ours --json table.json")
    assert code == 0 and "rope_parameters" in out and "on whose word" in out and "eagle3 draft of" in out
    SHARED.EAGLE3.assert_same(SHARED.EAGLE3.make(), open_checkpoint("ours", SHARED.TARGET).draft)
    told = json.loads((place / "table.json").read_text())
    assert {"what": "taps", "value": [2, 4, 5], "how": "read"}.items() <= next(
        entry for entry in told["entries"] if entry["what"] == "taps"
    ).items()
    kept = json.loads((place / "ours" / "redraft.json").read_text())
    assert kept["imported"]["entries"] == told["entries"]
    assert kept["target"] == {"name": None, "hash": None}  # the file names none, and the one at hand may be a tuned one


def test_without_a_target_the_file_must_tell_all(place, redraft):
    assert redraft("import theirs --out ours --taps 1,2,6")[0] == 0
    assert open_checkpoint("ours", SHARED.TARGET).draft.config.taps == (1, 2, 6)
    SHARED.rewrite(place / "theirs", eagle_aux_hidden_state_layer_ids=None, eagle_config=None)
    code, _, error = redraft("import theirs --out other")
    assert code == 2 and "give --target, whose default they are, or --taps" in error


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"rope_theta": -1.0}, "", "rope_theta is -1.0"),
        ({"hidden_act": "gelu"}, "", "hidden_act 'gelu'"),
        ({}, "--trainer specforge-0.3", "did you mean specforge"),
        ({}, "--taps 4,2,6", "must ascend"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(place, redraft, change, words, message):
    SHARED.rewrite(place / "theirs", **change)
    code, _, error = redraft(f"import theirs --target target --out ours {words}")
    assert code == 2 and message in error and error.count("\n") == 1
    assert sorted(path.name for path in place.iterdir()) == ["target", "theirs"]
