"""The public names, which are imported on first use: complete, typed, pickled, and free until then."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from registry import over

import counterflow as cf

PACKAGES = ["counterflow", "counterflow.training", "counterflow.posterior"]


def run(code):
    """Run code in a new process and return what it printed."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@over(PACKAGES, "package")
def test_the_types_and_the_names_of_a_package_agree(package):
    """The block `if TYPE_CHECKING`, which type checkers and editors read, imports what the table of names resolves."""
    module = __import__(package, fromlist=["_NAMES"])
    (block,) = (node for node in ast.parse(Path(module.__file__).read_text("utf-8")).body if isinstance(node, ast.If))
    typed = {
        alias.asname: getattr(__import__(line.module, fromlist=[alias.name]), alias.name)
        for line in block.body
        for alias in line.names
    }
    assert typed == {name: getattr(module, name) for name in module.__all__}


@over(PACKAGES, "package")
def test_dir_lists_every_public_name_before_it_is_used(package):
    names = run(f"import {package} as package; print(*dir(package))")
    assert set(__import__(package, fromlist=["_NAMES"]).__all__) <= set(names)


def test_importing_the_package_does_not_import_torch():
    assert run("import counterflow, sys; print('torch' in sys.modules, counterflow.__version__)")[0] == "False"


FORK = """
import os, torch  # before the fork, because importing torch takes seconds
for first in ("import counterflow.distill.losses", "import counterflow.distill.distill", "pass"):
    if os.fork() == 0:
        exec(first)
        import counterflow as cf
        print(callable(cf.distill), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.system
def test_the_function_distill_is_not_the_package_of_that_name():
    assert run(FORK) == ["True"] * 3


def test_public_names_are_pickled():
    for name in ("IAF", "FitConfig", "fit", "distill", "FlowDensity"):
        assert pickle.loads(pickle.dumps(getattr(cf, name))) is getattr(cf, name)


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match=r"^module 'counterflow' has no attribute 'flow_density'$"):
        cf.flow_density  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Densities' from 'counterflow'"):
        from counterflow import Densities  # noqa: F401


@pytest.mark.tools
@over(["hub", "nessai", "pocomc", "pymc", "pyro", "sbi", "zuko"], "name")
def test_an_adapter_needs_no_import_of_its_own(name):
    """`cf.interop.zuko` is the submodule, or an error that says what to install."""
    assert name in dir(cf.interop)
    try:
        assert getattr(cf.interop, name).__name__ == f"counterflow.interop.{name}"
    except ImportError as error:
        assert "pip install 'counterflow[" in str(error), error
