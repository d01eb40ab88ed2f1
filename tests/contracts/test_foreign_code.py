"""No model, tokenizer, config, adapter, draft or template brings code that runs, and nobody is asked whether it may."""

from __future__ import annotations

import ast
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from redraft.data.template import template_ids
from redraft.errors import UserError
from redraft.loading import read_facts
from redraft.loading.places import locate, open_config

SOURCE = Path(__file__).resolve().parents[2] / "src" / "redraft"
# Loaders that know no code of a checkpoint: a table of torch, and PEFT's own classes, which a config cannot name.
KNOW_NO_CODE = {"nn.Embedding", "peft.PeftConfig", "peft.PeftModel"}
# Calls that run what they are given; in the package a plugin that the user names is the one thing that is.
RUNNERS = {"exec", "eval", "compile", "__import__"}
EVIL = "import pathlib\npathlib.Path({mark!r}).write_text('ran')\nclass Evil:\n    pass\n"


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Where, the whole name that is called, and the call, of every call in the package."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", ast.unparse(node.func), node


def test_every_opening_says_that_no_code_is_to_be_run() -> None:
    opened = 0
    for place, name, call in calls():
        owner, _, method = name.rpartition(".")
        if method not in ("from_pretrained", "from_config") or owner in KNOW_NO_CODE:
            continue
        opened += 1
        said = {keyword.arg: keyword.value for keyword in call.keywords}.get("trust_remote_code")
        assert isinstance(said, ast.Constant) and said.value is False, f"{place}: {name} leaves it to the checkpoint"
    assert opened >= 6, "the walk finds the openings that there are"


def test_nothing_else_runs_what_it_is_given() -> None:
    for place, name, call in calls():
        bare = name.rpartition(".")[2] if not name.startswith(("re.", "torch.", "model.")) else ""
        assert bare not in RUNNERS or name.startswith("self.") or "." in name, f"{place}: {name}"
        if name.endswith("torch.load"):
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert said.get("weights_only") == "True", place
        assert name not in ("pickle.load", "pickle.loads", "jinja2.Template", "Template"), place


# -- folders that ask for it -----------------------------------------------------------------------------------------
ASKS: dict[str, dict[str, dict[str, Any]]] = {
    "the config": {"config.json": {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}},
    "the model": {
        "config.json": {
            "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
            "model_type": "evil",
            "architectures": ["Evil"],
        }
    },
    "the model, of a type that is known": {
        "config.json": {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "architectures": ["Evil"]}
    },
    "the tokenizer": {
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
            "tokenizer_class": "Evil",
        }
    },
    "kernels for attention": {"config.json": {"attn_implementation": "somebody/kernel"}},
    "kernels of a known house": {"config.json": {"attn_implementation": "kernels-community/flash-attn2"}},
}


@pytest.fixture
def asking(tmp_path: Path, tiny_target: Any) -> Any:
    """``asking("the model")`` -> (a folder that asks for its own code, the file that the code would write)."""

    def make(what: str) -> tuple[Path, Path]:
        folder, mark = tmp_path / "model", tmp_path / "mark"
        tiny_target().save(folder)
        for name in ("evil.py", "modeling_evil.py", "custom_generate/generate.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(EVIL.format(mark=str(mark)))
        for name, changes in ASKS.get(what, {}).items():
            file = folder / name
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder, mark

    return make


@pytest.mark.parametrize("what", ASKS)
def test_a_folder_that_needs_its_own_code_is_refused_in_one_line(asking: Any, what: str) -> None:
    from redraft.loading import load_target

    folder, mark = asking(what)
    with pytest.raises(UserError, match=r"code|auto_map|model type|evil") as caught:
        load_target(str(folder))
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
    with pytest.raises(UserError):
        read_facts(str(folder))
        open_config(locate(str(folder)), str(folder))
        load_target(str(folder))
    assert not mark.exists()


def test_code_files_that_nobody_asks_for_are_left_aside(asking: Any) -> None:
    from redraft.loading import load_target

    folder, mark = asking("nothing")
    load_target(str(folder))
    assert not mark.exists()


def test_nothing_is_asked_at_a_terminal(asking: Any, tmp_path: Path) -> None:
    """In a process of its own, at a terminal: the line comes without a question, and without anybody's answer."""
    folder, mark = asking("the model")
    (folder / "tokenizer_config.json").write_text(json.dumps(ASKS["the tokenizer"]["tokenizer_config.json"]))
    script = (
        "import sys\n"
        "from redraft.errors import UserError\n"
        "from redraft.loading import load_target, load_tokenizer, read_facts\n"
        "assert sys.stdin.isatty() and sys.stdout.isatty()\n"
        "for opened in (load_target, load_tokenizer, read_facts):\n"
        "    try:\n"
        f"        opened({str(folder)!r})\n"
        "    except UserError as error:\n"
        "        print('refused:', error)\n"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                said += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    assert process.wait(10) == 0, said.decode(errors="replace")
    text = said.decode(errors="replace")
    assert text.count("refused:") == 3 and "[y/N]" not in text and "Do you" not in text
    assert not mark.exists()


# -- templates -------------------------------------------------------------------------------------------------------
TEMPLATES = {
    "an attribute that leads out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a list that is changed": "{{ messages.append(1) }}",
    "globals of a function": "{{ cycler.__init__.__globals__['os'].getpid() }}",
    "a file": "{% include '/etc/hostname' %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_template_cannot_leave_its_sandbox(tiny_tokenizer: Any, template: str) -> None:
    tiny_tokenizer.chat_template = template
    with pytest.raises(UserError) as caught:
        template_ids(tiny_tokenizer, "c", [{"role": "user", "content": "hello"}])
    assert len(str(caught.value).splitlines()) == 1
