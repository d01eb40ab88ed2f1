"""Shapes of a proposal as a user names them: chains, paths of a tree, trees that follow the draft's confidence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Annotated

from pydantic import TypeAdapter, ValidationError

from redraft.errors import UserError
from redraft.inputs import read_text
from redraft.settings.base import AUTO, check

Path = tuple[int, ...]
"""A node by the sibling ranks on the way to it: (0,) is the draft's first choice, (0, 1) its second choice after it."""


@dataclass(frozen=True)
class ChainShape:
    """One path of ``gamma`` tokens. Raises ``UserError`` when gamma is below 1."""

    gamma: int = 5

    def __post_init__(self) -> None:
        if self.gamma < 1:
            raise UserError(f"a chain needs at least 1 token, not {self.gamma}; for example chain:5")

    @property
    def depth(self) -> int:
        return self.gamma

    def describe(self) -> str:
        """The name that goes beside every published figure."""
        return f"chain of {self.gamma}"


@dataclass(frozen=True)
class StaticTree:
    """A tree given as the paths of all its nodes, in any order.

    Raises ``UserError`` when the paths are no tree: none at all, an empty or a repeated one, a missing parent, or
    ranks among siblings that are not 0, 1, 2, ...
    """

    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        for path in self.paths:
            if not path or any(rank < 0 for rank in path):
                raise UserError(f"{list(path)} is no path of a tree: give one or more ranks, 0 or above")
        nodes = set(self.paths)
        if not nodes:
            raise UserError("a tree needs at least one path; for example [[0],[1],[0,0]]")
        if len(nodes) < len(self.paths):
            twice = next(path for i, path in enumerate(self.paths) if path in self.paths[:i])
            raise UserError(f"the tree names the path {list(twice)} twice; name every node once")
        for path in sorted(nodes, key=_by_level):
            if path[:-1] and path[:-1] not in nodes:
                raise UserError(f"the tree has {list(path)} without its parent {list(path[:-1])}; add the parent")
            if path[-1] and (*path[:-1], path[-1] - 1) not in nodes:
                before = [*path[:-1], path[-1] - 1]
                raise UserError(f"the tree has {list(path)} without {before}: number siblings 0, 1, 2, ...")
        object.__setattr__(self, "paths", tuple(sorted(nodes, key=_by_level)))

    @property
    def depth(self) -> int:
        return len(self.paths[-1])

    def fans(self) -> dict[Path, int]:
        """How many children each inner node has, the root () included."""
        fans: dict[Path, int] = {}
        for path in self.paths:
            fans[path[:-1]] = fans.get(path[:-1], 0) + 1
        return fans

    def describe(self) -> str:
        """The name that goes beside every published figure."""
        return f"static tree of {len(self.paths)} nodes"


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2's tree (arXiv 2406.16858), which follows the draft's confidence in the present context.

    Level by level, the ``top_k`` likeliest children of each of the level's ``top_k`` best nodes become candidates,
    ``depth`` levels deep; a node's worth is the product of the draft's probabilities on its path. The ``nodes`` best
    candidates of all levels are proposed. A node is never worth more than its parent, so they form a tree. ``depth``
    counts proposed tokens on the longest path and ``nodes`` proposed tokens (the root is in neither).

    Raises ``UserError`` when a number is below 1.
    """

    depth: int = 5
    top_k: int = 10
    nodes: int = 60

    def __post_init__(self) -> None:
        if min(self.depth, self.top_k, self.nodes) < 1:
            raise UserError(
                f"a dynamic tree of depth {self.depth}, top-k {self.top_k} and {self.nodes} nodes is none: "
                "each must be at least 1; for example tree:5x10x60"
            )

    def describe(self) -> str:
        """The name that goes beside every published figure."""
        return f"dynamic tree, depth {self.depth}, top-k {self.top_k}, {self.nodes} nodes"


Shape = ChainShape | StaticTree | DynamicTree
PATHS = TypeAdapter(tuple[Path, ...])
MOST_TREE = 1 << 24  # bytes of a file of paths
NUMBER = "[0-9]{1,5}"
# How a shape of so many numbers is made and written.
FORMS: dict[str, tuple[Callable[..., Shape], str, str]] = {
    "chain": (ChainShape, NUMBER, "chain:5"),
    "tree": (DynamicTree, f"{NUMBER}x{NUMBER}x{NUMBER}", "tree:5x10x60 (depth x top-k x nodes)"),
}


def check_drafts(shape: Shape, greedy: bool) -> None:
    """Raise ``UserError`` for a dynamic tree of sampled drafts; ``greedy`` drafts go with every shape."""
    if isinstance(shape, DynamicTree) and not greedy:
        raise UserError(
            "a dynamic tree grows towards the tokens that the draft likes best, so they are no draws from the "
            "draft and cannot be verified as such; choose greedy drafts, or a static tree or a chain"
        )


def _by_level(path: Path) -> tuple[int, Path]:
    return len(path), path


def parse_shape(text: str) -> Shape:
    """The shape that a user wrote: ``chain:5``, ``tree:5x10x60`` (depth x top-k x nodes), paths as JSON, or a file.

    Raises ``UserError`` for anything else, and for a tree that is no tree.
    """
    text = text.strip()
    kind, _, rest = text.partition(":")
    if kind in FORMS:
        make, numbers, example = FORMS[kind]
        if not re.fullmatch(numbers, rest):
            raise UserError(f"cannot read the shape {text!r}; write it like {example}")
        return make(*map(int, rest.split("x")))
    if text.startswith("["):
        return _static(text, "the tree")
    file = FilePath(text)
    if text.endswith(".json"):
        written = read_text(file, "give a .json file of paths", MOST_TREE)
        try:
            return _static(written, text)
        except UserError as error:
            raise error if text in str(error) else UserError(f"{text}: {error}") from error
    raise UserError(
        f"unknown shape {text!r}; give chain:5, tree:5x10x60 (depth x top-k x nodes), paths such as "
        "[[0],[1],[0,0]], or a .json file of paths"
    )


def _static(text: str, source: str) -> StaticTree:
    try:
        return StaticTree(PATHS.validate_json(text, strict=True))
    except ValidationError as error:
        wrong = error.errors()[0]["msg"]
        raise UserError(
            f"{source} is not a list of lists of whole numbers ({wrong}); write paths such as [[0],[1],[0,0]]"
        ) from None


ShapeText = Annotated[str, check(lambda text: text == AUTO or parse_shape(text))]
