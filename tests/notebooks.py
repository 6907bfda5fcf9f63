"""The notebooks of `examples/`, read, and run cell by cell in this process."""

import ast
import json
from pathlib import Path

HOME = Path(__file__).parents[1] / "examples"


def code_cells(name):
    cells = json.loads((HOME / f"{name}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def sources(name):
    return ["".join(cell["source"]) for cell in code_cells(name)]


def run(name, cells):
    """Runs cells one after the other; returns all that they name, and what a notebook would show of each."""
    names, shown = {}, []
    for number, source in enumerate(cells, 1):
        tree, file = ast.parse(source), f"{name}.ipynb, cell {number}"
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, file, "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), file, "eval"), names))
    return names, shown
