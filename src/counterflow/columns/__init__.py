"""What the columns of a table are: their maps to real numbers, how these are found, and columns to condition on."""

from counterflow.columns.context import Context
from counterflow.columns.detection import check_cells, check_columns, check_sizes, detect
from counterflow.columns.maps import Column, Columns

__all__ = ["Column", "Columns", "Context", "check_cells", "check_columns", "check_sizes", "detect"]
