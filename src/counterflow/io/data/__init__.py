"""Data by name or by path: images and tables as tensors, and seeded splits of them.

Image files (IDX, PNG, JPEG) and the digits state their scale, so they stay integers with `levels`; arrays and
tables do not, so they are taken as they are unless the caller states `levels`.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from counterflow.checks import check_finite
from counterflow.io.data.arrays import Array, as_levels, as_tensor, read_npy, read_npz
from counterflow.io.data.formats import ACCEPTED
from counterflow.io.data.images import IDX_FILE, read_digits, read_folder, read_idx
from counterflow.io.data.tables import read_csv, read_parquet

__all__ = ["ACCEPTED", "Dataset", "Splits", "load", "split"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Values and where they came from.

    values   (N, C, H, W) images or (N, D) rows; uint8 where the levels are known, else float32 or float64
    test     the official test split, shaped as values, where the source has one (MNIST-style t10k-* files)
    levels   values are integers in 0..levels-1: 256 for images, 17 for the digits; None for real numbers
    name     the source as the user named it
    """

    values: torch.Tensor
    test: torch.Tensor | None
    levels: int | None
    name: str

    def unit(self) -> "Dataset":
        """The same data as float32 in [0, 1], values / (levels - 1); itself when levels is None.

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
    """Three disjoint parts of a dataset, (n, *shape) each, with n >= 1."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


def load(source: str | Path, key: str | None = None, levels: int | None = None) -> Dataset:
    """Read images or a table; the source says which.

    source   "digits": the 1797 images of 8 x 8 that scikit-learn ships ("./digits" is a folder of that name);
             a folder of MNIST-style IDX files, or one such file; a folder of PNG or JPEG images, with its
             subfolders, in the order of their paths: grey ones have 1 channel, one in colour among them makes
             all RGB, alpha is dropped; a .npy, .npz, .csv (with or without a line of names) or .parquet file
    key      which array of an .npz that holds more than one
    levels   states that an array or a table holds integers in 0..levels-1, which is checked; they become
             uint8 if levels <= 256, else int32

    An array is (N, D) rows, (N, H, W) grey images, or colour images (N, C, H, W) with C in (1, 3) or else
    (N, H, W, C) with C in (1, 3, 4). Arrays of float64 stay so; all else, the numbers of a CSV too, becomes
    float32, or float64 if there are numbers beyond 2**24, where float32 rounds whole numbers.

    Raises FileNotFoundError if nothing is there, ImportError if the reader of the format is not installed,
    and ValueError for what is no data: what does not decode, no rows, mixed sizes, text, missing cells, NaN,
    infinity.

        >>> digits = load("digits")
        >>> digits.values.shape, digits.values.dtype, digits.levels
        (torch.Size([1797, 1, 8, 8]), torch.uint8, 17)
    """
    name = str(source)
    if levels is not None and levels < 2:
        raise ValueError(f"expected levels of at least 2, got {levels}; 8-bit values have levels=256")
    if key is not None and not name.lower().endswith(".npz"):
        raise ValueError(f"expected a key only with an .npz file, got {key!r} with {name}; leave the key out")
    if source == "digits":
        return _stated(read_digits(), None, 17, levels, name)
    path = Path(os.path.expanduser(source))
    if not path.exists():
        raise FileNotFoundError(f"expected {ACCEPTED}; got {name!r}, where nothing is; check the path")
    if path.is_dir():
        return _stated(*read_folder(path), 256, levels, name)
    if IDX_FILE.search(path.name):
        return _stated(read_idx(path), None, 256, levels, name)
    values = as_tensor(_array(path, key), name)
    check_finite(values, name)
    return Dataset(values if levels is None else as_levels(values, levels, name), None, levels, name)


def split(dataset: Dataset, *, seed: int, validation: float = 0.1, test: float = 0.1) -> Splits:
    """Cut a dataset into train, validation and test: at random, and always the same for one seed.

    validation and test are fractions of the rows, rounded down. Where the dataset has an official test split,
    that is the test part, and validation alone is cut from the values. Torch's global generator is not used.

    Raises ValueError for fractions that leave nothing to train on, and for too few rows to fill every part.

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
    sizes = [math.floor(rows * fraction + 1e-9) for fraction in fractions]  # as 49 * (1 / 49) < 1 in float64
    if rows - sum(sizes) < 1 or min(sizes) < 1:
        raise ValueError(
            f"expected at least {needed} rows in {dataset.name}, so that no part is empty, got {rows} for "
            f"fractions of {fractions}; give more rows or larger fractions"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    train, *held_out = (dataset.values[part] for part in torch.split(order, [rows - sum(sizes), *sizes]))
    return Splits(train, held_out[0], held_out[1] if dataset.test is None else dataset.test)


def _stated(values: torch.Tensor, test: torch.Tensor | None, levels: int, asked: int | None, name: str) -> Dataset:
    if asked not in (None, levels):
        raise ValueError(f"expected levels={levels}, which {name} has, got levels={asked}; leave levels out")
    return Dataset(values, test, levels, name)


def _array(path: Path, key: str | None) -> Array:
    match path.suffix.lower():
        case ".npy":
            return read_npy(path)
        case ".npz":
            return read_npz(path, key)
        case ".csv":
            return read_csv(path)
        case ".parquet":
            return read_parquet(path)
    raise ValueError(f"expected {ACCEPTED}; got {path}; convert it to one of these")
