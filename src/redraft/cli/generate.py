"""Commands out of settings: flags, help, checks and the first line follow from the model; a command adds its call.

Nothing here imports torch; commands import the library when they run.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
import yaml
from typer.core import TyperCommand, TyperGroup

from redraft.cli.failures import as_user_error, unexpected
from redraft.cli.plans import announce, check_places, refuse_overwriting
from redraft.cli.signals import stopped
from redraft.cli.together import refuse_copies
from redraft.errors import UserError
from redraft.registries import EXPORTERS, LOSSES, SCORERS, STARTS, SUITES
from redraft.settings.base import BlockOf, Settings, choices, read
from redraft.settings.texts import ENGINES, parse_template_args
from redraft.settings.training import METHODS

CHOICES: dict[str, Callable[[], list[str]]] = {
    "{losses}": LOSSES.names,
    "{scorers}": SCORERS.names,
    "{formats}": EXPORTERS.names,
    "{methods}": lambda: list(METHODS),
    "{starts}": STARTS.names,
    "{suites}": SUITES.names,
    "{engines}": lambda: list(ENGINES),
}
PANELS = {
    "Target": "target adapter base_target template_arg server server_model states server_only",
    "Draft": "source draft engine base_draft trainer taps private method private_width rank family vocabulary "
    "from_nothing start size layers embeddings tied from_layers scale",
    "Text": "results config prompts prompt responses eval_prompts suite data limit trained_on text text_field heldout "
    "heldout_responses heldout_prompts heldout_text heldout_share text_share general general_share selection scorer "
    "budget select_on order temperature temperatures top_p top_k max_new_tokens",
    "Training": "loss epochs batch_anchors learning_rate setting train align pretrain replay teacher top_logprobs "
    "store_states refresh",
    "Measuring": "gamma shape greedy_drafts static concurrency bench_prompts bench_tokens trial worst rejected",
    "Output": "out keep json_out exports format curve ledger summary png title report tables list_cells full",
    "Machine": "dtype device seed batch_size",
}
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}
DRY_RUN = ("adapt", "distill", "regenerate", "study", "train")
REQUIRED = " Required."
METAVARS = {int: "INTEGER", float: "FLOAT", str: "TEXT", Path: "PATH", dict: "NAME=VALUE"}


class Command(TyperCommand):
    """Fills the registries' names into its help, and tells failures as people can use them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            if text := getattr(parameter, "help", None):
                parameter.help = filled_in(text)  # type: ignore[attr-defined]
        without_types(self, ctx)
        super().format_help(ctx, formatter)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words of the usage line; what is required has no brackets, although a file of settings may say it."""
        words = {f"[{one.metavar}]" for one in self.params if is_required_word(one)}  # type: ignore[attr-defined]
        pieces = super().collect_usage_pieces(ctx)
        return [one.replace("[", "").replace("]", "") if one.removesuffix("...") in words else one for one in pieces]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Say what stands without a flag, to whoever gives it with the one that other commands have for it."""
        known = {flag for parameter in self.params for flag in parameter.opts}
        given = {arg.partition("=")[0] for arg in args} - known
        for one in (one for one in self.params if one.param_type_name == "argument"):
            word = str(one.metavar)  # type: ignore[attr-defined]
            if wrong := given & {f"--{one.name}", f"--{word.lower()}"}:
                raise UserError(
                    f"{self.name} takes {word} without a flag, not as {min(wrong)}: redraft {self.name} {word}"
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run it. Raises ``UserError`` when a disk is full; other surprises are one line, with the trace in a file."""
        name = str(self.name)
        try:
            return super().invoke(ctx)
        except (UserError, typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.find_root().params.get("debug"):
                raise
            out = ctx.params.get("out")  # also where a file of settings says so
            if known := as_user_error(error, out):
                raise known from error
            print(unexpected(error, name, out), file=sys.stderr)
            raise SystemExit(1) from None


class Application(TyperGroup):
    """A key press or SIGTERM is no defect: one line and the shell's own exit code for it, also while the words of a
    command are read."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        with _told():
            return super().make_context(*args, **more)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        without_types(self, ctx)
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        with _told():
            return super().invoke(ctx)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise stopped(error) from None


def add_command(app: typer.Typer, kind: type[Settings], call: Callable[[Any], None], examples: Sequence[str]) -> None:
    """Add the command of the settings ``kind`` to ``app``: ``call`` does the work, its docstring is the help."""
    name = kind.COMMAND

    def run(ctx: typer.Context, **given: Any) -> None:
        path, dry_run = given.pop("settings_file", None), given.pop("dry_run", False)
        refuse_copies(name)
        flags = {key: value for key, value in given.items() if value not in (None, [])}
        settings = read(kind, path, {key: _meant(kind.model_fields[key], value) for key, value in flags.items()})
        ctx.params["out"] = getattr(settings, "out", None)
        with _placed(path, settings, flags):
            refuse_overwriting(settings)
            announce(settings)
            check_places(settings)
            if dry_run:
                from redraft.adaptation.estimate import plan

                print("\n".join(plan(settings)))
            else:
                call(settings)

    hints = {"ctx": typer.Context} | dict(_parameters(kind))
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(key, keyword, default=None, annotation=hint) for key, hint in hints.items()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = hints
    run.__doc__ = call.__doc__
    shown = "\n\n".join(["[bold]Examples[/bold]", *(f"[cyan]{example}[/cyan]" for example in examples)])
    app.command(name=name, cls=Command, epilog=shown)(run)


@contextmanager
def _placed(path: Path | None, settings: Settings, flags: Collection[str]) -> Iterator[None]:
    """An error that begins with a value of the settings file says where that value stands."""
    try:
        yield
    except UserError as error:
        if path is None or str(path) in str(error):
            raise
        for name in settings.model_fields_set.difference(flags):
            value = getattr(settings, name)
            for one in value if isinstance(value, tuple) else [value]:
                if isinstance(one, str | Path) and str(error).startswith(f"{one} "):
                    raise UserError(f"{error} ({name} in {path})") from error
        raise


def _meant(field: Any, value: Any) -> Any:
    """What a flag gave; ``NAME=VALUE`` texts as a mapping, so that it holds together with that of a file."""
    if get_origin(field.annotation) is not dict:
        return value
    block = any(isinstance(mark, BlockOf) for mark in field.metadata)
    return pairs(value) if block else parse_template_args(value)


def pairs(given: list[str]) -> dict[str, str]:
    """``NAME=VALUE`` texts as texts by their names. Raises ``UserError``, also for two values of one name."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name:
            raise UserError(f"setting {text!r} is not understood; write NAME=VALUE, as epochs=4")
        if found.setdefault(name.replace("-", "_"), value) != value:
            raise UserError(f"setting {name} is given twice, as {found[name.replace('-', '_')]} and as {value}")
    return found


def without_types(command: Any, ctx: Any) -> None:
    """Let help name no type beside flags that take no value (newer typers write ``<bool>`` there)."""
    for option in command.get_params(ctx):
        if getattr(option, "is_flag", False):
            option.metavar = ""


def is_required_word(parameter: Any) -> bool:
    """Whether it is an argument that a command cannot do without."""
    return parameter.param_type_name == "argument" and str(parameter.help or "").endswith(REQUIRED)


def filled_in(text: str) -> str:
    """A help text with the registries' names in it."""
    for place, names in CHOICES.items():
        if place in text:
            text = text.replace(place, ", ".join(names()))
    return text


# -- parameters --------------------------------------------------------------------------------------------------------
def _parameters(kind: type[Settings]) -> Iterator[tuple[str, Any]]:
    """(name, annotation) of every flag, panel by panel."""
    if "config" not in kind.model_fields:
        help = "YAML file with any of these settings (`redraft config` prints one); flags win, key by key."
        option = typer.Option("--config", help=help, metavar="PATH", rich_help_panel="Running")
        yield "settings_file", Annotated[Path | None, option]
    if kind.COMMAND in DRY_RUN:
        help = "Print the plan and what it costs, and stop."
        yield "dry_run", Annotated[bool | None, typer.Option("--dry-run", help=help, rich_help_panel="Running")]
    for name in filter(kind.model_fields.__contains__, PANEL_OF):
        field: Any = kind.model_fields[name]
        extra: Any = field.json_schema_extra
        plain = next(one for one in choices(field.annotation) if one is not NoneType)
        several = get_origin(plain) in (tuple, dict)
        kept = get_args(plain)[0] if get_origin(plain) is tuple else get_origin(plain) or plain
        hint: Any = list[str] | None if several else str | None
        about: dict[str, Any] = {"help": sentence(field), "show_default": shown_default(field)}
        if extra["argument"]:
            word = "RESULT" if several else "DRAFT" if extra["reads"] == "model" else "FILE"
            yield name, Annotated[hint, typer.Argument(metavar=word, **about)]
            continue
        about["rich_help_panel"], flag = PANEL_OF[name], extra["flag"] or f"--{name.replace('_', '-')}"
        if plain is bool:
            no = "" if field.default is False else "/--untied" if name == "tied" else f"/--no{flag[1:]}"
            yield name, Annotated[bool | None, typer.Option(flag + no, **about)]
        else:
            flags = [flag, "-o"] if name == "out" else [flag]
            yield name, Annotated[hint, typer.Option(*flags, metavar=METAVARS.get(kept, "TEXT"), **about)]


def sentence(field: Any) -> str:
    """The help of a setting as a sentence."""
    text = field.description.rstrip(".")
    return f"{text[:1].upper()}{text[1:]}.{REQUIRED if field.is_required() else ''}"


def shown_default(field: Any) -> str | bool:
    """A default as help shows it; nothing for what is empty or not there."""
    value = None if field.is_required() else field.get_default(call_default_factory=True)
    if value is None or value == () or isinstance(value, dict | bool):
        return False
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# -- settings as YAML --------------------------------------------------------------------------------------------------
def template(kind: type[Settings]) -> str:
    """All settings of a command as YAML with their help: required ones to fill in, the others at their defaults.

    Optional ones are comments, so that only what is changed counts as given; without their marks they are the defaults.
    """
    blocks = kind.model_construct().blocks()
    lines = [f"# Settings of `redraft {kind.COMMAND}`: `redraft {kind.COMMAND} --config FILE`; flags win, key by key."]
    for panel, names in PANELS.items():
        fields = [(name, kind.model_fields[name]) for name in names.split() if name in kind.model_fields]
        lines += ["", f"# -- {panel} {'-' * (100 - len(panel))}"] if fields else []
        for name, field in fields:
            lines += textwrap.wrap(filled_in(sentence(field)), 116, initial_indent="# ", subsequent_indent="# ")
            if field.is_required():
                lines.append(f"{name}:")
            elif name in blocks:
                lines += [f"# {name}:", *_block(blocks[name], kind.ONCE.get(name, {}).values())]
            else:
                lines.append(f"# {_line(name, field.get_default(call_default_factory=True))}")
    return "\n".join(lines) + "\n"


def _block(recipe: Any, above: Collection[str]) -> Iterator[str]:
    """The settings of a block; those ``above`` it have their place there."""
    for name, field in recipe.__pydantic_fields__.items():
        if name not in above:
            yield f"#   {_line(name, getattr(recipe, name)):<30}  # {field.description}"


def _line(name: str, value: Any) -> str:
    """``name: value`` in one line of YAML."""
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=1000)
    return f"{name}: {text.removesuffix('...' + chr(10)).strip()}"
