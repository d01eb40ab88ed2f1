"""A standalone draft by the command line: watch, probe, bench, report and export, on a tiny pair."""

from __future__ import annotations

import json

import pytest

from redraft.drafts.files import save_draft
from redraft.drafts.standalone.shapes import fresh_standalone


@pytest.fixture
def pair(world, tiny_target):
    """``world`` with ``half``, the target's first two layers as a draft."""
    target = tiny_target("llama")
    save_draft(world / "half", fresh_standalone(target, layers=[0, 1]), {"method": "pretrain"})
    return world


def test_every_command_takes_a_standalone_draft(pair, tmp_path, redraft):
    common = f"--target {pair}/target --dtype float32 --prompts {pair}/prompts.jsonl"
    code, out, err = redraft(f"watch {common} --draft {pair}/half --shape chain:3 --max-new-tokens 12")
    assert code == 0 and "tau" in out, err
    code, out, err = redraft(
        f"probe {common} --draft {pair}/half --limit 4 --gamma 3 --max-new-tokens 12 --json {tmp_path}/probe.json"
    )
    assert code == 0 and json.loads((tmp_path / "probe.json").read_text())["tau"]["value"] >= 1, err
    bench = f"bench {common} --limit 3 --max-new-tokens 10"
    code, out, err = redraft(
        f"{bench} --draft eagle={pair}/draft --draft half={pair}/half --shape chain:3 --out {tmp_path}/b.json"
    )
    assert code == 0, err
    result = json.loads((tmp_path / "b.json").read_text())
    figures = result["drafts"]["half"]
    assert figures["identical_to_plain"] == 3 and result["setup"]["gamma"] == 3
    assert 1 <= figures["tau_pooled"]["value"] <= 4 and figures["mbsu"]["bytes"]["value"] > 0
    code, out, err = redraft(f"report {tmp_path}/b.json --out {tmp_path}/b.html")
    assert code == 0 and "half" in (tmp_path / "b.html").read_text(), err
    code, out, err = redraft(f"{bench} --draft {pair}/half --shape auto --out {tmp_path}/auto.json")
    assert code == 0 and "shape auto" in out, err


def test_bad_input_is_one_line_and_exit_code_two(pair, tmp_path, redraft):
    common = f"--target {pair}/target --dtype float32 --prompts {pair}/prompts.jsonl --draft {pair}/half"
    for command, words in (
        (f"bench {common} --shape tree:3x4x10 --limit 2 --out {tmp_path}/b.json", "proposes chains"),
        (f"export --target {pair}/target --draft {pair}/half --format vllm --out {tmp_path}/x", "export hf"),
        (f"export --target {pair}/target --draft {pair}/half --format gguf --out {tmp_path}/x", "no byte-level BPE"),
        (f"adapt {common} --out {tmp_path}/run", "redraft distill --draft"),
    ):
        code, out, err = redraft(command)
        said = " ".join((out + err).split())
        assert code == 2 and words in said and "Traceback" not in said, said
