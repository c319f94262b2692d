"""The rules of the layout: which floor may import which, what an import costs, who prints."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import counterflow

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "counterflow"

# From the mathematics to the command line. A floor is a file or a folder and imports only floors before its own; the
# files of one folder may import each other.
FLOORS = (
    "lazy",
    "checks",
    "notebook",
    "random",
    "univariate",
    "made",
    "engine",
    "transforms",
    "flows",
    "objectives",
    "vae",
    "io",
    "training",
    "diagnostics",
    "posterior",
    "density",
    "distill",
    "interop",
    "plots",
    "commands",
    "cli",
    "__main__",
)
LAZY = [
    "PIL",
    "arviz",
    "flowjax",
    "huggingface_hub",
    "jax",
    "matplotlib",
    "mlflow",
    "nessai",
    "nflows",
    "normflows",
    "numba",
    "numpyro",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "pocomc",
    "pyarrow",
    "pymc",
    "pyro",
    "pytensor",
    "rich",
    "sbi",
    "sklearn",
    "stan",
    "tensorboard",
    "triton",
    "tyro",
    "wandb",
    "zuko",
]


@cache
def trees() -> dict[Path, ast.Module]:
    """Return the syntax tree of each module, by its path in the package."""
    return {path.relative_to(SRC): ast.parse(path.read_text("utf-8")) for path in sorted(SRC.rglob("*.py"))}


def floor(module: Path) -> str:
    return module.with_suffix("").parts[0]


def imports(module: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, dotted name in parts) of all that a module imports, wherever in the file the import stands."""
    package = ["counterflow", *module.parts[:-1]]
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, [*base, alias.name]) for alias in node.names)


def prints(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def test_every_module_has_its_place_in_the_list():
    strangers = [str(module) for module in trees() if floor(module) not in (*FLOORS, "__init__")]
    assert not strangers, (
        f"{strangers}: expected a floor of the list FLOORS in {Path(__file__).name}; "
        "add it there, after everything it imports and before everything that imports it"
    )


def test_imports_point_up_the_list():
    arrows_down = []
    for module in trees():
        if floor(module) not in FLOORS:  # the package's own __init__ gathers the public names from everywhere
            continue
        allowed = {*FLOORS[: FLOORS.index(floor(module))], "__version__"}
        if len(module.parts) > 1:
            allowed.add(floor(module))
        for line, name in imports(module):
            if name[0] == "counterflow" and (len(name) == 1 or name[1] not in allowed):
                arrows_down.append(f"{module}:{line} imports {'.'.join(name)}")
    assert not arrows_down, f"expected imports from floors before the module's own in FLOORS, got {arrows_down}"


def test_importing_counterflow_imports_nothing_heavy_but_torch():
    names = [name for name in counterflow.__all__ if name != "FlowDensity"]  # whose base classes are scikit-learn's
    code = f"from counterflow import {', '.join(names)}; import sys; print(*set({LAZY}) & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not ran.stdout.split()


def test_only_the_commands_print():
    offences = []
    for module, tree in trees().items():
        if floor(module) in ("commands", "cli"):
            continue
        offences += [f"{module}:{node.lineno} prints" for node in ast.walk(tree) if prints(node)]
        offences += [f"{module}:{line} imports rich" for line, name in imports(module) if name[0] == "rich"]
    assert not offences, f"expected print and rich in commands/ and cli.py alone, got {offences}"


def test_errors_are_raised_not_asserted():
    asserts = [
        f"{module}:{node.lineno}"
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert not asserts, f"expected ValueError or TypeError, which -O keeps, got assert in {asserts}"


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert counterflow.__version__ == project["version"]
    assert f"version: {project['version']}" in (ROOT / "CITATION.cff").read_text("utf-8").splitlines()


# A docstring begins with a verb or a noun phrase. Sentences that begin with these words leave out their subject.
NOT_FIRST = (
    "What",
    "Whether",
    "Those",
    "That",
    "How",
    "Which",
    "Where",
    "By",
    "Of",
    "As",
    "So",
    "It",
    "Its",
    "The same",
)


def test_docstrings_begin_with_a_verb_or_a_noun_phrase():
    offences = []
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if text.startswith(tuple(f"{word} " for word in NOT_FIRST)):
                    offences.append(f"{module}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    assert not offences, "expected a verb or a noun phrase first, got\n" + "\n".join(offences)


def test_at_most_35_names_at_the_top():
    assert len(counterflow.__all__) <= 35
    assert all(hasattr(counterflow, name) for name in counterflow.__all__)
