"""The house rules that a machine can hold: import order, hidden imports, what may touch PyTorch, docstrings, sizes.

1. Parse every file of the packages once.
2. Give every module a rank, `ORDER`; an import must point to a lower rank, or stay within the package without a cycle.
3. Check the other rules on the same trees, in one test for a rule, which names every place that breaks it. A test for
   every rule and file were 1,600 tests, and half a minute of pytest's own time.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import difffract_jax
from difffract_jax.cli.commands import MODULES
from difffract_jax.display import PAGES

ROOT = Path(__file__).parents[1]
PACKAGES = ("difffract_jax", "converters")
ORDER = (
    ("difffract_jax.namespaces", "difffract_jax.text_files"),
    ("difffract_jax", "difffract_jax.config"),
    ("difffract_jax.spread", "difffract_jax.generators", "difffract_jax.trace_settings"),
    ("difffract_jax.address", "difffract_jax.ops", "difffract_jax.display", "difffract_jax.seeds"),
    ("difffract_jax.memory",),
    ("difffract_jax.storage", "difffract_jax.hub"),
    ("difffract_jax.trees", "difffract_jax.graphs"),
    ("difffract_jax.sharding",),
    ("difffract_jax.models",),
    ("difffract_jax.transcoders",),
    ("difffract_jax.circuits", "difffract_jax.circuits.notation", "converters"),
    ("difffract_jax.circuits.trace",),
    ("difffract_jax.circuits.frozen",),
    ("difffract_jax.circuits.attribution",),
    ("difffract_jax.circuits.effects", "difffract_jax.circuits.editing"),
    ("difffract_jax.circuits.checks",),
    ("difffract_jax.organism", "difffract_jax.dashboards", "difffract_jax.directories", "difffract_jax.estimate"),
    ("difffract_jax.dashboards.features",),
    ("difffract_jax.parts", "difffract_jax.lora"),
    ("difffract_jax.loading",),
    ("difffract_jax.conversion", "difffract_jax.feature_pages"),
    ("difffract_jax.studies",),
    ("difffract_jax.cli",),
    ("difffract_jax.__main__",),
)
LIGHT = (
    "difffract_jax",
    *(f"difffract_jax.dashboards.features.{name}" for name in ("record", "addresses", "viewer_records")),
    "difffract_jax.address",
    "difffract_jax.generators",
    "difffract_jax.memory",
    "difffract_jax.cli.main",
    *(f"difffract_jax.cli.{module}" for module in dict.fromkeys(MODULES.values())),
    *(f"difffract_jax.cli.{name}" for name in ("output", "bars", "plan_tables", "graph_tables")),
    *(f"difffract_jax.cli.{name}" for name in ("settings", "graphs", "view", "group_edits", "populations")),
    *(f"difffract_jax.cli.{name}" for name in ("feature_pages", "viewer_export")),
    *(f"difffract_jax.models.{name}" for name in ("file_tokenizers", "tokenizers")),
    "difffract_jax.storage.compile_cache",
    "difffract_jax.transcoders.settings",
    "difffract_jax.studies.settings",
    *(f"difffract_jax.circuits.notation.{name}" for name in ("feature", "edits", "group_edits", "labels")),
    "difffract_jax.circuits.attribution.expansion",
    *(
        f"difffract_jax.dashboards.{name}"
        for name in (
            "records",
            "pictures",
            "render",
            "page_data",
            "viewer_page",
            "image_files",
            "page_server",
            "account",
            "graph_report",
            "found_sections",
            "target_words",
            "page_labels",
            "page_groups",
            "notebook",
        )
    ),
    *(f"difffract_jax.circuits.checks.{name}" for name in ("predictions", "summaries")),
)
"""Modules that need no JAX, beside all of `graphs`; nor SciPy's statistics, which take a second to import."""
TORCH_FILES = tuple(f"converters/torch_{name}.py" for name in ("files", "text", "trace", "sd3"))
FLAX_NAMES = {"Module", "Param", "Rngs", "List", "data", "Linear", "Conv", "Embed", "LayerNorm", "RMSNorm", "GroupNorm"}
MAX_LINES, MAX_FUNCTION = 400, 60
# One letter of each in brackets, so that this file does not match what it forbids.
FORBIDDEN = re.compile(
    r"\b(TO[D]O|FIX[M]E|NotImplemented[E]rror)\b|except\s*:|except [E]xception|from __future__ import [a]nnotations"
    r"|allow_pickle=[T]rue|weights_only=[F]alse|pytest\.[s]kip|mark\.[s]kip|mark\.[x]fail|assert [T]rue\b"
    r"|[\"' ]/(?:[h]ome|[r]oot|[w]ork|[t]mp|[o]pt)/"
)

FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in NAMES}
GRAPHS = tuple(module for module in MODULES if module.startswith("difffract_jax.graphs"))


