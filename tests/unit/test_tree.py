"""Shapes of proposals: what a user may write, what is refused, and what follows from a tree's parents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from redraft.decode.tree import Topology
from redraft.errors import UserError
from redraft.settings.shapes import ChainShape, DynamicTree, StaticTree, parse_shape


@pytest.mark.parametrize(
    ("text", "shape", "name"),
    [
        ("chain:5", ChainShape(5), "chain of 5"),
        (" chain:12 ", ChainShape(12), "chain of 12"),
        ("tree:5x10x60", DynamicTree(), "dynamic tree, depth 5, top-k 10, 60 nodes"),
        ("tree:3x2x7", DynamicTree(3, 2, 7), "dynamic tree, depth 3, top-k 2, 7 nodes"),
        ("[[0],[1],[0,0]]", StaticTree(((0,), (1,), (0, 0))), "static tree of 3 nodes"),
        ("[[0,0],[1],[0]]", StaticTree(((0,), (1,), (0, 0))), "static tree of 3 nodes"),
    ],
)
def test_what_a_user_may_write(text: str, shape: object, name: str) -> None:
    found = parse_shape(text)
    assert found == shape
    assert found.describe() == name


def test_paths_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_text(json.dumps([[0], [0, 0], [0, 1], [0, 1, 0]]))
    tree = parse_shape(str(file))
    assert isinstance(tree, StaticTree)
    assert (tree.depth, len(tree.paths)) == (3, 4)
    assert tree.fans() == {(): 1, (0,): 2, (0, 1): 1}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "at least one path"),
        ("[[]]", r"\[\] is no path"),
        ("[[0],[-1]]", "is no path"),
        ("[[0],[0,0],[0]]", r"\[0\] twice"),
        ("[[0],[1,0]]", r"\[1, 0\] without its parent \[1\]"),
        ("[[0,0]]", "without its parent"),
        ("[[1]]", r"\[1\] without \[0\]"),
        ("[[0],[0,0],[0,2]]", r"\[0, 2\] without \[0, 1\]"),
        ("[0, 1]", "not a list of lists"),
        ("[[0],[true]]", "not a list of lists"),
        ("[[0.5]]", "not a list of lists"),
        ('[["0"]]', "not a list of lists"),
        ("[[0],", "Invalid JSON"),
        ("chain:0", "at least 1 token"),
        ("chain:", "chain:5"),
        ("chain:-2", "chain:5"),
        ("chain:5x2", "chain:5"),
        ("tree:5x10", "tree:5x10x60"),
        ("tree:5x0x60", "at least 1"),
        ("tree:axbxc", "tree:5x10x60"),
        ("tree:", "tree:5x10x60"),
        ("chain:²", "chain:5"),
        ("bush:3", "unknown shape"),
        ("", "unknown shape"),
        ("nowhere/tree.json", "nowhere/tree.json does not exist; give a .json file"),
    ],
)
def test_a_tree_that_is_no_tree_is_refused_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        parse_shape(text)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_trees(tmp_path: Path) -> None:
    (tmp_path / "object.json").write_text('{"paths": [[0]]}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "folder.json").mkdir()
    for name in ("object", "binary", "deep", "folder"):
        with pytest.raises(UserError, match=f"{name}.json"):
            parse_shape(str(tmp_path / f"{name}.json"))


def test_what_follows_from_the_parents() -> None:
    tree, cpu = Topology([0, 0, 1, 1, 3]), torch.device("cpu")
    assert tree.depths == [0, 1, 1, 2, 2, 3]
    assert (len(tree), tree.depth) == (6, 3)
    assert tree.path(5) == [1, 3, 5] and tree.path(0) == []
    assert [tree.leaf(node) for node in range(6)] == [False, False, True, False, True, True]
    assert tree.children(cpu).tolist() == [[1, 2], [3, 4], [-1, -1], [5, -1], [-1, -1], [-1, -1]]
    expected = [{0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 1, 4}, {0, 1, 3, 5}]
    assert [set(row.nonzero().flatten().tolist()) for row in tree.mask(cpu)] == expected
    # Of two children with one token the better ranked is followed.
    assert tree.by_token([7, 8, 9, 9, 5]) == [{7: 1, 8: 2}, {9: 3}, {}, {5: 5}, {}, {}]


@pytest.mark.parametrize("parents", [[1], [0, 2], [0, -1]])
def test_children_come_after_their_parents(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot hang"):
        Topology(parents)
