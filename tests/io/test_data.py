"""Every format that load reads, every error, and the properties of split."""

import gzip
import io
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from counterflow.io.data import Dataset, load, split
from counterflow.io.data.cells import NotANumberError

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (3, 5, 7), dtype=np.uint8)  # (N, H, W)
COLOUR = RNG.integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)  # (N, H, W, C)
ROWS = RNG.normal(size=(11, 3))


def idx(images: np.ndarray, magic: int = 0x803) -> bytes:
    return struct.pack(">4I", magic, *images.shape) + images.tobytes()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def zipped(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def picture(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(stream, kind)
    return stream.getvalue()


def pages(pictures: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    first, *rest = map(Image.fromarray, pictures)
    first.save(stream, kind, save_all=True, append_images=rest)
    return stream.getvalue()


def parquet(**columns: object) -> bytes:
    stream = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), stream)
    return stream.getvalue()


def write(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def lie(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) == 1 and len(old) == len(new)
    return content.replace(old, new)


def twisted(content: bytes) -> bytes:
    """The same file with the second half of its bytes turned over."""
    half = len(content) // 2
    return content[:half] + bytes(255 - byte for byte in content[half:])


# What is read.

IMAGES: dict[str, tuple[dict[str, bytes], np.ndarray]] = {
    "png": ({f"{i}.png": picture(x) for i, x in enumerate(GREY)}, GREY[:, None]),
    "one png": ({"a.png": picture(GREY[0])}, GREY[:1, None]),
    "colour": ({f"{i}.PNG": picture(x) for i, x in enumerate(COLOUR)}, COLOUR.transpose(0, 3, 1, 2)),
    "tiff and webp": (
        {"a.tif": picture(COLOUR[0], "TIFF"), "b.TIFF": picture(COLOUR[1], "TIFF")},
        COLOUR[:2].transpose(0, 3, 1, 2),
    ),
    "subfolders, in order": (
        {"b/1.png": picture(GREY[1]), "a/2.png": picture(GREY[0]), "c.png": picture(GREY[2])},
        GREY[:, None],
    ),
    "hidden and other files": (
        {"1.png": picture(GREY[0]), "._1.png": b"?", ".cache/2.png": b"?", "labels.txt": b"5"},
        GREY[:1, None],
    ),
    "grey beside colour": (
        {"1.png": picture(GREY[0]), "2.png": picture(COLOUR[0])},
        np.stack([np.broadcast_to(GREY[0], (3, 5, 7)), COLOUR[0].transpose(2, 0, 1)]),
    ),
    "alpha": ({"1.png": picture(COLOUR[0], mode="RGBA")}, COLOUR[:1].transpose(0, 3, 1, 2)),
    "grey with alpha": ({"1.png": picture(GREY[0], mode="LA")}, GREY[:1, None]),
    "black and white": ({"1.png": picture(GREY[0] > 99)}, 255 * (GREY[:1, None] > 99)),
}


@pytest.mark.parametrize(("files", "expected"), IMAGES.values(), ids=IMAGES)
def test_images_keep_their_integers(tmp_path: Path, files: dict[str, bytes], expected: np.ndarray):
    dataset = load(write(tmp_path, **files))
    assert dataset.values.dtype == torch.uint8 and dataset.levels == 256 and dataset.test is None
    assert np.array_equal(dataset.values.numpy(), expected)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train-images-idx3-ubyte", idx(GREY)),
        ("t10k-images.idx3-ubyte.gz", gzip.compress(idx(GREY))),
        ("zipped-whatever-the-name.IDX", gzip.compress(idx(GREY))),
    ],
)
def test_one_idx_file(tmp_path: Path, name: str, content: bytes):
    dataset = load(write(tmp_path, **{name: content}) / name, levels=256)
    assert dataset.values.dtype == torch.uint8 and dataset.levels == 256 and dataset.test is None
    assert np.array_equal(dataset.values.numpy(), GREY[:, None])


