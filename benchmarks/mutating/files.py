"""Mutations of files: damaged, doubled, of another kind, of torch's older kind, beside the weights, oddly named.

Pickles here hold, at worst, a call of ``print`` whose word must not be seen.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from torch import nn

from mutating.base import EITHER, RAN, REFUSE, SAME, Expect, Mutation
from mutating.sources import Source
from mutating.tables import held, saved

INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"


class Says:
    """Says so when it is unpickled."""

    def __reduce__(self) -> Any:
        return print, (RAN,)


class Ordered(OrderedDict[str, Any]):
    """A class that is not torch's."""


def mutation(kind: str, what: str, apply: Callable[[Path], Any], names: tuple[str, ...], expect: Expect) -> Mutation:
    return Mutation(f"files: {kind}", what, apply, names, expect)


# -- one file of tensors -----------------------------------------------------------------------------------------------
def damaged(source: Source, rng: random.Random) -> Mutation:
    """The file of tensors, no longer whole."""
    path = source.weights
    data = path.read_bytes()
    cut = rng.randrange(1, len(data))
    flip = rng.randrange(8)
    ways: dict[str, bytes] = {
        "empty": b"",
        "of seven bytes": data[:7],
        f"cut at byte {cut} of {len(data)}": data[:cut],
        "without its last byte": data[:-1],
        "of zeros": bytes(len(data)),
        "of words": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        f"with byte {flip} of its head flipped": data[:flip] + bytes([data[flip] ^ 0xFF]) + data[flip + 1 :],
    }
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        head, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
        name = rng.choice([key for key in head if key != "__metadata__"])

        def headed(**changes: Any) -> bytes:
            new = json.dumps({**head, name: {**head[name], **changes}}).encode()
            return len(new).to_bytes(8, "little") + new + rest

        start, end = head[name]["data_offsets"]
        ways |= {
            "with a byte more": data + b"\x00",
            "with a head of 2^60 bytes": (1 << 60).to_bytes(8, "little") + data[8:],
            "with a head of no bytes": bytes(8) + data[8:],
            f"with {name} of an unknown type": headed(dtype="F3"),
            f"with {name} of a negative size": headed(shape=[-1, *head[name]["shape"]]),
            f"with {name} of a size beyond all": headed(shape=[1 << 62, 1 << 62]),
            f"with {name} beyond the end": headed(data_offsets=[start + len(data), end + len(data)]),
            f"with {name} end before start": headed(data_offsets=[end, start]),
            "with a list for a head": len(b"[1]").to_bytes(8, "little") + b"[1]" + rest,
        }
    way = rng.choice(list(ways))
    apply = lambda folder: (folder / path.name).write_bytes(ways[way])  # noqa: E731
    # A zip has bytes in its head that nobody needs.
    expect = EITHER if path.suffix == ".bin" and "flipped" in way else REFUSE
    return mutation("damaged", f"{path.name} {way}", apply, (path.name, *about_files(source)), expect)


def about_files(source: Source) -> tuple[str, ...]:
    """What a refusal may name where the weights as a whole are meant: the folder stands in every message."""
    return ("weights", "safetensors", "does not exist", "file")


