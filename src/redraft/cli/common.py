"""What the commands share: options, help that lists the registries' choices, and printing.

Nothing here imports torch; commands import the library when they run, so that ``redraft --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from rich.console import Console


def _losses() -> list[str]:
    from redraft.registries import LOSSES

    return LOSSES.names()


def _scorers() -> list[str]:
    from redraft.registries import SCORERS

    return SCORERS.names()


def _formats() -> list[str]:
    from redraft.registries import EXPORTERS

    return EXPORTERS.names()


def _methods() -> list[str]:
    from redraft.drafts.methods import METHODS

    return list(METHODS)


def _starts() -> list[str]:
    from redraft.registries import STARTS

    return STARTS.names()


def _suites() -> list[str]:
    from redraft.registries import SUITES

    return SUITES.names()


CHOICES: dict[str, Callable[[], list[str]]] = {
    "{losses}": _losses,
    "{scorers}": _scorers,
    "{formats}": _formats,
    "{methods}": _methods,
    "{starts}": _starts,
    "{suites}": _suites,
}


def _adapt() -> Any:
    from redraft.adaptation.config import AdaptConfig

    return AdaptConfig


def _distill() -> Any:
    from redraft.adaptation.distill_config import DistillConfig

    return DistillConfig


# Commands whose flags are the fields of a settings model: its defaults hold where neither flag nor file says anything.
SETTINGS: dict[str, Callable[[], Any]] = {"adapt": _adapt, "distill": _distill}


def _default(value: Any) -> str | bool:
    """A default as help shows it; nothing for what is empty or not there."""
    if value is None or value == () or isinstance(value, dict | bool):
        return False
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Command(TyperCommand):
    """Fills names of registries and defaults of settings into its help, when that is asked for and not before."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        fields = SETTINGS[self.name]().model_fields if self.name in SETTINGS else {}
        for parameter in self.params:
            if parameter.name in fields and not fields[parameter.name].is_required():
                parameter.show_default = _default(fields[parameter.name].get_default(call_default_factory=True))  # type: ignore[attr-defined]
            text = getattr(parameter, "help", None)
            for place, names in CHOICES.items():
                if text and place in text:
                    text = text.replace(place, ", ".join(names()))
            if text:
                parameter.help = text  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Say first what will be done. A key press is no defect: one line and the shell's own exit code for it.

        Raises ``UserError`` when a disk is full; any other surprise is one line, with its trace in a file.
        """
        from redraft.cli.failures import as_user_error, unexpected
        from redraft.cli.plans import announce, refuse_overwriting
        from redraft.errors import UserError

        name, out = str(self.name), ctx.params.get("out")
        try:
            refuse_overwriting(ctx.params)
            announce(name, ctx.params)
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("redraft: interrupted; the same command goes on where it can", file=sys.stderr)
            raise SystemExit(130) from None
        except (UserError, typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.find_root().params.get("debug"):
                raise
            if known := as_user_error(error, out):
                raise known from error

            print(unexpected(error, name, out), file=sys.stderr)
            raise SystemExit(1) from None


def examples(*commands: str) -> str:
    """The epilogue of a command's help: one example a line."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"[cyan]{command}[/cyan]" for command in commands)])


def console() -> Console:
    """Standard output for tables; wide enough for them where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def say(text: str) -> None:
    """One line of plain output."""
    print(text, flush=True)


def sampler_of(temperature: float, top_k: int, top_p: float) -> Any:
    """The sampler of these flags. Raises ``UserError`` for values out of range and for filters of a greedy choice."""
    from redraft.errors import UserError
    from redraft.sampling import Sampler

    if temperature == 0 and (top_k or top_p != 1):
        raise UserError("temperature 0 is greedy and leaves nothing to filter; drop --top-k and --top-p or raise it")
    return Sampler(temperature, top_k, top_p)


TargetName = Annotated[
    str, typer.Option("--target", help="Fine-tuned target: folder, hub id, or folder of an adapter.")
]
OptionalTarget = Annotated[str | None, typer.Option("--target", help="Fine-tuned target: folder, hub id or adapter.")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter to merge into --target.")]
TemplateArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg", help="Argument of the target's chat template, such as enable_thinking=false; repeatable."
    ),
]
BaseTarget = Annotated[str | None, typer.Option(help="The target that the old draft was made for.")]
DraftName = Annotated[str, typer.Option("--draft", help="Draft: redraft folder, EAGLE-3 checkpoint folder or hub id.")]
BaseDraft = Annotated[str | None, typer.Option(help="The shared draft, when --draft is a private part.")]
PrivateWidth = Annotated[
    int | None, typer.Option(min=1, help="Inner width of the private expert; by default a fifth of the draft.")
]
Rank = Annotated[int | None, typer.Option(min=1, help="Rank of the low-rank updates; by default a fifth of the draft.")]
Prompts = Annotated[str, typer.Option(help="Prompts: JSONL, ShareGPT, Alpaca, text lines, or datasets:NAME.")]
OptionalPrompts = Annotated[
    str | None, typer.Option("--prompts", help="Prompts: JSONL, ShareGPT, Alpaca, text lines, or datasets:NAME.")
]
Suites = Annotated[
    list[str] | None,
    typer.Option("--suite", help="Named prompts: {suites}; NAME:CATEGORY, NAME=FILE; repeatable."),
]
DataFolder = Annotated[
    Path | None, typer.Option("--data", help="Folder of the suites' files; by default that of REDRAFT_DATA.")
]
_DTYPE = typer.Option(help="Data type of the target: bfloat16, float32, or auto, the one this machine is faster in.")
Dtype = Annotated[str, _DTYPE]
OptionalDtype = Annotated[str | None, _DTYPE]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1, ...")]
Gamma = Annotated[int, typer.Option(min=1, help="Drafted tokens a round.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
OutFile = Annotated[Path, typer.Option("--out", "-o", help="File to write.")]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
