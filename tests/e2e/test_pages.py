"""The lines of README and of the user's pages, run in their order on a tiny model that has the names they use.

What is left out, and why, stands in :func:`runnable`; that those lines parse is tested in tests/unit/test_docs.py.
"""

from __future__ import annotations

import copy
import json
import random
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = "one two three four five six seven eight nine ten apples pears boxes cost each are there how many".split()
# What keeps a tiny run short, behind what the page says.
SMALL = {
    "probe": "--limit 6 --max-new-tokens 12",
    "adapt": "--max-new-tokens 12 --heldout-prompts 8 --bench-prompts 4 --bench-tokens 8 --train epochs=1",
    "regenerate": "--max-new-tokens 12",
    "bench": "--limit 4 --max-new-tokens 8",
    "watch": "--max-new-tokens 8",
}
TYPED = ("probe", "adapt", "regenerate", "bench", "watch", "vocabulary")
FENCE = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)

Run = Callable[[str], list[str]]


def runnable(page: str) -> Iterator[str]:
    """The page's redraft commands, without those that ask for a GPU, a running server or another page's output."""
    for block in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["redraft"] or words[1:2] == ["--version"]:
                continue
            if "cuda" in words or "--server" in words or any(word.startswith("out/") for word in words):
                continue
            # the tiny model's template takes no arguments
            yield shlex.join(words[1:]).replace(" --template-arg enable_thinking=false", "")


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory, builders: Any) -> Path:
    """A folder as a newcomer has it: base and fine-tuned model, a public draft of the base, prompts."""
    import peft
    import torch

    from redraft.drafts.eagle3 import fresh_draft
    from redraft.registries import EXPORTERS
    from redraft.target import Target

    folder = tmp_path_factory.mktemp("newcomer")
    target = Target(builders.build_model("llama", 0), builders.build_tokenizer(), name="base-model", taps=(1, 3, 5))
    target.save(folder / "base-model")
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(target.model), lora).save_pretrained(folder / "my-adapter")
    # Of few words, so that new ones make it better: an old draft that is not improved is kept, without a private part.
    EXPORTERS.get("plain")(fresh_draft(target, range(4, 20), seed=1), folder / "old-draft", target)
    generator = torch.Generator().manual_seed(1)
    for weight in target.model.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    target.save(folder / "my-model")
    order = random.Random(0)
    for name, count in {"prompts": 40, "eval": 6, "general-prompts": 60, "served": 6}.items():
        turns = [{"role": "user", "content": f"{name} {' '.join(order.choices(WORDS, k=5))} {i}"} for i in range(count)]
        rows = [json.dumps({"id": f"{name}-{i}", "messages": [turn]}) for i, turn in enumerate(turns)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def page(furnished: Path, monkeypatch: pytest.MonkeyPatch, redraft: Any) -> Run:
    """``page("README.md")`` runs the page's lines and returns them; a later page finds what an earlier one left."""
    monkeypatch.chdir(furnished)

    def run(name: str) -> list[str]:
        done = []
        for line in runnable(name):
            command = shlex.split(line)[0]
            more = SMALL.get(command, "") + (" --dtype float32" if command in TYPED else "")
            code, _, error = redraft(shlex.split(f"{line} {more}"))
            assert code == 0, f"{name}: redraft {line}\n{error}"
            done.append(line)
        return done

    return run


def test_the_lines_of_the_pages_run(page: Run, furnished: Path) -> None:
    assert [line.split()[0] for line in page("README.md")] == ["probe", "adapt", "bench"]
    shutil.copy(furnished / "run" / "responses.jsonl", furnished / "responses.jsonl")
    own = page("docs/own-model.md")
    assert {"probe", "adapt", "merge", "bench", "report", "export", "regenerate"} <= {line.split()[0] for line in own}
    assert (
        page("docs/serve/README.md")
        and page("docs/serve/vllm.md")
        and page("docs/acceptance.md")
        and page("docs/starts.md")
    )
    written = ("run/merged", "run/export-vllm", "run/report.html", "report.html", "milder", "draft-for-sglang")
    for place in (*written, "merged-target/model.safetensors"):
        assert (furnished / place).exists(), place


@pytest.mark.parametrize("name", ["README.md", "docs/api.md"])
def test_the_python_of_the_pages_runs(
    name: str, furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import redraft

    small = {"max_new_tokens": 12, "heldout_prompts": 4, "bench_prompts": 4, "bench_tokens": 8, "train": {"epochs": 1}}
    monkeypatch.setattr(redraft, "open_target", partial(redraft.open_target, dtype="float32"), raising=False)
    monkeypatch.setattr(redraft, "adapt", partial(redraft.adapt, **small), raising=False)
    for place in furnished.iterdir():
        if place.name in ("my-model", "old-draft", "prompts.jsonl"):
            (tmp_path / place.name).symlink_to(place)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(block, name, "exec"), {})
    assert "vllm" in capsys.readouterr().out and (tmp_path / "run" / "export-vllm").is_dir()
