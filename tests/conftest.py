"""Fixtures that tests of all folders share: tiny targets, a tiny tokenizer, the command line.

Nothing heavy is imported at the top: the process that hands the tests out to workers loads this file too, and loading
torch takes it seconds for which every worker waits.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

# The command line silences what libraries say, unless somebody asked to hear it: here the tests do, for a warning of a
# call of ours is an error (see pyproject.toml).
sys.warnoptions.append("default")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from redraft.target import Facts, Target


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from threads, and threads fight over the cores of small machines."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def builders() -> SimpleNamespace:
    """What ``tiny_models.py`` defines."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_models.py"))))


@pytest.fixture
def tiny_tokenizer(builders: SimpleNamespace) -> PreTrainedTokenizerFast:
    return builders.build_tokenizer()


@pytest.fixture(scope="session")
def tiny_target(builders: SimpleNamespace) -> Callable[..., Target]:
    """``tiny_target(architecture="llama", seed=0, taps=None, **config)`` -> a fresh random float32 Target."""

    from redraft.target import Target

    def make(architecture: str = "llama", seed: int = 0, taps: tuple[int, ...] | None = None, **config: Any) -> Target:
        model = builders.build_model(architecture, seed, **config)
        return Target(model, builders.build_tokenizer(), name=f"tiny-{architecture}", taps=taps)

    return make


@pytest.fixture(scope="session")
def tiny_facts() -> Callable[..., Facts]:
    """``tiny_facts(tokenizer, hash="cafe", **config)`` -> what is known of a target of the tiny tokenizer's size."""

    from transformers import AutoConfig

    from redraft.target import Facts

    def make(tokenizer: Any, hash: str = "cafe", **config: Any) -> Facts:
        shape = {"vocab_size": 128, "max_position_embeddings": 512, "eos_token_id": 2, "hidden_size": 32}
        return Facts("tiny", AutoConfig.for_model("llama", **(shape | config)), tokenizer, fingerprint=lambda: hash)

    return make


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """``full_disk()`` leaves a thousand bytes free from then on."""
    usage = SimpleNamespace(total=10**9, used=10**9, free=1000)
    return lambda: monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)


@pytest.fixture
def redraft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``redraft("report x.json")``, or the words in a list -> (exit code, standard output, standard error)."""

    from redraft.cli.main import main

    def run(command: str | list[str]) -> tuple[int, str, str]:
        words = command.split() if isinstance(command, str) else command
        monkeypatch.setattr(sys, "argv", ["redraft", *words])
        pressed = signal.getsignal(signal.SIGINT)
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            signal.signal(signal.SIGINT, pressed)  # a command that was interrupted leaves a second one to the system
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
