"""Data by name or path: images and tables as tensors, and their seeded splits.

Image files and the digits have known levels, so they stay integers. Arrays and tables do not, so their
numbers are kept unless the caller gives `levels`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from counterflow.checks import check_finite
from counterflow.io.data.arrays import read_npy, read_npz
from counterflow.io.data.cells import Array
from counterflow.io.data.conversion import as_levels, as_tensor
from counterflow.io.data.formats import ACCEPTED
from counterflow.io.data.images import IDX_FILE, read_digits, read_folder, read_idx
from counterflow.io.data.tables import read_rows
from counterflow.io.table_formats import format_of, suffix_of

__all__ = ["Dataset", "Splits", "load", "split"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images or rows, and their source.

    Args:
        values: images (N, C, H, W) or rows (N, D); uint8 where the levels are known, else float32 or float64.
        test: the official test split, shaped like values, where the source has one (MNIST-style t10k-* files).
        levels: number of integer levels, if values are integers in 0..levels-1: 256 for images, 17 for the digits;
            None for real numbers.
        name: the source as the user gave it.
    """

    values: torch.Tensor
    test: torch.Tensor | None
    levels: int | None
    name: str

    def unit(self) -> Dataset:
        """Return the data scaled to [0, 1] as float32, values / (levels - 1); unchanged if levels is None.

        Example:
            >>> load("digits").unit().values.max()
            tensor(1.)
        """
        if self.levels is None:
            return self
        top = self.levels - 1
        test = None if self.test is None else self.test.float().div_(top)
        return Dataset(self.values.float().div_(top), test, None, self.name)


@dataclass(frozen=True, eq=False)
class Splits:
    """Three disjoint parts of a dataset, each (n, *shape) with n >= 1."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


def load(source: str | Path, key: str | None = None, levels: int | None = None) -> Dataset:
    """Load images or a table.

    | source | data |
    |---|---|
    | "digits" | the 1797 images of 8 x 8 that scikit-learn ships ("./digits" is a folder of that name) |
    | folder of MNIST-style IDX files, or one such file | grey images |
    | folder of PNG, JPEG, TIFF or WebP images | images in the order of their paths, subfolders included |
    | .npy or .npz file | rows (N, D), grey images (N, H, W), or colour images, see below |
    | .csv, .parquet, .feather, .xlsx, .sqlite or .duckdb file | rows (N, D); the first line of a CSV may hold names |

    Images are grey unless one of them has colour, then all become RGB; alpha is dropped. Image files are turned upright
    by their EXIF orientation, and 16 bits per channel become 8. A colour array is (N, C, H, W) with C in (1, 3), or
    else (N, H, W, C) with C in (1, 3, 4). Arrays and Parquet columns of float64 stay float64. Everything else becomes
    float32, or float64 if a number is beyond 2**24, where float32 rounds integers.

    Args:
        source: name or path.
        key: the name of the array, for an .npz file that holds more than one.
        levels: the number of integer levels of an array or a table, whose values must be integers in 0..levels-1;
            they become uint8 if levels <= 256, else int32.

    Raises:
        FileNotFoundError: the path does not exist.
        ImportError: the package that reads the format is not installed.
        ValueError: the file does not decode, has no rows or images of different sizes, or holds text, missing cells,
            NaN or infinity.

    Example:
        >>> digits = load("digits")
        >>> digits.values.shape, digits.values.dtype, digits.levels
        (torch.Size([1797, 1, 8, 8]), torch.uint8, 17)
    """
    name = str(source)
    if levels is not None and levels < 2:
        raise ValueError(f"expected levels to be at least 2, got {levels}; 8-bit values have levels=256")
    if key is not None and not name.lower().endswith(".npz"):
        raise ValueError(f"expected a key only with an .npz file, got {key!r} with {name}; leave the key out")
    if source == "digits":
        return _with_levels(read_digits(), None, 17, levels, name)
    path = Path(os.path.expanduser(source))
    if not path.exists():
        raise FileNotFoundError(f"expected {ACCEPTED}; got {name!r}, which does not exist; check the path")
    if path.is_dir():
        return _with_levels(*read_folder(path), 256, levels, name)
    if IDX_FILE.search(path.name):
        return _with_levels(read_idx(path), None, 256, levels, name)
    values = as_tensor(_read_array(path, key), name)
    check_finite(values, name)
    return Dataset(values if levels is None else as_levels(values, levels, name), None, levels, name)


def split(dataset: Dataset, *, seed: int, validation: float = 0.1, test: float = 0.1) -> Splits:
    """Split a dataset at random into train, validation and test parts, always the same for one seed.

    An official test split of the dataset becomes the test part; then only the validation part is taken from its values.
    Torch's global generator is not used.

    Args:
        dataset: the data.
        seed: of the permutation.
        validation: fraction of the rows, rounded down.
        test: fraction of the rows, rounded down.

    Raises:
        ValueError: the fractions leave nothing to train on, or there are too few rows to fill every part.

    Example:
        >>> parts = split(load("digits"), seed=0)
        >>> len(parts.train), len(parts.validation), len(parts.test)
        (1439, 179, 179)
    """
    fractions = [validation] if dataset.test is not None else [validation, test]
    if not (0 < validation < 1 and 0 < test < 1 and sum(fractions) < 1):
        raise ValueError(
            f"expected fractions above 0 that leave rows to train on, got validation={validation} and "
            f"test={test}; 0.1 is common for each"
        )
    rows = len(dataset.values)
    needed = math.ceil(1 / min(fractions) - 1e-9)
    sizes = [math.floor(rows * fraction + 1e-9) for fraction in fractions]  # because 49 * (1 / 49) < 1 in float64
    if rows - sum(sizes) < 1 or min(sizes) < 1:
        raise ValueError(
            f"expected at least {needed} rows in {dataset.name}, so that no part is empty, got {rows} for "
            f"fractions of {fractions}; give more rows or larger fractions"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    train, *held_out = (dataset.values[part] for part in torch.split(order, [rows - sum(sizes), *sizes]))
    return Splits(train, held_out[0], held_out[1] if dataset.test is None else dataset.test)


def _with_levels(values: torch.Tensor, test: torch.Tensor | None, levels: int, given: int | None, name: str) -> Dataset:
    if given not in (None, levels):
        raise ValueError(f"expected levels={levels}, the levels of {name}, got levels={given}; leave levels out")
    return Dataset(values, test, levels, name)


def _read_array(path: Path, key: str | None) -> Array:
    match path.suffix.lower():
        case ".npy":
            return read_npy(path)
        case ".npz":
            return read_npz(path, key)
    if format_of(suffix_of(path)) is None:
        raise ValueError(f"expected {ACCEPTED}; got {path}; convert it to one of these")
    return read_rows(path)