@pytest.mark.parametrize(("pixels", "channels"), [(GREY[0], 1), (COLOUR[0], 3)], ids=["grey", "colour"])
def test_jpeg(tmp_path: Path, pixels: np.ndarray, channels: int):
    flat = picture(np.full_like(pixels, 77), "JPEG")  # compression loses noise, not this
    values = load(write(tmp_path, **{"1.jpg": flat, "2.jpeg": flat, "3.JPG": flat})).values
    assert values.shape == (3, channels, 5, 7) and (values.int() - 77).abs().max() <= 1


def test_palette_becomes_rgb(tmp_path: Path):
    flat = np.full((5, 7, 3), (255, 0, 51), dtype=np.uint8)
    image = Image.fromarray(flat).convert("P")
    image.save(tmp_path / "a.png", transparency=b"\x00\xff")  # of which Pillow would warn
    assert load(tmp_path).values.shape == (1, 3, 5, 7)
    assert (load(tmp_path).values[0].permute(1, 2, 0).numpy() == flat).all()


MNIST_LIKE = {
    "plain": ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
    "gz": ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
    "dots": ("train-images.idx3-ubyte", "t10k-images.idx3-ubyte.gz"),
    "emnist": ("emnist-letters-train-images-idx3-ubyte.gz", "emnist-letters-test-images-idx3-ubyte.gz"),
}


@pytest.mark.parametrize(("train", "test"), MNIST_LIKE.values(), ids=MNIST_LIKE)
def test_idx_folder_has_an_official_test_split(tmp_path: Path, train: str, test: str):
    for name, images in ((train, GREY), (test, GREY[:1] // 2)):
        content = idx(images)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"no image")
    dataset = load(tmp_path)
    assert dataset.name == str(tmp_path) and dataset.levels == 256 and dataset.test is not None
    assert np.array_equal(dataset.values.numpy(), GREY[:, None])
    assert np.array_equal(dataset.test.numpy(), GREY[:1, None] // 2)


def test_idx_beside_its_gz_is_read_once(tmp_path: Path):
    files = {"train-images-idx3-ubyte": idx(GREY), "train-images-idx3-ubyte.gz": b"not even read"}
    assert load(write(tmp_path, **files)).values.shape == (3, 1, 5, 7)


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"MNIST is not at {MNIST}")
def test_mnist():
    dataset = load(MNIST)
    assert dataset.test is not None and dataset.levels == 256
    assert dataset.values.shape == (60000, 1, 28, 28) and dataset.test.shape == (10000, 1, 28, 28)
    assert dataset.values.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)  # as everyone knows
    parts = split(dataset, seed=1)
    assert [len(parts.train), len(parts.validation)] == [54000, 6000] and parts.test is dataset.test


