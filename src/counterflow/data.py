"""Data by name or by path: images and tables as tensors, and seeded splits of them.

Image files (IDX, PNG, JPEG) and the digits state their scale, so they stay integers with `levels`; arrays and
tables do not, so they are taken as they are unless the caller states `levels`.
"""

import contextlib
import gzip
import importlib
import math
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from counterflow.fit import check_finite

ACCEPTED = (
    '"digits", a folder of MNIST-style IDX files (train-images-idx3-ubyte, gz or not), a folder of PNG or '
    "JPEG images, an IDX file, or a .npy, .npz, .csv or .parquet file"
)
Array = np.ndarray[Any, Any]

_IDX_FILE = re.compile(r"(idx\d?-ubyte|\.idx)(\.gz)?$", re.IGNORECASE)
_IDX_IMAGES = re.compile(r"images[-.]idx3-ubyte(\.gz)?$", re.IGNORECASE)
_IDX_TEST = re.compile(r"(?<![a-z])(t10k|test)(?![a-z])", re.IGNORECASE)
_IDX_MAGIC = bytes([0, 0, 8, 3])  # unsigned bytes, 3 dimensions


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
        return _stated(_digits(), None, 17, levels, name)
    path = Path(os.path.expanduser(source))
    if not path.exists():
        raise FileNotFoundError(f"expected {ACCEPTED}; got {name!r}, where nothing is; check the path")
    if path.is_dir():
        return _stated(*_folder(path), 256, levels, name)
    if _IDX_FILE.search(path.name):
        return _stated(_idx(path), None, 256, levels, name)
    values = _tensor(_array(path, key), name)
    check_finite(values, name)
    return Dataset(values if levels is None else _as_levels(values, levels, name), None, levels, name)


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


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turn all that a decoder raises into one error that names the file; our own are raised outside of it."""
    try:
        yield
    except Exception as error:  # zlib.error, BadZipFile, EOFError, ArrowInvalid, SyntaxError, ..
        came = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"expected {path} to be {kind}, but it does not read: {came}; check that it is one and complete"
        ) from error


def _needs(module: str, package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"expected {package} for {purpose}, got: {error}; pip install {package}") from error


# Images.


def _digits() -> torch.Tensor:
    datasets = _needs("sklearn.datasets", "scikit-learn", "the digits")
    return torch.from_numpy(datasets.load_digits().images.astype(np.uint8)).unsqueeze(1)  # (1797, 1, 8, 8)


def _folder(folder: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    idx = [path for path in folder.iterdir() if _IDX_IMAGES.search(path.name) and path.is_file()]
    if idx:
        return _idx_folder(folder, idx)
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    # without .ipynb_checkpoints, and without the ._* that macOS puts beside each file
    files = [path for path in inside if not re.search(r"(^|/)\.", path.relative_to(folder).as_posix())]
    pictures = [path for path in files if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    if not pictures:
        came = f"{len(files)} other files, the first {files[0].name}" if files else "an empty folder"
        raise ValueError(f"expected IDX files or PNG or JPEG images in {folder}, got {came}; give {ACCEPTED}")
    return _pictures(pictures), None


def _idx_folder(folder: Path, paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor | None]:
    # backwards, as then x comes after x.gz and takes its place: a folder often has both
    backwards = sorted(paths, key=lambda path: path.name, reverse=True)
    files = {path.name.removesuffix(".gz").replace(".", "-"): path for path in backwards}
    test = [path for path in files.values() if _IDX_TEST.search(path.name)]
    train = [path for path in files.values() if path not in test]
    if len(train) != 1 or len(test) > 1:
        raise ValueError(
            f"expected one file of training images and at most one of test images (t10k or test) in "
            f"{folder}, got {', '.join(sorted(path.name for path in paths))}; give one of them"
        )
    values, official = _idx(train[0]), _idx(test[0]) if test else None
    if official is not None and official.shape[1:] != values.shape[1:]:
        raise ValueError(
            f"expected test images as large as the training images, got {tuple(values.shape[2:])} in "
            f"{train[0]} and {tuple(official.shape[2:])} in {test[0]}; put the two sets into two folders"
        )
    return values, official


def _idx(path: Path) -> torch.Tensor:
    """(N, 1, H, W) of an IDX file: 16 bytes of magic number, N, H and W, big-endian, then the pixels."""
    kind, shape, body = "an IDX file of images", (0, 0, 0), bytearray()
    with _reading(path, kind):
        with open(path, "rb") as probe:
            zipped = probe.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else open(path, "rb") as stream:
            header = stream.read(16)
            whole = len(header) == 16 and header[:4] == _IDX_MAGIC
            if whole:
                shape = struct.unpack(">3I", header[4:])
            # by the megabyte, so that a header that lies about the size makes nobody allocate it
            while whole and len(body) <= math.prod(shape) and (chunk := stream.read(1 << 20)):
                body += chunk
    if not whole:
        raise ValueError(
            f"expected {path} to be {kind}, which begins with 00000803 and three sizes, got "
            f"{header.hex() or 'nothing'}; labels (00000801) and other types are no images"
        )
    if not 0 < math.prod(shape) == len(body):
        came = f"{'more' if len(body) > math.prod(shape) else len(body)}"
        raise ValueError(
            f"expected at least one image in {path}, and the {' x '.join(map(str, shape))} pixels (images x height "
            f"x width) that its header declares, got {came}; fetch the file again"
        )
    return torch.frombuffer(body, dtype=torch.uint8).view(shape[0], 1, shape[1], shape[2])


def _pictures(paths: Sequence[Path]) -> torch.Tensor:
    """(N, C, H, W) of image files; all headers are checked before the first image is decoded."""
    image = _needs("PIL.Image", "pillow", "a folder of images")
    with warnings.catch_warnings():
        warnings.simplefilter("error", image.DecompressionBombWarning)
        headers = [_picture_header(image, path) for path in paths]
        sizes = [size for size, _ in headers]
        other = next((row for row, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None:
            raise ValueError(
                f"expected images of one size, got {sizes[0]} in {paths[0]} and {sizes[other]} in "
                f"{paths[other]} (height, width); resize or crop them first"
            )
        channels = 1 if all(grey for _, grey in headers) else 3
        values = torch.empty(len(paths), channels, *sizes[0], dtype=torch.uint8)
        for row, path in zip(values, paths, strict=True):
            row.copy_(_picture(image, path, channels))
    return values


def _picture_header(image: Any, path: Path) -> tuple[tuple[int, int], bool]:
    """(height, width), and whether it is grey."""
    with _reading(path, "a PNG or JPEG image"), image.open(path, formats=("PNG", "JPEG")) as opened:
        # Pillow makes 8 bits of 16-bit colour without a word: only the tile still says "RGB;16B"
        modes = [opened.mode, *(str(tile[3]) for tile in opened.tile)]
        size, grey = (opened.height, opened.width), opened.mode in ("1", "L", "LA")
    if any("16" in mode or mode == "I" for mode in modes):
        raise ValueError(f"expected 8 bits per channel in {path}, got 16-bit {modes}; convert it to 8 bits")
    return size, grey


def _picture(image: Any, path: Path, channels: int) -> torch.Tensor:
    with _reading(path, "a PNG or JPEG image"), image.open(path, formats=("PNG", "JPEG")) as opened:
        # a palette goes by way of RGBA, or Pillow warns
        plain = opened.convert("RGBA") if opened.mode in ("P", "PA") else opened
        pixels = np.array(plain.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1)


# Arrays and tables.


def _array(path: Path, key: str | None) -> Array:
    match path.suffix.lower():
        case ".npy":
            return _npy(path)
        case ".npz":
            return _npz(path, key)
        case ".csv":
            return _csv(path)
        case ".parquet":
            return _parquet(path)
    raise ValueError(f"expected {ACCEPTED}; got {path}; convert it to one of these")


def _npy(path: Path) -> Array:
    kind = "a NumPy .npy file"
    with _reading(path, kind), open(path, "rb") as stream:
        _, dtype = _npy_header(stream)
    _check_numeric(dtype, str(path))
    with _reading(path, kind):
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)  # mmap looks at the length first
    return array


def _npz(path: Path, key: str | None) -> Array:
    kind, headers = "a NumPy .npz file", {}
    with _reading(path, kind), zipfile.ZipFile(path) as archive:
        for member in (name for name in archive.namelist() if name.endswith(".npy")):
            with archive.open(member) as stream:
                headers[member.removesuffix(".npy")] = _npy_header(stream)
    chosen = next(iter(headers)) if key is None and len(headers) == 1 else key
    if chosen is None or chosen not in headers:
        held = ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in headers.items()) or "no arrays"
        came = "no key" if key is None else repr(key)
        raise ValueError(f"expected a key that names one array of {path}, got {came}; it holds {held}")
    _check_numeric(headers[chosen][1], f"{chosen!r} of {path}")
    with _reading(path, kind), zipfile.ZipFile(path) as archive, archive.open(f"{chosen}.npy") as stream:
        array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _check_numeric(dtype: np.dtype[Any], what: str) -> None:
    if dtype.kind not in "buif":
        never = "objects are pickled, may run code and are never loaded: " if dtype.hasobject else ""
        raise ValueError(f"expected real numbers in {what}, got dtype {dtype}; {never}save it as numbers")


def _csv(path: Path) -> Array:
    arrow, csv = (_needs(module, "pyarrow", "a CSV file") for module in ("pyarrow", "pyarrow.csv"))
    kind = "a CSV table in UTF-8 with as many cells on every line (blank lines do not count as a Row)"
    options = csv.ReadOptions(use_threads=False)  # with threads, errors do not know their line
    with _reading(path, kind), csv.open_csv(path, read_options=options) as stream:
        names = stream.schema.names
    if "" in names:
        raise ValueError(
            f"expected a name for every column of {path}, or no names at all, got {','.join(names)!r} in the "
            "first line; name or remove the column without (pandas: to_csv(index=False))"
        )
    # numbers in the first line are data, save for 0, 1, 2, .., the names that pandas gives to columns without
    if all(map(_is_number, names)) and names != [str(column) for column in range(len(names))]:
        options.autogenerate_column_names = True
        names = [f"f{column}" for column in range(len(names))]

    def read(dtype: Any) -> Any:
        convert = csv.ConvertOptions(column_types=dict.fromkeys(names, dtype), strings_can_be_null=True)
        return csv.read_csv(path, read_options=options, convert_options=convert)

    with _reading(path, kind):
        try:
            table = read(arrow.float64())
        except arrow.ArrowInvalid:
            table = read(arrow.string())  # for _stack to name the cell that is no number
    return _narrow(_stack(path, table))


def _parquet(path: Path) -> Array:
    parquet = _needs("pyarrow.parquet", "pyarrow", "a Parquet file")
    # not read_table, which makes a column of a folder called "year=2020"
    with _reading(path, "a Parquet file"), parquet.ParquetFile(path) as file:
        table = file.read()
    return _stack(path, table)


def _stack(path: Path, table: Any) -> Array:
    """(N, D) of an Arrow table, every cell of which must be there and be a number."""
    if not table.num_rows or not table.num_columns:
        return np.empty((table.num_rows, table.num_columns))
    text = next((text for text in _texts(table) if not _is_number(str(text[2]))), next(_texts(table), None))
    if text is not None:
        name, row, cell = text
        raise ValueError(
            f"expected numbers in column {name!r} of {path}, got {cell!r} in row {row} (counted from 0); "
            "drop the column or encode it as numbers"
        )
    missing = np.stack([column.is_null().to_numpy() for column in table.columns], axis=1)  # (N, D)
    if missing.any():
        places = [f"row {row} of {table.column_names[column]!r}" for row, column in np.argwhere(missing)[:3]]
        more = ", .." if missing.sum() > len(places) else ""
        raise ValueError(
            f"expected a number in every cell of {path}, got {missing.sum()} missing: {', '.join(places)}"
            f"{more} (rows counted from 0); impute, or drop {missing.any(1).sum()} of {len(missing)} rows"
        )
    return np.stack([column.to_numpy() for column in table.columns], axis=1)


def _texts(table: Any) -> Iterator[tuple[str, int, object]]:
    """(column, row, cell) of what is not missing in the columns that have no numeric type."""
    types = _needs("pyarrow.types", "pyarrow", "a table")
    numeric = (types.is_integer, types.is_floating, types.is_boolean)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not any(is_type(column.type) for is_type in numeric):
            for row, cell in enumerate(column.to_pylist()):
                if cell is not None:
                    yield name, row, cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text  # Python alone reads 1_000 and other scripts


def _narrow(array: Array) -> Array:
    """float32, or float64 if there are numbers beyond 2**24, where float32 rounds whole numbers."""
    reach = max(float(array.max(initial=0)), -float(array.min(initial=0)))
    return array.astype(np.float64 if reach > 2**24 else np.float32)


def _tensor(array: Array, name: str) -> torch.Tensor:
    """(N, D) or (N, C, H, W), float32 or float64."""
    shape = array.shape
    channels_first = array.ndim == 4 and shape[1] in (1, 3)
    channels_last = array.ndim == 4 and shape[3] in (1, 3, 4) and not channels_first
    if not (array.ndim in (2, 3) or channels_first or channels_last):
        todo = "(N, 1), if it is N rows of one feature" if array.ndim == 1 else "one of these"
        raise ValueError(
            f"expected rows (N, D), grey images (N, H, W), or colour images (N, 3, H, W) or (N, H, W, 3) in "
            f"{name}, got shape {shape}; reshape it to {todo}"
        )
    if array.size == 0:
        raise ValueError(f"expected at least one row and one column in {name}, got shape {shape}; add data")
    if array.ndim == 3:
        array = array[:, None]
    if channels_last:
        array = np.moveaxis(array, 3, 1)
    if array.dtype.kind != "f":
        array = _narrow(array)
    dtype = np.float64 if array.dtype.itemsize > 4 else np.float32
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def _as_levels(values: torch.Tensor, levels: int, name: str) -> torch.Tensor:
    bad = (values != values.round()) | (values < 0) | (values > levels - 1)
    if bad.any():
        row, *rest = bad.nonzero()[0].tolist()
        place = f"column {rest[0]}" if len(rest) == 1 else f"index {tuple(rest)}"
        raise ValueError(
            f"expected integers in 0..{levels - 1} in {name}, as levels={levels} says, got {int(bad.sum())} "
            f"other values, the first {values[(row, *rest)].item()} at row {row}, {place} (counted from 0); "
            "rescale and round them, or leave levels out"
        )
    return values.to(torch.uint8 if levels <= 256 else torch.int32)
