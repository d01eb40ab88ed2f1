"""Commands that ``torchrun`` starts in two processes: one training, one who writes and speaks."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.files import save_draft
from redraft.loading import tokenizer_hash
from redraft.target import Target

ROOT = Path(__file__).resolve().parents[2]
TINY = runpy.run_path(str(ROOT / "tests/tiny_models.py"))
# A loss that fails in the second process alone.
PLUGIN = """\
import os
from redraft.errors import UserError
from redraft.registries import LOSSES
KL = LOSSES.get("kl")
@LOSSES.register("brittle")
def brittle(*given, **named):
    if os.environ.get("RANK") == "1":
        raise UserError("the second one breaks")
    return KL(*given, **named)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, a draft for it, prompts and text."""
    folder = tmp_path_factory.mktemp("torchrun")
    target = Target(TINY["build_model"](), TINY["build_tokenizer"](), name="tiny", taps=(1, 3, 5))
    target.save(folder / "target")
    meta = {"target": {"name": "tiny", "hash": target.content_hash()}}
    meta["tokenizer_hash"] = tokenizer_hash(target.tokenizer)
    save_draft(folder / "draft", fresh_draft(target, range(60), seed=1), meta)
    words = "the hat is on a mat and so he sat there".split()
    asked = [" ".join(words[(i + j) % len(words)] for j in range(5)) + f" {i}" for i in range(28)]
    lines = [json.dumps({"id": f"p{i}", "messages": [{"role": "user", "content": a}]}) for i, a in enumerate(asked)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "text.txt").write_text("".join(f"{i} he sat there and then he sat\n" for i in range(1200)))
    (folder / "brittle.py").write_text(PLUGIN)
    return folder


def start(processes: int, *words: object) -> subprocess.Popen[str]:
    together = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *together, "-m", "redraft", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """(exit code, standard output, what redraft itself says on standard error)."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("redraft: ")]


def adapt(place: Path, out: Path, *more: object) -> list[object]:
    words = ["adapt", "--target", place / "target", "--draft", place / "draft", "--prompts", place / "prompts.jsonl"]
    words += ["--out", out, "--dtype", "float32", "--max-new-tokens", 20, "--bench-tokens", 6, "--bench-prompts", 2]
    words += ["--heldout-prompts", 5, "--batch-size", 4, "--gamma", 2, "--method", "fc"]
    for setting in ("epochs=5", "batch_anchors=48", "evaluate_every=4", "patience=0", *more):
        words += ["--train", setting]
    return words


def workers_of(process: subprocess.Popen[str]) -> Sequence[int]:
    """The processes that a torchrun has started, the first of them first."""
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return sorted(map(int, done.stdout.split()))


def test_two_processes_adapt_one_is_killed_and_one_ends_it(place: Path, tmp_path: Path) -> None:
    alone = ended(start(1, *adapt(place, tmp_path / "alone")))
    assert alone[0] == 0, alone
    process, state = start(2, *adapt(place, tmp_path / "two", "save_seconds=0")), tmp_path / "two/train/state.json"
    while process.poll() is None and not (state.exists() and json.loads(state.read_text())["state"]["step"] >= 2):
        time.sleep(0.05)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    code, out, said = ended(process)
    assert code == 1 and out.count("adapt: target") == 1, out
    assert [line for line in said if "has ended without a word" not in line and "terminated" not in line] == []
    code, out, said = ended(start(1, *adapt(place, tmp_path / "two", "save_seconds=0")))
    assert code == 0 and "train: held-out tau" in out, said
    found, expected = (json.loads((tmp_path / run / "train.json").read_text()) for run in ("two", "alone"))
    assert found["steps"] == expected["steps"] > 12
    assert [tau for _, tau in found["history"]] == pytest.approx([tau for _, tau in expected["history"]], abs=0.03)
    mine, theirs = (load_file(next((tmp_path / run / "train").glob("state-*.safetensors"))) for run in ("two", "alone"))
    for name in theirs:
        if name.startswith("weight/"):
            assert float((mine[name] - theirs[name]).abs().max()) < 1e-4, name


def test_two_processes_distil_and_only_the_first_speaks(place: Path, tmp_path: Path) -> None:
    words = [
        "distill",
        "--target",
        place / "target",
        "--text",
        place / "text.txt",
        "--prompts",
        place / "prompts.jsonl",
    ]
    words += ["--out", tmp_path, "--size", 0.9, "--heldout-share", 0.4, "--layers", 1, "--dtype", "float32"]
    words += ["--max-new-tokens", 8, "--heldout-prompts", 5]
    for block, settings in {
        "pretrain": ("tokens=1024", "length=32", "batch_tokens=128", "heldout_tokens=64", "precision=float32"),
        "align": ("epochs=1.0", "batch_anchors=64", "text_length=32", "precision=float32", "evaluate_every=2"),
    }.items():
        words += [word for setting in settings for word in (f"--{block}", setting)]
    code, out, said = ended(start(2, *words))
    assert code == 0 and said == []
    assert [out.count(line) for line in ("pretrain: held-out", "align: held-out", "drafter: ")] == [1, 1, 2], out
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert len({stage["stage"] for stage in ledger["stages"]}) == len(ledger["stages"])
    assert json.loads((tmp_path / "distill.json").read_text())["align"]["steps"] > 1
    assert not list(tmp_path.rglob(".*"))


def test_whoever_fails_first_says_so(place: Path, tmp_path: Path) -> None:
    code, _, said = ended(start(2, "--plugin", place / "brittle.py", *adapt(place, tmp_path / "run", "loss=brittle")))
    line = "redraft: error: process 1 of those that train together: the second one breaks"
    assert code == 1 and line in said and {*said} <= {line, said[-1], said[0]} and len(said) <= 2


def test_what_cannot_be_shared_is_refused_once(place: Path, tmp_path: Path) -> None:
    words = ["regenerate", "--target", place / "target", "--prompts", place / "prompts.jsonl", "--out", tmp_path / "r"]
    code, out, said = ended(start(2, *words))
    assert code == 1 and out == "" and not list(tmp_path.iterdir())
    assert said == [
        "redraft: error: 2 processes were started, and redraft regenerate cannot be shared among them; give it without "
        "torchrun (what can be: adapt, distill, train)"
    ]