def special(source: Source, rng: random.Random) -> Mutation:
    """Something that is no file in the place of one. Root reads what nobody may, so rights are not tried."""
    name = rng.choice([source.json, source.weights.name, INDEX, "d2t.pt", "vocab_mapping.pt", BIN])
    needed = name in (source.json, source.weights.name)
    way = rng.choice(["a folder", "a pipe", "a link to nowhere", "a link to itself", "not there"])

    def apply(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        if way == "a folder":
            path.mkdir()
        elif way == "a pipe":
            os.mkfifo(path)
        elif way.startswith("a link"):
            path.symlink_to(folder / name if way.endswith("itself") else folder / "nowhere")

    same = SAME if way == "not there" or name in ("d2t.pt", "vocab_mapping.pt", BIN) else EITHER
    if (source.folder / name).exists() and not needed:
        same = EITHER
    return mutation("no file", f"{name} is {way}", apply, (name, *about_files(source)), REFUSE if needed else same)


def several(source: Source, rng: random.Random) -> Mutation:
    """The tensors in several files, with and without an index."""
    state = held(source)
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    listed = {name: file for file, part in halves.items() for name in part}

    def split(listed: Any, file: str = INDEX) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            (folder / source.weights.name).unlink()
            (folder / INDEX).unlink(missing_ok=True)
            for half, part in halves.items():
                save_file({name: state[name].contiguous() for name in part}, folder / half, {"format": "pt"})
            if listed is not None:
                (folder / file).write_text(json.dumps(listed) if not isinstance(listed, str) else listed)

        return apply

    def beside(more: dict[str, Any], file: str) -> Callable[[Path], None]:
        return lambda folder: save_file(more, folder / file)

    first = names[0]
    wrong = dict(listed)
    outside = {**listed, first: "../a.safetensors"}
    ways: dict[str, tuple[Callable[[Path], None], Expect]] = {
        "two files, no index": (split(None), SAME),
        "two files and their index": (split({"weight_map": wrong}), SAME),
        "an index that lists one of two files": (split({"weight_map": dict.fromkeys(names, "a.safetensors")}), REFUSE),
        "an index that lists a file that is not there": (
            split({"weight_map": {**listed, first: "c.safetensors"}}),
            REFUSE,
        ),
        "an index that lists a file elsewhere": (split({"weight_map": outside}), REFUSE),
        "an index that lists an absolute path": (split({"weight_map": {**listed, first: "/a.safetensors"}}), REFUSE),
        "an index of numbers": (split({"weight_map": dict.fromkeys(names, 1)}), REFUSE),
        "an index of nothing": (split({"weight_map": {}}), REFUSE),
        "an index without a map": (split({"metadata": {}}), REFUSE),
        "an index that is no JSON": (split("{"), REFUSE),
        "an index that is a list": (split([1]), REFUSE),
        "a second file with a tensor of the first": (beside({first: state[first]}, "more.safetensors"), REFUSE),
        "a second file with a strange tensor": (beside({"strange": torch.ones(2)}, "more.safetensors"), REFUSE),
        "a second file that is empty": (lambda folder: (folder / "more.safetensors").write_bytes(b"") and None, REFUSE),
        "an adapter's file beside": (beside({"x": torch.ones(2)}, "adapter_model.safetensors"), SAME),
        "words beside": (lambda folder: (folder / "README.md").write_text("words") and None, SAME),
    }
    way = rng.choice(list(ways))
    apply, expect = ways[way]
    indexed = (source.folder / INDEX).is_file()
    if indexed and way.startswith("a second file"):
        expect = EITHER  # the index lists what counts
    if source.weights.suffix == ".bin" and way.startswith(("a second file", "an adapter")):
        expect = Expect(True, SAME.reads)
    names_ = (
        "index",
        "missing",
        "more.safetensors",
        "a second time",
        "strange",
        "lacks",
        "width",
        *names,
        *about_files(source),
    )
    return mutation("several", way, apply, names_, expect)


# -- torch's older kind ------------------------------------------------------------------------------------------------
def pickled(source: Source, rng: random.Random) -> Mutation:
    """The tensors in a file of torch's older kind, and what else such a file can hold."""
    state: dict[str, Any] = held(source)
    first = next(name for name, tensor in state.items() if tensor.ndim == 2)
    wide = state[first]

    def file(content: Any, **how: Any) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            for path in [*folder.glob("*.safetensors"), folder / INDEX, folder / BIN]:
                path.unlink(missing_ok=True)
            torch.save(content, folder / BIN, **how)

        return apply

    def then(apply: Callable[[Path], None], data: Callable[[bytes], bytes]) -> Callable[[Path], None]:
        def changed(folder: Path) -> None:
            apply(folder)
            (folder / BIN).write_bytes(data((folder / BIN).read_bytes()))

        return changed

    old = {"_use_new_zipfile_serialization": False}
    cut = rng.random()
    parameters = {name: nn.Parameter(t) if t.is_floating_point() else t for name, t in state.items()}
    ways: dict[str, tuple[Callable[[Path], None], Expect]] = {
        "as it is": (file(state), SAME),
        "in the layout before zip": (file(state, **old), SAME),
        "as an OrderedDict": (file(OrderedDict(state)), SAME),
        "as parameters": (file(parameters), SAME),
        "with one turned in place": (file(state | {first: wide.T.contiguous().T}), SAME),
        "with one as a view of more": (file(state | {first: torch.cat([wide, wide])[: len(wide)]}), EITHER),
        "with a word that is run": (file({**state, "more": Says()}), REFUSE),
        "with a word that is run, before zip": (file({**state, "more": Says()}, **old), REFUSE),
        "a word that is run alone": (file(Says()), REFUSE),
        "as a class of somebody's": (file(Ordered(state)), REFUSE),
        "under a key": (file({"model": state}), REFUSE),
        "with the step of training": (file({**state, "step": 3}), REFUSE),
        "with a number for a name": (file({**state, 7: torch.ones(1)}), REFUSE),
        "with numpy's numbers": (file({**state, first: wide.float().numpy()}), REFUSE),
        "as a list": (file(list(state.values())), REFUSE),
        "as a module": (file(nn.Linear(2, 2)), REFUSE),
        "none": (file(None), REFUSE),
        "with a tensor without numbers": (file({**state, first: torch.empty_like(wide, device="meta")}), REFUSE),
        "with a sparse tensor": (file({**state, first: wide.to_sparse()}), REFUSE),
        "with one number spread out": (file({**state, first: torch.ones(1).expand(1 << 20, 1 << 20)}), REFUSE),
        "with a NaN": (file({**state, first: wide * float("nan")}), REFUSE),
        "cut short": (then(file(state), lambda data: data[: int(cut * len(data))]), REFUSE),
        "cut short, before zip": (then(file(state, **old), lambda data: data[: int(cut * len(data))]), REFUSE),
        "of no bytes": (then(file(state), lambda data: b""), REFUSE),
        "of words": (then(file(state), lambda data: b"not a pickle at all"), REFUSE),
        "an empty zip": (then(file(state), lambda data: b"PK\x05\x06" + bytes(18)), REFUSE),
        "an old archive of tar": (
            then(file(state), lambda data: b"tensors".ljust(257, b"\x00") + b"ustar" + bytes(762)),
            REFUSE,
        ),
    }
    way = rng.choice(list(ways))
    apply, expect = ways[way]
    return mutation("torch's older kind", way, apply, (BIN, first, "tensors", *about_files(source)), expect)


# -- maps beside the weights -------------------------------------------------------------------------------------------
def sidecar(source: Source, rng: random.Random) -> Mutation | None:
    """The maps in files beside the weights; none for a draft of the full vocabulary."""
    if "d2t" not in source.state:
        return None
    state = held(source)
    d2t, t2d = source.state["d2t"].long(), source.state["t2d"].bool()
    stale = d2t.clone()
    stale[-1] += 1 if int(d2t[-1]) + len(d2t) < len(t2d) else -1
    bare = {name: tensor for name, tensor in state.items() if name not in ("d2t", "t2d")}

    def put(content: Any, file: str, without: bool = True) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            if without:
                saved(bare, source.weights.name)(folder)
            if isinstance(content, bytes):
                (folder / file).write_bytes(content)
            elif file.endswith(".npy"):
                numpy.save(folder / file, content, allow_pickle=True)
            else:
                torch.save(content, folder / file)

        return apply

    ids = d2t + torch.arange(len(d2t))
    both = {"d2t": d2t, "t2d": t2d}
    ways: dict[str, tuple[Callable[[Path], None], Expect]] = {
        "d2t.pt": (put(d2t, "d2t.pt"), SAME),
        "d2t.npy": (put(d2t.numpy(), "d2t.npy"), SAME),
        "t2d.pt": (put(t2d, "t2d.pt"), SAME),
        "vocab_mapping.pt": (put(both, "vocab_mapping.pt"), SAME),
        "vocab_mapping.pt of target ids": (put({"d2t": ids, "t2d": t2d}, "vocab_mapping.pt"), SAME),
        "vocab_mapping.pt that is another's": (put({"d2t": stale, "t2d": t2d}, "vocab_mapping.pt"), REFUSE),
        "vocab_mapping.pt with more in it": (put({**both, "counts": [1, 2]}, "vocab_mapping.pt"), REFUSE),
        "vocab_mapping.pt with a word that is run": (put({**both, "x": Says()}, "vocab_mapping.pt"), REFUSE),
        "d2t.pt that is a word that is run": (put(Says(), "d2t.pt"), REFUSE),
        "d2t.pt that is a list": (put(d2t.tolist(), "d2t.pt"), REFUSE),
        "d2t.pt of floats": (put(d2t.float(), "d2t.pt"), REFUSE),
        "d2t.pt one short": (put(d2t[:-1], "d2t.pt"), REFUSE),
        "d2t.pt of no bytes": (put(b"", "d2t.pt"), REFUSE),
        "d2t.npy of objects": (put(numpy.array([{"a": 1}]), "d2t.npy"), REFUSE),
        "d2t.npy of words": (put(numpy.array(["a", "b"]), "d2t.npy"), REFUSE),
        "d2t.npy of floats": (put(d2t.numpy().astype("float64"), "d2t.npy"), REFUSE),
        "d2t.npy cut short": (put(b"\x93NUMPY\x01\x00", "d2t.npy"), REFUSE),
        "no maps at all": (put(b"words", "notes.txt"), REFUSE),
    }
    if "d2t" in state:
        ways["d2t.pt that says the same"] = put(d2t, "d2t.pt", False), SAME
        ways["d2t.pt that disagrees"] = put(stale, "d2t.pt", False), REFUSE
        ways["d2t.pt of another length"] = put(d2t[:-3], "d2t.pt", False), REFUSE
    way = rng.choice(list(ways))
    apply, expect = ways[way]
    return mutation("maps beside the weights", way, apply, ("d2t", "t2d", "vocab_mapping", "maps"), expect)


# -- code, and names of folders ----------------------------------------------------------------------------------------
def code(source: Source, rng: random.Random) -> Mutation:
    """Python files in the folder: they are never run, and refused only where the config asks for them."""
    file = rng.choice(["modeling_draft.py", "configuration_draft.py", "tokenization_draft.py", "sitecustomize.py"])
    asked = rng.random() < 0.5

    def apply(folder: Path) -> None:
        (folder / file).write_text(f"print({RAN!r})\n")
        if asked:
            path = folder / source.json
            names = {"AutoConfig": f"{file[:-3]}.Config", "AutoModelForCausalLM": f"{file[:-3]}.Model"}
            path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": names}))

    expect = REFUSE if asked else SAME
    if asked and source.family == "standalone":
        expect = Expect(
            True, SAME.reads, ("auto_map",)
        )  # a Llama is one whatever code lies beside it, and that is said
    return mutation("code", f"{file}{', asked for by auto_map' * asked}", apply, ("auto_map",), expect)


NAMES = (
    *(
        "eagle3",
        "my-eagle-draft",
        "dflash",
        'a "quoted" name',
        "it's",
        "two\nlines",
        "[bold]x[bold]",
        "[red]",
        "%s {0} {x}",
    ),
    *(
        "$(echo x)",
        "`echo x`",
        "a;b&c|d",
        "-o",
        "--help",
        " spaces ",
        "tab\there",
        "\x1b[31mred",
        "ü-日本-😀",
        "\u202ereversed",
    ),
    *("x" * 250, "x" * 255, "not-utf8-\udcff", "embedded:nobody", "weights.safetensors", "a\\b", "*?", "~", "..."),
)


def named(source: Source, rng: random.Random) -> Mutation:
    """The folder under an odd name; with a fault in it, so that the name is told, or none."""
    name, broken = rng.choice(NAMES), rng.random() < 0.5

    def apply(folder: Path) -> Path:
        if broken:
            (folder / source.weights.name).write_bytes(b"")
        place = folder / name
        os.mkdir(place)
        for file in [path for path in folder.iterdir() if path != place]:
            shutil.move(file, place / file.name)
        return place

    expect = REFUSE if broken else EITHER if "\udcff" in name else SAME  # not every library takes any bytes for a name
    shown = f"{name[:40]!r}{', its weights empty' * broken}"
    return mutation("name of the folder", shown, apply, (source.weights.name, "safetensors", "weight file"), expect)


MAKERS = (
    damaged,
    damaged,
    special,
    special,
    several,
    several,
    pickled,
    pickled,
    pickled,
    sidecar,
    sidecar,
    code,
    named,
)


def drawn(source: Source, rng: random.Random) -> Iterator[Mutation]:
    """Mutations without end; a file of our own format is one file of safetensors, and no other counts."""
    while True:
        maker = rng.choice((damaged, special, named)) if source.own else rng.choice(MAKERS)
        found = maker(source, rng)
        if found is not None:
            yield found