F32, F64 = torch.float32, torch.float64
LONG = np.r_[np.ones(600_000), 1.5][:, None]
ARRAYS: dict[str, tuple[str, bytes, torch.dtype, np.ndarray]] = {
    "rows": ("x.npy", npy(ROWS), F64, ROWS),
    "one cell": ("x.npy", npy(ROWS[:1, :1]), F64, ROWS[:1, :1]),
    "float32": ("x.npy", npy(ROWS.astype("f4")), F32, ROWS.astype("f4")),
    "big-endian": ("x.NPY", npy(ROWS.astype(">f4")), F32, ROWS.astype("f4")),
    "float16": ("x.npy", npy(ROWS.astype("f2")), F32, ROWS.astype("f2")),
    "fortran": ("x.npy", npy(np.asfortranarray(ROWS)), F64, ROWS),
    "integers": ("x.npy", npy(GREY[0]), F32, GREY[0]),
    "large integers": ("x.npy", npy(np.array([[2**24 + 1, -7]])), F64, np.array([[2**24 + 1, -7]])),
    "booleans": ("x.npy", npy(ROWS > 0), F32, ROWS > 0),
    "grey": ("x.npy", npy(GREY), F32, GREY[:, None]),
    "channels last": ("x.npy", npy(COLOUR), F32, COLOUR.transpose(0, 3, 1, 2)),
    "channels first": ("x.npy", npy(COLOUR.transpose(0, 3, 1, 2)), F32, COLOUR.transpose(0, 3, 1, 2)),
    "both may be channels": ("x.npy", npy(np.ones((2, 3, 4, 4))), F64, np.ones((2, 3, 4, 4))),
    "npz of one": ("x.npz", npz(rows=ROWS), F64, ROWS),
    "csv": ("x.csv", b"a,b\n1,-2.5\n3, 4e1\n\n", F32, np.array([[1, -2.5], [3, 40]])),
    "csv, windows": ("x.csv", "\ufeffa,b\r\n1,2\r\n".encode(), F32, np.array([[1, 2]])),
    "csv without names": ("x.csv", b"1,-2.5\n3,4\n", F32, np.array([[1, -2.5], [3, 4]])),
    "csv named by numbers": ("x.csv", b"0,1\n3,4\n", F32, np.array([[3, 4]])),
    "csv of long numbers": ("x.csv", b"t\n1700000001\n", F64, np.array([[1700000001]])),
    "csv, at last a fraction": (
        "x.csv",
        b"a\n" + b"1\n" * 600_000 + b"1.5\n",
        F32,
        np.r_[np.ones(600_000), 1.5][:, None],
    ),
    "parquet": ("x.parquet", parquet(a=ROWS[:, 0], b=ROWS[:, 1]), F64, ROWS[:, :2]),
    "parquet of float32": ("x.parquet", parquet(a=pa.array([1.5, 2.0**25], "f4")), F32, np.array([[1.5], [2.0**25]])),
    "parquet of texts": ("x.parquet", parquet(a=["1", " 2.5 "], b=[3, 4]), F32, np.array([[1, 3], [2.5, 4]])),
    "parquet, mixed": ("x.parquet", parquet(a=[1, 2], b=[True, False]), F32, np.array([[1, 1], [2, 0]])),
}


