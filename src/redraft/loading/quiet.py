"""Other libraries without their chatter: what is wrong comes out as one line of ours."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from redraft.errors import UserError


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and warnings; what is wrong comes out as an error of ours."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # Some bars know no switch; they write to the standard error of the moment.
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message with the next one where it ends in a colon; at most 300 characters."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    return text[:300]


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever a library raises over the files of ``what`` into one ``UserError``.

    Loaders run over files of strangers and raise every kind of error for a bad value in one.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be loaded: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What a library says is wrong with a file, in one line and with the way out where it is known."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it asks to run Python code of its own (auto_map), which redraft never does; "
            "use a model and tokenizer that transformers has itself"
        )
    if "AutoModelForCausalLM" in text:
        return "its architecture is no causal language model"
    if type(error).__name__ == "SafetensorError":
        return f"a weight file is damaged ({first_line(error)}); copy or download it again"
    if "weights_only" in text or "Weights only load failed" in text:
        return "its pickle file holds more than tensors and is not read; convert the weights to safetensors"
    return first_line(error)
