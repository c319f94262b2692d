"""Optional packages that the commands need, checked before any work."""

from __future__ import annotations

import warnings
from pathlib import Path

from counterflow.checks import require
from counterflow.io.table_formats import format_of, suffix_of

PACKAGES = {  # import name -> the extra that installs it, and its purpose
    "arviz": ("posterior", "R-hat of chains"),
    "arviz_stats": ("posterior", "R-hat of chains"),
    "xarray": ("posterior", "posterior.nc"),
    "h5netcdf": ("posterior", "posterior.nc"),
    "h5py": ("posterior", "posterior.nc"),
    "numpyro": ("refine", "--refine neutra"),
    "nutpie": ("refine", "--refine nuts"),
    "tensorboard": ("tensorboard", "--tracker tensorboard"),
    "wandb": ("wandb", "--tracker wandb"),
    "mlflow": ("mlflow", "--tracker mlflow"),
    "matplotlib": ("plots", "plots"),
    "onnx": ("export", "ONNX files"),
    "onnxscript": ("export", "ONNX files"),
    "jinja2": ("cli", "report.html"),
    "PIL": ("data", "images"),
    "pyarrow": ("data", "tables"),
    "openpyxl": ("excel", ".xlsx files"),
    "duckdb": ("databases", ".duckdb files"),
    "sklearn": ("data", "density estimation and bundled data"),
}
READERS = {"excel": "openpyxl", "duckdb": "duckdb"}  # format of a table -> package that reads it, beside pyarrow


def table_packages(*paths: str | Path) -> list[str]:
    """Return the import names of the packages that read tables.

    Example:
        >>> table_packages("sales.xlsx")
        ['pyarrow', 'openpyxl']
    """
    formats = [format_of(suffix_of(Path(path))) for path in paths]
    return ["pyarrow", *(READERS[name] for name in formats if name in READERS)]


def require_packages(*modules: str) -> None:
    """Import optional packages, or raise one error about all of those that are missing.

    Raises:
        ImportError: at least one package does not import.

    Example:
        >>> require_packages("matplotlib", "pyarrow")
    """
    problems = []
    extras = []
    for module in modules:
        extra, purpose = PACKAGES[module]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # ArviZ announces its next version on import
                require(module, extra, purpose)
        except ImportError as error:
            problems.append(str(error).partition("; pip install")[0])
            extras.append(extra)
    if problems:
        raise ImportError(f"{'; '.join(problems)}; pip install 'counterflow[{','.join(dict.fromkeys(extras))}]'")