@cache
def texts() -> dict[str, str]:
    """Returns each file's text; read when a test asks, as every process imports this module."""
    return {name: path.read_text(encoding="utf-8") for name, path in zip(NAMES, FILES, strict=True)}


@cache
def trees() -> dict[str, ast.Module]:
    """Returns each file's syntax tree."""
    return {name: ast.parse(text) for name, text in texts().items()}


def imported(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yields every module that `tree` imports, in whatever way, with the node that does it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in MODULES else str(node.module)), node
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((arg.value, node) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def rank(module: str) -> tuple[int, str]:
    """Returns the position in `ORDER` of the longest name that `module` is or lies in, and that name."""
    homes = [(len(name), place, name) for place, group in enumerate(ORDER) for name in group]
    fits = [
        home for home in homes if module == home[2] or (home[2] != "difffract_jax" and module.startswith(f"{home[2]}."))
    ]
    assert fits, f"{module} has no place in ORDER"
    return max(fits)[1:]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_imports_point_only_to_the_left() -> None:
    wrong = []
    for module, name in MODULES.items():
        place, home = rank(module)
        for target, node in imported(trees()[name]):
            if target.split(".")[0] not in PACKAGES or target == module:
                continue
            other, other_home = rank(target)
            if not (other < place or other_home == home):
                wrong.append(f"{name}:{node.lineno} imports {target}")
    assert not wrong, "what these import does not lie to their left"


def test_pages_alone_are_bound_late() -> None:
    # What lies below them makes pages by `display.page_of`, whose table is the one way round the order.
    late = {"difffract_jax.display": {module for module, _ in PAGES.values()}}
    assert late == {"difffract_jax.display": {"difffract_jax.dashboards.notebook"}}
    assert all(module in MODULES and hasattr(import_module(module), name) for module, name in PAGES.values())


def test_imports_have_no_cycle() -> None:
    edges = {
        module: {target for target, _ in imported(trees()[name]) if target in MODULES and target != module}
        for module, name in MODULES.items()
    }
    while leaves := {module for module, targets in edges.items() if not targets & edges.keys()}:
        edges = {module: targets for module, targets in edges.items() if module not in leaves}
    assert not edges, f"these modules import one another in a circle: {sorted(edges)}"


def test_no_import_is_hidden_in_a_function() -> None:
    names = [name for name in NAMES if not name.startswith("difffract_jax/cli")]
    hidden = [
        f"{name}:{node.lineno}"
        for name in names
        for function in functions(trees()[name])
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not hidden
    assert not [name for name in names if "TYPE_CHECKING" in texts()[name]]


def test_only_two_files_touch_pytorch() -> None:
    heavy = {"torch", "diffusers"}
    touching = {name for name in NAMES if {target.split(".")[0] for target, _ in imported(trees()[name])} & heavy}
    assert touching <= {*TORCH_FILES}


def test_every_seed_of_a_user_goes_through_two_files() -> None:
    # Elsewhere its upper half would be lost, or taken for the number of a draw; seeds that are written out are short.
    makers = ("random.key", "random.PRNGKey", "nnx.Rngs", "default_rng", "SeedSequence")
    bare = [
        f"{name}:{node.lineno}"
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(makers) and node.args
        for seed in (node.args[0].elts[0] if isinstance(node.args[0], ast.List | ast.Tuple) else node.args[0],)
        if not isinstance(seed, ast.Constant) and not ast.unparse(seed).isupper()
        if not ast.unparse(seed).startswith(("key", "random_key("))
    ]
    assert {place.split(":")[0] for place in bare} == {"difffract_jax/generators.py", "difffract_jax/models/tiny.py"}, (
        bare
    )


def test_diffusers_is_imported_on_first_use_only() -> None:
    direct = [
        f"{name}:{node.lineno}"
        for name, tree in trees().items()
        for target, node in imported(tree)
        if target.startswith("diffusers") and not isinstance(node, ast.Call)
    ]
    assert not direct


def test_light_modules_do_not_load_jax() -> None:
    # One after the other in one process: what is heavy is told with the first module that loads it.
    code = f"""
import importlib, sys
told = set()
for module in {GRAPHS + LIGHT}:
    importlib.import_module(module)
    heavy = {{"jax", "flax", "torch", "transformers", "scipy.stats"}} & set(sys.modules) - told
    told |= heavy
    if heavy:
        print(module, "loads", *sorted(heavy))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not run.stdout


def test_flax_is_used_as_a_tree_of_weights_only() -> None:
    used = [
        f"{name}:{node.lineno} nnx.{node.attr}"
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx"
        if node.attr not in FLAX_NAMES
    ]
    assert not used
    assert not [name for name in NAMES for target, _ in imported(trees()[name]) if target.startswith("flax.linen")]


def test_everything_public_has_a_docstring_and_annotations() -> None:
    silent, bare = [name for name in NAMES if not ast.get_docstring(trees()[name])], []
    for name, tree in trees().items():
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        members = [node for scope in (tree, *classes) for node in scope.body if isinstance(node, ast.FunctionDef)]
        public = [node for node in members if not node.name.startswith("_")]
        silent += [f"{name}:{node.lineno} {node.name}" for node in (*public, *classes) if not ast.get_docstring(node)]
        for node in public:
            arguments = [arg for arg in (*node.args.args, *node.args.kwonlyargs) if arg.arg not in ("self", "cls")]
            lacking = [arg.arg for arg in arguments if arg.annotation is None]
            if lacking or not node.returns:
                bare.append(f"{name}:{node.lineno} {node.name} lacks annotations: {lacking or 'the result'}")
    assert not silent, "these have no docstring"
    assert not bare


def test_files_and_functions_stay_short() -> None:
    sizes = {name: len(text.splitlines()) for name, text in texts().items()}
    long = [f"{name} has {size} lines" for name, size in sizes.items() if size > MAX_LINES]
    for name, tree in trees().items():
        for node in functions(tree):
            docstring = (ast.get_docstring(node, clean=False) or "").count("\n")
            length = (node.end_lineno or 0) - node.lineno + 1 - docstring
            if length > MAX_FUNCTION:
                long.append(f"{name}:{node.lineno} {node.name} has {length} lines")
    assert not long


def opens_text(call: ast.Call) -> bool:
    """Says whether a call reads or writes text, so that the locale would choose the encoding if nobody does."""
    function = ast.unparse(call.func)
    name = function.rpartition(".")[2]
    if name in ("read_text", "write_text", "TextIOWrapper"):
        return True
    if name not in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile") or function in ("Image.open", "os.open"):
        return False
    place = 1 if function in ("open", "os.fdopen", "gzip.open") else 0
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    mode = given.get("mode", call.args[place] if len(call.args) > place else None)
    # Temporary files and gzip's are binary unless told otherwise, all others text.
    binary_by_default = name.endswith("TemporaryFile") or function == "gzip.open"
    return not binary_by_default if mode is None else not (isinstance(mode, ast.Constant) and "b" in mode.value)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("path.open()", True),
        ("path.open('rb')", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("open(name, mode='w')", True),
        ("open(name, 'ab')", False),
        ("NamedTemporaryFile()", False),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("gzip.open(path)", False),
        ("gzip.open(path, 'rt')", True),
        ("path.write_text(page)", True),
    ],
)
def test_calls_that_open_text_are_recognised(code: str, text: bool) -> None:
    (call,) = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    assert opens_text(call) == text


def test_every_text_file_names_its_encoding() -> None:
    benchmarks = sorted((ROOT / "benchmarks").rglob("*.py"))
    parsed = trees() | {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in benchmarks}
    unnamed = [
        f"{name}:{node.lineno} {ast.unparse(node)[:60]}"
        for name, tree in parsed.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and opens_text(node) and "encoding" not in {word.arg for word in node.keywords}
    ]
    assert not unnamed


def test_no_file_holds_a_shortcut() -> None:
    files = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    found = [(path.name, match.group()) for path in files for match in FORBIDDEN.finditer(path.read_text())]
    assert not found
    assert not [path for path in files if path.stem in ("utils", "helpers", "misc", "common")]


def test_public_names_are_few_and_resolve_and_explain_themselves() -> None:
    namespaces = ("models", "transcoders", "circuits", "graphs")
    names = [name for name in difffract_jax.__all__ if name not in ("__version__", *namespaces)]
    assert len(names) <= 27
    assert dir(difffract_jax) == sorted(difffract_jax.__all__)
    for name in names:
        assert getattr(difffract_jax, name).__doc__, f"difffract_jax.{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        difffract_jax.__getattr__("nothing")


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=\[]", line)[0].lower() for line in project["dependencies"]}
    extras = (line for lines in project["optional-dependencies"].values() for line in lines)
    declared |= {re.split(r"[<>=\[]", line)[0].lower() for line in extras}
    declared |= {
        "yaml": "pyyaml",
        "PIL": "pillow",
        "orbax": "orbax-checkpoint",
        "tensorboardX": "tensorboardx",
        "google_crc32c": "google-crc32c",
        "google": "protobuf",
    }.keys()
    declared |= {*PACKAGES}
    used = {target.split(".")[0] for tree in trees().values() for target, _ in imported(tree)}
    assert used - set(sys.stdlib_module_names) <= declared


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ;.*)?", line) for line in lines)
    assert {re.split(r"[<>=\[]", line)[0].lower().replace("_", "-") for line in wanted} <= pinned


def test_the_version_stands_in_one_place_twice() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == difffract_jax.__version__


def test_every_module_of_ours_that_is_imported_exists() -> None:
    # An import inside a function of the command line fails only when that command is run.
    absent = [
        f"{name}:{node.lineno} {target}"
        for name, tree in trees().items()
        for target, node in imported(tree)
        if target.split(".")[0] in PACKAGES and target not in MODULES
    ]
    assert not absent