@pytest.mark.parametrize(("name", "content", "dtype", "expected"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_and_tables_are_taken_as_they_are(
    tmp_path: Path, name: str, content: bytes, dtype: torch.dtype, expected: np.ndarray
):
    dataset = load(str(write(tmp_path, **{name: content}) / name))
    assert dataset.levels is None and dataset.test is None and dataset.unit() is dataset
    assert dataset.values.dtype == dtype and dataset.values.is_contiguous()
    assert np.array_equal(dataset.values.numpy(), expected)


def test_key_chooses_an_array(tmp_path: Path):
    path = write(tmp_path, **{"x.npz": npz(rows=ROWS, grey=GREY, text=np.array(["a"]))}) / "x.npz"
    assert load(path, "rows").values.shape == (11, 3)
    assert load(path, key="grey").values.shape == (3, 1, 5, 7)


def test_parquet_takes_no_column_from_its_folder(tmp_path: Path):
    name = "year=2020/x.parquet"
    assert load(write(tmp_path, **{name: parquet(a=[1.0, 2.0])}) / name).values.shape == (2, 1)


@pytest.mark.parametrize(("levels", "dtype"), [(256, torch.uint8), (257, torch.int32)])
def test_stated_levels_make_integers(tmp_path: Path, levels: int, dtype: torch.dtype):
    path = write(tmp_path, **{"x.npy": npy(GREY.astype("f8"))}) / "x.npy"
    dataset = load(path, levels=levels)
    assert dataset.values.dtype == dtype and dataset.levels == levels
    assert np.array_equal(dataset.values.numpy(), GREY[:, None])


def test_digits_and_their_unit():
    digits = load("digits", levels=17)
    assert digits.values.shape == (1797, 1, 8, 8) and digits.values.dtype == torch.uint8
    assert digits.values.max() == 16 and digits.levels == 17 and digits.name == "digits"
    unit = Dataset(digits.values, digits.values[:2], 17, "digits").unit()
    assert unit.levels is None and unit.test is not None and unit.values.dtype == unit.test.dtype == F32
    assert torch.equal(unit.values, digits.values / 16) and torch.equal(unit.test, unit.values[:2])
    assert digits.values.dtype == torch.uint8 and digits.values.max() == 16  # left alone


# What is refused, and what the message says.

WIDE = RNG.integers(0, 2**16, (5, 7)).astype(np.uint16)
NAN = np.array([[1.0, 2.0], [3.0, np.nan], [np.inf, np.nan]])
SPOT = np.where(np.arange(35).reshape(1, 5, 7) == 9, -np.inf, 1.0)
NPY = npy(ROWS)
PNG = picture(GREY[0])
HUGE = gzip.compress(struct.pack(">4I", 0x803, 2**31, 2**32 - 1, 2**32 - 1))

FOLDERS: dict[str, tuple[dict[str, bytes], str]] = {
    "empty": ({}, r"expected IDX files or PNG, JPEG, TIFF or WebP images in .*, got an empty folder; give"),
    "neither": ({"a.txt": b"", "b.md": b""}, r'got 2 other files, the first a.txt; give "digits", a folder of'),
    "two training sets": (
        {"a-train-images-idx3-ubyte": b"", "b-train-images-idx3-ubyte.gz": b""},
        r"one file of training images .* got a-train-images-idx3-ubyte, b-train-.*gz; give one of them",
    ),
    "test alone": ({"t10k-images-idx3-ubyte": b""}, r"expected one file of training images .*got t10k-images"),
    "test of another size": (
        {"train-images-idx3-ubyte": idx(GREY), "t10k-images-idx3-ubyte": idx(GREY[:, 1:])},
        r"as large as the training images, got \(5, 7\) in .*train-.* and \(4, 7\) in .*t10k-.*; put the two",
    ),
    "two sizes": (
        {"a.png": PNG, "b/c.png": picture(GREY[0].T), "d.png": PNG},
        r"of one size, got \(5, 7\) in .*a\.png and \(7, 5\) in .*c\.png \(height, width\); resize or crop",
    ),
    "no image": ({"a.png": b"hello"}, r"expected .*a\.png to be a PNG, JPEG, TIFF or WebP image, but it does not"),
    "cut": ({"a.png": PNG, "b.png": PNG[:-40]}, r"expected .*b\.png to be a PNG.* read: .*; check that it"),
    "corrupt": ({"a.jpg": twisted(PNG)}, r"expected .*a\.jpg to be a PNG.* not read: .+"),
    "another kind": ({"a.png": picture(GREY[0], "BMP")}, r"expected .*a\.png to be a PNG.* not read: .+"),
    "32 bits": (
        {"a.tif": picture(WIDE.astype(np.int32), "TIFF")},
        r"expected 8 or 16 bits per channel in .*a\.tif, got 32 \(mode I\); convert it to 8",
    ),
    "two pages": ({"a.tiff": pages(GREY[:2], "TIFF")}, r"expected one image in .*a\.tiff, got 2; save each"),
    "an animation": ({"a.webp": pages(COLOUR[:2], "WEBP")}, r"expected one image in .*a\.webp, got 2; save each"),
}  # fmt: skip

FILES: dict[str, tuple[str, bytes, str]] = {
    "unknown": ("x.ods", b"", r'expected "digits", .* \.parquet or other table; got .*x\.ods; convert it to one of'),
    # IDX
    "labels": ("a-idx1-ubyte", idx(GREY, magic=0x801), r"begins with 00000803 .* got 00000801.*; labels \("),
    "empty idx": ("a.idx", b"", r"expected .*a\.idx to be an IDX file of images, .* got nothing"),
    "half a header": ("a.idx", idx(GREY)[:9], r"begins with 00000803 and three sizes, got 00000803"),
    "no pixels": ("a.idx", idx(GREY[:0]), r"one image in .*a\.idx, and the 0 x 5 x 7 pixels .* got 0; download"),
    "short idx": ("a.idx", idx(GREY)[:-4], r"in .*a\.idx, and the 3 x 5 x 7 pixels .* declares, got 101; download"),
    "long idx": ("a.idx", idx(GREY) + b"?", r"in .*a\.idx, and the 3 x 5 x 7 pixels .* got more; download"),
    "idx of 2**95": ("a.idx.gz", HUGE, r"and the 2147483648 x 4294967295 x 4294967295 .* got 0; download"),
    "cut gz": ("a.idx.gz", gzip.compress(idx(GREY))[:-20], r"a\.idx\.gz to be an IDX .* not read: .+; check"),
    "corrupt gz": ("a.idx", twisted(gzip.compress(idx(GREY))), r"a\.idx to be an IDX .* not read: .+; check"),
    # NumPy
    "no npy": ("x.npy", b"hello", r"x\.npy to be a NumPy \.npy file, but it does not read: .+; check"),
    "empty npy": ("x.npy", b"", r"x\.npy to be a NumPy \.npy file, but it does not read: .+; check"),
    "cut npy": ("x.npy", NPY[:-8], r"x\.npy to be a NumPy \.npy file, but .*: it declares an array \(11, 3\) of 264"),
    "npy of 2 TB": ("x.npy", lie(NPY, b"(11, 3), }" + b" " * 9, b"(99999999999, 3), }"), r"of 2,399,999,999,976 b"),
    "objects": ("x.npy", npy(np.array([[1, "a"]], object)), r"dtype object; objects are pickled.*: save it"),
    "complex": ("x.npy", npy(ROWS * 1j), r"real numbers in .*x\.npy, got dtype complex128; save it as numb"),
    "0-d": ("x.npy", npy(np.array(1.0)), r"rows \(N, D\), .* got shape \(\); reshape it to one of these"),
    "1-d": ("x.npy", npy(ROWS[0]), r"got shape \(3,\); reshape it to \(N, 1\), if it is N rows of one feat"),
    "4-d": ("x.npy", npy(np.ones((2, 5, 7, 2))), r"or \(N, H, W, 3\) in .*x\.npy, got shape \(2, 5, 7, 2\)"),
    "5-d": ("x.npy", npy(np.ones((2, 1, 1, 1, 3))), r"got shape \(2, 1, 1, 1, 3\); reshape it to one of"),
    "no rows": ("x.npy", npy(ROWS[:0]), r"at least one row and one column in .*x\.npy, got shape \(0, 3\)"),
    "no columns": ("x.npy", npy(ROWS[:, :0]), r"one row and one column in .*x\.npy, got shape \(11, 0\)"),
    "nan": ("x.npy", npy(NAN), r"x\.npy, got 3 non-.* 6, the first \(nan\) at row 1, column 1 .*the 2 of 3 row"),
    "nan in image": ("x.npy", npy(SPOT), r"1 non-finite of 35, the first \(-inf\) at row 0, index \(0, 1, 2\)"),
    "two arrays": ("x.npz", npz(a=ROWS, b=GREY), r"no key; it holds a \(11, 3\) float64, b \(3, 5, 7\) uint8"),
    "only objects": ("x.npz", npz(a=np.array([None])), r"in 'a' of .*x\.npz, got dtype object; objects are"),
    "no arrays": ("x.npz", zipped(a=b"1"), r"names one array of .*x\.npz, got no key; it holds no arrays"),
    "no npz": ("x.npz", NPY, r"x\.npz to be a NumPy \.npz file, but it does not read: .*zip.*; check"),
    "cut npz": ("x.npz", npz(a=ROWS)[:-30], r"x\.npz to be a NumPy \.npz file, but it does not read: .+"),
    "cut array": ("x.npz", zipped(**{"a.npy": NPY[:-8]}), r"x\.npz to be a NumPy .* does not read: .+; check"),
    "corrupt npz": ("x.npz", lie(zipped(**{"a.npy": NPY}), ROWS.tobytes(), bytes(264)), r"read: Bad CRC"),
    # tables
    "text": ("x.csv", b"id,name\n1,2\n3,4\n5,bob\n6,eve\n", r"column 'name' of .*, got 'bob' in row 2 \(count"),
    "late text": ("x.csv", b"a\n" + b"1\n" * 600_000 + b"b\n", r"column 'a' of .*, got 'b' in row 600000 "),
    "underscores": ("x.csv", b"a,b\n1,7\n2,1_000\n", r"numbers in column 'b' of .*x\.csv, got '1_000' in row 1 "),
    "missing": (
        "x.csv",
        b"a,b\n1,\n,3\n4,NA\n5,nan\n6,7\n",
        r"every cell of .*x\.csv, got 4 missing \(NaN\): row 0 of 'b', row 1 of 'a', row 2 of 'b', \.\. .* 4 of 5 rows",
    ),
    "infinity": ("x.csv", b"a,b\n1,2\n3,1e999\n", r"finite numbers in every cell .* 1 infinite \(inf\): row 1 of 'b'"),
    "ragged": ("x.csv", b"a,b\n1,2\n3\n", r"x\.csv to be a CSV table .*Row #3: Expected 2 columns, got 1: 3"),
    "late ragged": ("x.csv", b"a,b\n" + b"1,2\n" * 300_000 + b"3\n", r"Row #300002: Expected 2 columns, got 1"),
    "index column": ("x.csv", b",a\n0,1\n", r"a name for every column of .*, got ',a' in the first line; name"),
    "late latin-1": ("x.csv", b"a,b\n" + b"1,2\n" * 300_000 + b"1,\xe9\n", r"x\.csv to be a CSV table .* not read"),
    "no text": ("x.csv", b"a,b\n1,\x00\n", r"x\.csv to be a CSV table, got bytes that are not text; convert it"),
    "empty csv": ("x.csv", b"", r"x\.csv to be a CSV table .* does not read: Empty CSV file; check that"),
    "names only": ("x.csv", b"a,b\n", r"at least one row and one column in .*x\.csv, got shape \(0, 2\)"),
    "strings": ("x.parquet", parquet(a=[1, 2], b=[None, "x"]), r"column 'b' of .*, got 'x' in row 1 .* encode it"),
    "null": ("x.parquet", parquet(a=[1, None], b=[2.5, 3.5]), r"got 1 missing \(NaN\): row 1 of 'a' \(rows .* 1 of 2"),
    "all null": ("x.parquet", parquet(a=[None, None]), r"got 2 missing \(NaN\): row 0 of 'a', row 1 of 'a' \(rows"),
    "parquet nan": ("x.parquet", parquet(a=[1.0, np.nan]), r"got 1 missing \(NaN\): row 1 of 'a' .* 1 of 2 rows"),
    "no parquet": ("x.parquet", b"hello", r"x\.parquet to be a Parquet file, but it does not read: .+; check"),
    "cut parquet": ("x.parquet", parquet(a=[1.0])[:-9], r"to be a Parquet file, but it does not read: .+; check"),
    "only a schema": ("x.parquet", parquet(a=pa.array([], "f8")), r"one row and one column .* shape \(0, 1\)"),
}  # fmt: skip

ARGUMENTS: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "levels of images": ("a.idx", idx(GREY), {"levels": 16}, r"levels=256, the levels of .*, got levels=16; leave"),
    "key of images": ("a.idx", b"", {"key": "x"}, r"a key only with an \.npz file, got 'x' with .*; leave the"),
    "key of npy": ("x.npy", NPY, {"key": "a"}, r"expected a key only with an \.npz file, got 'a' with .*x\.npy"),
    "wrong key": ("x.npz", npz(a=ROWS), {"key": "x"}, r"one array of .*, got 'x'; it holds a \(11, 3\) float64"),
    "one level": ("x.npy", NPY, {"levels": 1}, r"expected levels to be at least 2, got 1; 8-bit values have"),
    "no integers": (
        "x.npy",
        npy(np.array([[1, 2], [0, 0.5], [3, 1]])),
        {"levels": 3},
        r"integers in 0\.\.2 in .*x\.npy, .* got 2 other values, the first 0\.5 at row 1, column 1 .*; rescale",
    ),
    "negative": ("x.npy", npy(-1.0 - GREY), {"levels": 256}, r"got 105 other .* at row 0, index \(0, 0, 0\)"),
}  # fmt: skip


def refusal(message: str, source: Path, **arguments: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(source, **arguments)
    assert type(caught.value) in (ValueError, NotANumberError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("files", "message"), FOLDERS.values(), ids=FOLDERS)
def test_refused_folders(tmp_path: Path, files: dict[str, bytes], message: str):
    refusal(message, write(tmp_path, **files))


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_refused_files(tmp_path: Path, name: str, content: bytes, message: str):
    refusal(message, write(tmp_path, **{name: content}) / name)


@pytest.mark.parametrize(("name", "content", "arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_refused_arguments(tmp_path: Path, name: str, content: bytes, arguments: dict[str, Any], message: str):
    refusal(message, write(tmp_path, **{name: content}) / name, **arguments)


def test_an_empty_or_missing_path_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r'expected "digits", .*; got .*nowhere.*, which does not exist; check'):
        load(tmp_path / "nowhere.npy")


def test_16_bits_become_8(tmp_path: Path):
    wide = np.array([[0, 128, 129, 65535, 32767], [257, 514, 40000, 1, 65406]], np.uint16)
    for kind in ("PNG", "TIFF"):
        values = load(write(tmp_path / kind, **{f"a.{kind}": picture(wide, kind)})).values
        assert values.dtype == torch.uint8 and values.shape == (1, 1, 2, 5)
        assert np.array_equal(values[0, 0].numpy(), np.round(wide / 257))
    mixed = load(write(tmp_path / "PNG", **{"b.png": picture(COLOUR[0][:2, :5])})).values
    assert mixed.shape == (2, 3, 2, 5) and torch.equal(mixed[0, 0], mixed[0, 2])


def test_16_bit_colour_becomes_8(tmp_path: Path):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zipfile.crc32(kind + body))

    header = struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)  # Pillow cannot write it, only read it
    row = zlib.compress(b"\0" + struct.pack(">6H", *(257 * v for v in (1, 2, 3, 100, 200, 255))))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    assert load(write(tmp_path, **{"a.png": png})).values.flatten().tolist() == [1, 100, 2, 200, 3, 255]


def test_a_jpeg_with_a_preview_is_its_first_image(tmp_path: Path):
    """Cameras write such files (MPO)."""
    values = load(write(tmp_path, **{"a.jpg": pages(COLOUR[:2], "MPO"), "b.jpg": picture(COLOUR[0], "JPEG")})).values
    assert torch.equal(values[0], values[1])


def test_images_are_turned_upright(tmp_path: Path):
    upright = COLOUR[0]
    turned = {1: upright, 3: np.rot90(upright, 2), 6: np.rot90(upright, 1), 8: np.rot90(upright, -1)}
    for kind in ("PNG", "WEBP", "TIFF"):
        for orientation, pixels in turned.items():
            image = Image.fromarray(np.ascontiguousarray(pixels))
            exif = Image.Exif()
            exif[0x0112] = orientation
            stream = io.BytesIO()
            image.save(stream, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
            values = load(write(tmp_path / kind / str(orientation), **{f"a.{kind.lower()}": stream.getvalue()})).values
            assert np.array_equal(values[0].permute(1, 2, 0).numpy(), upright), (kind, orientation)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # of 35: Pillow itself refuses from twice as many on
    with pytest.raises(ValueError, match=r"expected .*a\.png to be a PNG.*decompression bomb"):
        load(write(tmp_path, **{"a.png": PNG}))


def test_a_missing_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(
        ImportError, match=r"expected pillow for a folder of images, got: .*; pip install 'counterflow\[data\]'"
    ):
        load(write(tmp_path, **{"a.png": PNG}))


# Splits.


def rows(count: int, test: int | None = None) -> Dataset:
    official = None if test is None else torch.zeros(test, 1)
    return Dataset(torch.arange(count).float()[:, None], official, None, "rows")


@pytest.mark.parametrize(
    ("count", "fractions", "sizes"),
    [
        (10, {}, (8, 1, 1)),
        (997, {}, (799, 99, 99)),
        (3, {"validation": 0.34, "test": 0.34}, (1, 1, 1)),
        (49, {"validation": 1 / 49, "test": 0.5}, (24, 1, 24)),
    ],
)
def test_splits_are_disjoint_and_complete(count: int, fractions: dict[str, float], sizes: tuple[int, ...]):
    parts = split(rows(count), seed=3, **fractions)
    together = torch.cat([parts.train, parts.validation, parts.test])
    assert (len(parts.train), len(parts.validation), len(parts.test)) == sizes
    assert torch.equal(together.flatten().sort().values, torch.arange(count).float())


def test_the_official_test_split_is_used():
    data = rows(11, test=2)
    parts = split(data, seed=0, validation=0.2, test=0.9)
    assert parts.test is data.test
    assert torch.cat([parts.train, parts.validation]).sort(0).values.equal(data.values)
    assert len(parts.validation) == 2


def test_the_seed_alone_decides():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = split(rows(100), seed=5)
    torch.manual_seed(2)
    again, other = split(rows(100), seed=5), split(rows(100), seed=6)
    assert torch.equal(first.train, again.train) and torch.equal(first.test, again.test)
    assert not torch.equal(first.test, other.test)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_digits_are_split_alike_on_every_machine():
    place = split(Dataset(torch.arange(1797), None, None, "places of the digits"), seed=0)
    assert place.test[:5].tolist() == [1615, 85, 1247, 1778, 117]
    assert place.validation[:5].tolist() == [1253, 225, 895, 1261, 1295]


UNCUT: dict[str, tuple[Dataset, dict[str, float], str]] = {
    "too few": (rows(9), {}, r"at least 10 rows in rows, .* got 9 for fractions of \[0\.1, 0\.1\]; give more"),
    "none": (rows(0, test=1), {}, r"expected at least 10 rows in rows, .* got 0 for fractions of \[0\.1\]"),
    "small": (rows(99), {"test": 0.01}, r"expected at least 100 rows in rows, .* got 99 for fractions"),
    "zero": (rows(99), {"test": 0.0}, r"fractions above 0 .*, got validation=0\.1 and test=0\.0; 0\.1 is common"),
    "one": (rows(99, test=1), {"validation": 1.0}, r"that leave rows to train on, got validation=1\.0"),
    "nan": (rows(99), {"test": float("nan")}, r"expected fractions above 0 .* test=nan"),
    "all": (rows(99), {"validation": 0.5, "test": 0.5}, r"got validation=0\.5 and test=0\.5"),
}  # fmt: skip


@pytest.mark.parametrize(("dataset", "fractions", "message"), UNCUT.values(), ids=UNCUT)
def test_data_that_cannot_be_split_are_refused(dataset: Dataset, fractions: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        split(dataset, seed=0, **fractions)
