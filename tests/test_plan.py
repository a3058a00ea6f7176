"""The plan of the package: which room may import which, read from the imports themselves."""

import ast
import importlib
import sys
from functools import cache
from pathlib import Path

import pytest

import merging_cache

PACKAGE = Path(merging_cache.__file__).parent
EXAMPLES = Path(__file__).parents[1] / "examples"
# from the ground up: a room may import those in the lines before its own, and files of its own folder
FLOORS = [
    ("twin", "linalg"),
    ("states", "model"),
    ("stage",),
    ("learner",),
    ("scorers", "budgets", "mergers", "storage"),
    ("fold",),
    ("config",),
    ("layers",),
    ("report",),
    ("cache",),
    ("quantized_cache",),
    ("reading",),
    ("evaluation",),
    ("calibration",),
]
PURE = (
    "twin",
    "linalg",
    "states",
    "stage",
    "learner",
    "scorers",
    "budgets",
    "mergers",
    "fold",
)  # tensors in, tensors out
GUESTS = {  # what files of these rooms may know besides torch
    "scorers.kvpress": {"kvpress"},
    "scorers.weights": {"numpy", "safetensors", "huggingface_hub"},
    "mergers.nearest_triton": {"triton"},
}
LU = {"solve", "solve_ex", "inv", "inv_ex", "inverse", "tensorsolve", "tensorinv", "lu", "lu_factor", "det", "slogdet"}
MOST_LINES = 400
MOST_LINES_OF = {"layers/merging.py": 350}


def files():
    """Every module of the package by its dotted name, `("layers", "merging")` say; a face is its folder."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield parts[:-1] if parts[-1] == "__init__" else parts, path


MODULES = dict(files())
ROOMS = sorted({module[0] for module in MODULES if module})


@cache
def imports(module):
    """`(module, name)` for all that a module imports, lazily or for types, too; `name` is `None` for a whole module."""
    here = module if MODULES[module].name == "__init__.py" else module[:-1]
    found = []
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(tuple(alias.name.split(".")), None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = tuple(node.module.split(".")) if node.module else ()
            base = ("merging_cache", *here[: len(here) - node.level + 1]) if node.level else ()
            found += [((*base, *inner), alias.name) for alias in node.names]
    return found


def own_imports(module):
    """The modules of the package that a module imports from: those that define the names, not the faces they are on."""
    for (first, *rest), name in imports(module):
        if first == "merging_cache":
            yield defining(tuple(rest), name)


def defining(module, name):
    """The module that defines a name which `module` gives."""
    if name is not None and (*module, name) in MODULES:
        return (*module, name)
    if module in MODULES and MODULES[module].name == "__init__.py":
        for (first, *rest), given in imports(module):
            if first == "merging_cache" and given == name and tuple(rest) != module:
                return defining(tuple(rest), name)
    return module


def test_every_room_has_its_floor():
    assert sorted(room for floor in FLOORS for room in floor) == ROOMS


@pytest.mark.parametrize("module", [module for module in MODULES if module], ids=".".join)
def test_a_room_imports_only_rooms_below(module):
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    above = [
        ".".join(other)
        for other in own_imports(module)
        if other[:1] != module[:1] and (not other or floor_of[other[0]] >= floor_of[module[0]])
    ]
    assert not above


def test_no_modules_import_each_other():
    arrows = {module: set(own_imports(module)) - {module} for module in MODULES}
    faces = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    arrows = {module: {other for other in others if other not in faces} for module, others in arrows.items()}
    left = dict(arrows)
    while grounded := [module for module, others in left.items() if not others & left.keys()]:
        for module in grounded:
            del left[module]
    assert not left, f"among these is a circle: {sorted(map('.'.join, left))}"


@pytest.mark.parametrize("module", [module for module in MODULES if module and module[0] in PURE], ids=".".join)
def test_pure_rooms_know_tensors_only(module):
    assert {other[0] for other in own_imports(module) if other} <= set(PURE)
    strangers = {name[0] for name, _ in imports(module)} - {"merging_cache", "torch", *sys.stdlib_module_names}
    assert strangers <= GUESTS.get(".".join(module), set())


def test_only_some_rooms_know_transformers():
    knowing = {module[0] for module in MODULES if module for name, _ in imports(module) if name[0] == "transformers"}
    assert knowing == {"model", "layers", "cache", "quantized_cache", "reading", "evaluation", "calibration"}


@pytest.mark.parametrize("module", [module for module in MODULES if module], ids=".".join)
def test_no_room_outgrows_one_sitting(module):
    path = MODULES[module]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES_OF.get(path.relative_to(PACKAGE).as_posix(), MOST_LINES)
    assert ast.get_docstring(ast.parse("\n".join(lines)))


def test_layers_do_not_ask_what_storage_they_have():
    kinds = {"DenseStorage", "QuantizedStorage", "RaggedStorage", "EvenStorage"}
    for module in [module for module in MODULES if module[:1] in (("layers",), ("fold",))]:
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "issubclass", "type"):
                assert not kinds & {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}, module


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py"), *EXAMPLES.glob("*.py")], ids=lambda path: path.stem)
def test_systems_are_solved_by_cholesky(path):
    """LU of a batch never returns on some processors, and what is solved here needs none; see `linalg.py`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert node.attr not in LU, f"{path}:{node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert not LU & {alias.name for alias in node.names}, f"{path}:{node.lineno}"


PUBLIC = {  # what users import, and from where; whichever room it lives in
    "merging_cache": "MergingDynamicCache MergingQuantizedCache MergingConfig merging_attention plot_merges Scorer "
    "Budget Merger LayerStates Survivors Slots CacheReport LayerReport KVPressScorer SCORERS BUDGETS MERGERS",
    "merging_cache.scorers": "SCORERS Scorer FunctionScorer KVPressScorer build_scorer SnapKVScorer KVzapScorer",
    "merging_cache.budgets": "BUDGETS Budget UniformBudget AdaKVBudget PyramidBudget PerLayerBudget ThresholdBudget",
    "merging_cache.mergers": "MERGERS QUERY_SOURCES Merger QuerySource AutoMerger DropMerger MassMerger RefitMerger",
    "merging_cache.states": "LayerStates Survivors Slots Statistics ReferenceQueries DROPPED ABSENT TILE top_tokens "
    "gather_tokens holders_of count_evicted readers_of",
    "merging_cache.evaluation": "Evaluation EvaluationConfig Summary Variant RULER",
}


@pytest.mark.parametrize("path", PUBLIC)
def test_public_names_stay_where_they_are(path):
    module = importlib.import_module(path)
    assert not [name for name in PUBLIC[path].split() if not hasattr(module, name)]
