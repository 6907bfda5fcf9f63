"""FLUX's shape is known to `models/` and `address.py`; whoever else names its stacks is listed here, with the reason.

A file knows the shape if its code, docstrings apart, names a stack or the group of joint sequences, in an identifier or
as the beginning of a string, or compares the number of a group with a constant.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ("difffract_jax/models/", "difffract_jax/address.py")
KNOWING = {
    "converters/flux.py": "maps checkpoints onto the weights of FLUX's blocks",
    "converters/flux2.py": "maps checkpoints onto the weights of FLUX.2's blocks",
    "converters/check.py": "compares FLUX's blocks with PyTorch's",
    "converters/torch_files.py": "runs PyTorch's FLUX, whose modules have these names",
    "converters/torch_trace.py": "records PyTorch's FLUX into the arrays of `models/activations.py`",
    "difffract_jax/sharding.py": "lists the axes of FLUX's weights",
    "difffract_jax/organism/recipe.py": "sets how many blocks the organism has",
    "difffract_jax/organism/flow.py": "builds the organism's FLUX and initialises its blocks",
}
HOMONYMS = {
    "difffract_jax/graphs/files/tables.py": "GraphML's name of a number's type",
}
WORDS = {"double", "single", "joint"}
BEGINNING = re.compile(r"(double|single|joint)(?![-\w ])")


def docstrings(tree: ast.AST) -> set[int]:
    """The strings that stand alone as statements."""
    return {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields every place of a tree that knows FLUX's stacks or groups, and what stands there."""
    documents = docstrings(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name"):
            word = getattr(node, field, None)
            if isinstance(word, str) and WORDS & {*word.lower().split("_")}:
                yield line, word
        text = node.value if isinstance(node, ast.Constant) and id(node) not in documents else None
        if isinstance(text, str) and BEGINNING.match(text):
            yield line, text
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and "group" in node.left.id:
            numbers = [one.value for one in node.comparators if isinstance(one, ast.Constant)]
            # Less than 0 means: in no group.
            if any(type(number) is int for number in numbers) and not (
                isinstance(node.ops[0], ast.Lt) and numbers == [0]
            ):
                yield line, ast.unparse(node)


def test_no_other_file_knows_the_order_of_stacks_and_groups() -> None:
    places = {}
    for path in sorted([*(ROOT / "difffract_jax").rglob("*.py"), *(ROOT / "converters").rglob("*.py")]):
        name = str(path.relative_to(ROOT))
        if not name.startswith(HOME) and name not in HOMONYMS:
            places[name] = [f"{name}:{line}: {what}" for line, what in names(ast.parse(path.read_text()))]
    knowing = {name for name, lines in places.items() if lines}
    assert knowing <= set(KNOWING), "\n".join(line for name in knowing - set(KNOWING) for line in places[name])
    assert set(KNOWING) <= knowing, "these no longer name any, and can be taken off the list"
    assert len(KNOWING) <= 8


def test_what_it_looks_for_is_found() -> None:
    code = """
def f(x):
    'single/0'
    return x.double[0], "single/1", group == 2, group < 0, depth_single, "a joint"
"""
    assert sorted(what for _, what in names(ast.parse(code))) == ["depth_single", "double", "group == 2", "single/1"]
