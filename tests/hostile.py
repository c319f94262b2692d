"""Hostile files: for every reader some valid files, and mutations that break them.

`READERS` maps a name to the files and the way to read them; `examples(name)` is a strategy of folders with broken ones.
Some mutations know the format, to get past the first check: checksums are right, and headers have the right length.
"""

from __future__ import annotations

import copy
import datetime
import gzip
import io
import json
import math
import sqlite3
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import safetensors.torch
import torch
from hypothesis import strategies as st
from PIL import Image

import counterflow as cf
from counterflow.commands.model_file import read_data
from counterflow.commands.trained import kind_of_run
from counterflow.diagnostics.verdict import Verdict
from counterflow.io.data import load
from counterflow.io.data.cells import numbers, to_numbers_or_texts
from counterflow.io.data.tables import open_table
from counterflow.io.serialization import TYPES
from counterflow.posterior.config import PosteriorConfig
from counterflow.posterior.posterior import Posterior
from counterflow.posterior.stages import FlowFit, Stage, WeightedDraws
from counterflow.training.checkpoints import Checkpoint, Checkpoints

Files = Mapping[str, bytes]
Mutation = Callable[[bytes, Random], bytes]
LARGE = 20_000  # bytes; a larger file may be a bomb, so its content is not unpacked to change it
LONGEST = 4000  # characters of an acceptable message


@dataclass(frozen=True)
class Reader:
    """Reader of files, with files to test it."""

    valid: Callable[[], Sequence[Files]]  # folders that the reader accepts
    read: Callable[[Path], Any]
    broken: Sequence[str] = ()  # names of the files to change; all if empty
    knowing: Sequence[Mutation] = ()  # mutations that know the format
    sound: Sequence[Files] = ()  # well-formed files that the reader refuses, to be broken as well


class Unclear(AssertionError):
    """Error of a reader that neither reads a file nor refuses it clearly."""


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def outcome(reader: Reader, folder: Path) -> str:
    """Return "read", or the message of a refusal without the path in it.

    Raises everything else: an exception of another class, an unclear message, or memory that ran out before one.
    """
    before = sorted(path.name for path in folder.iterdir())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder)
        said = "read"
    except (ValueError, OSError) as error:
        said = str(error).replace(str(folder), "..")
        if not said.startswith("expected ") or len(said) > LONGEST:
            raise Unclear(f"{type(error).__name__}: {said[:LONGEST]}") from error
        if any(isinstance(cause, MemoryError) for cause in _causes(error)):
            raise Unclear(f"memory ran out: {said[:LONGEST]}") from error
    if sorted(path.name for path in folder.iterdir()) != before:
        raise Unclear(f"files that were not there before: {sorted(path.name for path in folder.iterdir())}")
    return said


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def examples(name: str) -> st.SearchStrategy[Files]:
    """Return a strategy of folders of broken files, one for each seed."""
    READERS[name].valid()  # trained here: training draws random numbers, which a strategy must not
    return st.integers(0, 2**64 - 1).map(partial(_broken, READERS[name]))


def batches(name: str, size: int) -> st.SearchStrategy[Iterator[Files]]:
    """Return a strategy of `size` folders for each seed: Hypothesis takes longer per example than most readers."""
    return st.integers(0, 2**64 - 1).map(lambda seed: (_broken(READERS[name], seed * size + k) for k in range(size)))


def _broken(reader: Reader, seed: int) -> Files:
    random = Random(seed)
    folders = [*reader.valid(), *reader.sound]
    files = dict(random.choice(folders))
    name = random.choice([n for n in files if not reader.broken or n in reader.broken])
    others = [folder[name] for folder in folders if name in folder]
    mutations = [*GENERIC, partial(splice, others=others), *(4 * list(reader.knowing))]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        files[name] = random.choice(mutations)(files[name], random)
    return files


EDGES = (
    0,
    1,
    2,
    3,
    127,
    128,
    255,
    256,
    2**15 - 1,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    2**64 - 1,
)


def _place(content: bytes, random: Random) -> int:
    """Return a position anywhere, or near one of the ends, where headers are."""
    size = len(content)
    near = min(size, 64)
    return random.choice((random.randrange(size + 1), random.randrange(near + 1), size - random.randrange(near + 1)))


def truncate(content: bytes, random: Random) -> bytes:
    return content[: _place(content, random)]


def extend(content: bytes, random: Random) -> bytes:
    return content + random.randbytes(random.choice((1, 8, 100)))


def flip(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8)) if changed else 0):
        changed[min(_place(content, random), len(changed) - 1)] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwrite(content: bytes, random: Random) -> bytes:
    size, place = random.choice((1, 2, 4, 8)), _place(content, random)
    number = random.choice(EDGES) % 256**size
    return content[:place] + number.to_bytes(size, random.choice(("little", "big"))) + content[place + size :]


def delete(content: bytes, random: Random) -> bytes:
    first, last = sorted((_place(content, random), _place(content, random)))
    return content[:first] + content[last:]


def duplicate(content: bytes, random: Random) -> bytes:
    first, last = sorted((_place(content, random), _place(content, random)))
    return content[:last] + content[first:last] * random.choice((1, 1, 50)) + content[last:]


def splice(content: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    other = random.choice(others) if others else content
    return content[: _place(content, random)] + other[_place(other, random) :]


GENERIC: tuple[Mutation, ...] = (truncate, extend, flip, flip, overwrite, overwrite, delete, duplicate)


def number(random: Random) -> int:
    """Return a size that a file might falsely declare."""
    return random.choice((*EDGES, 10**12, -1, random.randrange(20), random.randrange(1 << 20)))


def idx(images: np.ndarray) -> bytes:
    return struct.pack(">4I", 0x803, *images.shape) + images.tobytes()


def other_sizes(content: bytes, random: Random) -> bytes:
    sizes = [random.choice((number(random) % 2**32, random.randrange(8))) for _ in range(3)]
    return struct.pack(">4I", 0x803, *sizes) + content[16:]


def zipped_again(mutation: Mutation, content: bytes, random: Random) -> bytes:
    """Change the content of a gzip, with the right checksum."""
    if len(content) > LARGE:
        return content
    try:
        inner = gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        inner = content
    return gzip.compress(mutation(inner, random), 1, mtime=0)


@cache
def zeros(mebibytes: int) -> bytes:
    """Return a gzip of zeros, a thousandth of their size."""
    return gzip.compress(bytes(mebibytes << 20), 6, mtime=0)


def gzip_bomb(content: bytes, random: Random) -> bytes:
    """Return a gzip of two members: a header that fits the second, and gigabytes of zeros."""
    if random.random() < 0.99:  # they take a second to unpack
        return zipped_again(other_sizes, content, random)
    shape = random.choice(((1 << 20, 28, 28), (1, 1 << 15, 1 << 16), (300, 1 << 10, 1 << 10)))
    return gzip.compress(struct.pack(">4I", 0x803, *shape)) + zeros(64) * random.choice((1, 8))


DTYPES = (
    "<f8",
    ">f4",
    "<f2",
    "|b1",
    "<i8",
    "|u1",
    "|O",
    "<c16",
    "|S8",
    "<U4",
    "|V0",
    "|V9",
    "<M8[ns]",
    "<f16",
    "f8",
    "?",
)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def shape(random: Random) -> tuple[int, ...]:
    return tuple(random.choice((number(random), random.randrange(6))) for _ in range(random.choice((1, 2, 2, 2, 3, 4))))


def other_header(content: bytes, random: Random) -> bytes:
    """Change the header of an .npy."""
    try:
        said = np.lib.format.read_array_header_1_0(io.BytesIO(content[8:]))
    except Exception:
        said = ((3, 2), False, np.dtype("<f8"))
    header = {"descr": said[2].str, "fortran_order": said[1], "shape": said[0]}
    key = random.choice((*header, "shape", "shape"))
    header[key] = {"descr": random.choice(DTYPES), "fortran_order": not said[1], "shape": shape(random)}[key]
    text = (
        repr(header)
        if random.random() < 0.9
        else random.choice(("(" * 5000, "-" * 9000 + "1", "{}", "[" * 99, "9" * 9000))
    )
    begin = 10 + struct.unpack("<H", (content[8:10] + b"\0\0")[:2])[0]
    if random.random() < 0.1:  # version 2, whose header may have 4 GB
        return (
            b"\x93NUMPY\x02\0"
            + struct.pack("<I", random.choice((len(text), 2**32 - 1)))
            + text.encode()
            + content[begin:]
        )
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode() + content[begin:]


def npz(method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return stream.getvalue()


METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
MEMBERS = ("a.npy", "../../x.npy", "/etc/x.npy", "a\0.npy", "a" * 300 + ".npy", "b.txt", ".npy")


def other_member(content: bytes, random: Random) -> bytes:
    """Return an .npz with right checksums and a broken array."""
    if len(content) > LARGE:
        return content
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            inner = archive.read(archive.namelist()[0])
    except Exception:
        inner = npy(np.ones((3, 2)))
    inner = random.choice((other_header, other_header, *GENERIC))(inner, random)
    names = random.choices(MEMBERS, (20, 1, 1, 1, 1, 1, 1), k=random.choice((1, 1, 1, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that stands twice
        return npz(random.choices(METHODS, (3, 6, 1, 1))[0], **dict.fromkeys(names, inner))


def other_part(content: bytes, random: Random) -> bytes:
    """Return an .xlsx file with right checksums and one broken part."""
    if len(content) > LARGE:
        return content
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
    except Exception:
        return content
    chosen = random.choice(sorted(parts))
    parts[chosen] = random.choice(GENERIC)(parts[chosen], random)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return stream.getvalue()


def lying_directory(content: bytes, random: Random) -> bytes:
    """Set a field of the central directory, or of a local header, to an extreme value."""
    places = [k for mark in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06") if (k := content.find(mark)) >= 0]
    if not places:
        return content
    place = random.choice(places) + random.choice((6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 42))
    return content[:place] + (random.choice(EDGES) % 2**32).to_bytes(4, "little") + content[place + 4 :]


def zip_bomb(content: bytes, random: Random) -> bytes:
    """Return an .npz of zeros with a valid header."""
    if random.random() < 0.995:
        return other_member(content, random)
    rows, width = random.choice(((1 << 20, 8), (2, 1 << 22)))
    return _array_of_zeros(rows, width, random.random() < 0.5)


@cache
def _array_of_zeros(rows: int, width: int, fortran: bool) -> bytes:
    array = np.zeros((rows, width), order="F" if fortran else "C")
    return npz(**{"a.npy": npy(array)})


def picture(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(stream, kind)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


ZEROS = zlib.compress(bytes(1 << 21))


def other_chunk(content: bytes, random: Random) -> bytes:
    """Change the header, palette or data of a PNG, with right checksums."""
    if content[:4] != b"\x89PNG":
        return random.choice(GENERIC)(content, random)
    parts, place = [], 8
    while place + 12 <= len(content) and len(parts) < 20:
        size = int.from_bytes(content[place : place + 4], "big")
        parts.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += 12 + size
    if not parts:
        return content
    k = random.randrange(len(parts))
    kind, body = parts[k]
    if kind == b"IHDR" and random.random() < 0.8:
        size = [random.choice((number(random) % 2**31, 5, 7, 20_000)) for _ in range(2)]
        body = struct.pack(
            ">2I5B", *size, random.choice((1, 2, 4, 8, 16)), random.choice((0, 2, 3, 4, 6)), 0, 0, random.randrange(2)
        )
    elif kind == b"IDAT" and random.random() < 0.5:
        body = random.choice((ZEROS, zlib.compress(random.randbytes(40)), b""))
    elif random.random() < 0.3:
        kind = random.choice(
            (b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"acTL", b"fdAT", b"gAMA", b"eXIf", random.randbytes(4))
        )
        body = random.choice((body, b"a\0\0" + ZEROS, random.randbytes(9)))
    else:
        body = random.choice(GENERIC)(body, random)
    parts.insert(k, (kind, body)) if random.random() < 0.2 else parts.__setitem__(k, (kind, body))
    return content[:8] + b"".join(chunk(*part) for part in parts)


TEXTS = (
    ",",
    '"',
    "\n",
    "\r",
    "\r\n",
    "\0",
    "1e999",
    "nan",
    "-",
    "",
    "9" * 400,
    "1_0",
    "\ufeff",
    "\u0661",
    "é",
    "a",
    ";",
    "0x1p3",
)


def other_text(content: bytes, random: Random) -> bytes:
    place = _place(content, random)
    text = random.choice(TEXTS) * random.choice((1, 1, 1, 2, 300))
    return content[:place] + text.encode() + content[place + random.choice((0, 0, 1, 5)) :]


def wide_line(content: bytes, random: Random) -> bytes:
    """Return thousands of columns, or very long lines."""
    if random.random() < 0.98:
        return other_text(content, random)
    return random.choice(
        (b"1," * 20_000 + b"1\n" * 2, b"," * 300_000, b"1" * 2_000_000, b'a,b\n1,"' + b"1\n" * 500_000)
    )


def parquet(table: pa.Table, **more: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream, **more)
    return stream.getvalue()


def feather(table: pa.Table, compression: str) -> bytes:
    stream = io.BytesIO()
    pyarrow.feather.write_feather(table, stream, compression=compression)
    return stream.getvalue()


def other_footer(content: bytes, random: Random) -> bytes:
    """Change the footer and correct its length; its numbers are varints."""
    if len(content) < 12:
        return content
    size = int.from_bytes(content[-8:-4], "little")
    begin = max(len(content) - 8 - size, 4)
    footer = bytearray(content[begin:-8])
    for _ in range(random.choice((1, 1, 2))):
        place = random.randrange(len(footer)) if footer else 0
        varint = random.choice(
            (
                b"\x00",
                b"\x01",
                b"\x7f",
                b"\xff\xff\xff\xff\x0f",
                b"\xfe\xff\xff\xff\xff\xff\xff\xff\x7f",
                b"\x80\x80\x04",
            )
        )
        footer[place : place + random.choice((0, 1, 1, 2, len(varint)))] = varint
    return content[:begin] + bytes(footer) + struct.pack("<I", len(footer)) + b"PAR1"


def other_page(content: bytes, random: Random) -> bytes:
    """Change the header of the first page, or the levels that follow it."""
    place = 4 + random.randrange(40)
    varint = random.choice((b"\x00", b"\x7f", b"\xfe\xff\xff\xff\x0f", b"\xfe\xff\xff\x07", b"\x80\x80\x04"))
    return content[:place] + varint + content[place + len(varint) :]


STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf),
    *(2**31, 2**40, 2**63, 10**15, 10**30, "", "a", "x" * 3000, "../../x", "é", "0"),
    *([], {}, [[]], [None], [1, 2, 3], [0] * 2000, [1e9], {"type": "Flow"}, {"type": "Affine", "arguments": {}}),
    *(
        {"type": "StandardNormal", "arguments": {"features": 10**9}},
        {"type": "StandardNormal", "arguments": {"features": 2}},
    ),
)


def _nodes(value: Any, into: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """List (container, key) of everything in a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        into.append((value, key))
        _nodes(value[key], into)
    return into


def twist(value: Any, random: Random) -> Any:
    """Return a JSON value with one change."""
    value = copy.deepcopy(value)
    nodes = _nodes(value, [])
    if not nodes or random.random() < 0.02:
        return random.choice(STRANGE)
    holder, key = random.choice(nodes)
    old, kind = holder[key], random.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice((f"{key}x", "type", "features", "hidden"))] = holder.pop(key)
    elif kind == 2 and isinstance(old, list):
        holder[key] = old * random.choice((0, 2, 500))
    elif kind == 3:
        other, name = random.choice(nodes)
        holder[key] = copy.deepcopy(other[name])
    elif isinstance(old, int | float) and not isinstance(old, bool) and kind < 7:
        holder[key] = random.choice((old + 1, old - 1, old * 1000, -old, number(random), 10 ** random.randrange(1, 16)))
    elif isinstance(old, str) and kind < 7:
        holder[key] = random.choice(
            (*TYPES, old[::-1], old + "\0", *("iaf", "gaussian", "conv", "mlp", "BF16", "F64", "I64"))
        )
    else:
        holder[key] = copy.deepcopy(random.choice(STRANGE))
    return value


def other_json(content: bytes, random: Random) -> bytes:
    if random.random() < 0.03:
        text = random.choice(
            ("[" * 100_000, '{"a":' * 50_000, "9" * 5000, "[" * 900 + "]" * 900, '{"a": 1, "a": [}', "\ud800")
        )
        return text.encode("utf-8", "surrogatepass")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return random.choice(GENERIC)(content, random)
    return json.dumps(twist(value, random)).encode()


def parts_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into its header and the rest."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def other_tensors(content: bytes, random: Random) -> bytes:
    """Change names, shapes, dtypes or offsets of the tensors."""
    try:
        header, rest = parts_of(content)
    except (ValueError, RecursionError):
        return random.choice(GENERIC)(content, random)
    if random.random() < 0.2:
        return joined(header, random.choice(GENERIC)(rest, random))
    return joined(twist(header, random), rest)


def other_description(content: bytes, random: Random) -> bytes:
    """Change the description of the module, which is JSON within the JSON."""
    try:
        header, rest = parts_of(content)
        described = json.loads(header["__metadata__"]["counterflow"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return other_tensors(content, random)
    for _ in range(random.choice((1, 1, 2))):
        described = twist(described, random)
    return joined({**header, "__metadata__": {"counterflow": json.dumps(described)}}, rest)


def other_numbers(content: bytes, random: Random) -> bytes:
    """Change the JSON among the tensors of a checkpoint."""
    try:
        tensors = dict(safetensors.torch.load(content))
        text = other_json(tensors["numbers"].numpy().tobytes(), random)
    except Exception:
        return other_tensors(content, random)
    return safetensors.torch.save({**tensors, "numbers": torch.frombuffer(bytearray(text), dtype=torch.uint8)})


RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(7, 3))
GREY = RNG.integers(0, 256, (2, 5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (2, 6, 4, 3), dtype=np.uint8)
ARRAYS = (ROWS, ROWS.astype(">f4"), np.asfortranarray(ROWS), RNG.integers(-9, 9, (4, 1)), ROWS > 0, ROWS.astype("f2"))
TABLE = pa.table({"a": ROWS[:, 0], "b": ROWS[:, 1].astype("f4"), "count": np.arange(7)})
REPEATED = pa.table({"a": np.repeat(1.5, 3000), "b": np.arange(3000) % 3})
IMAGES = (np.arange(1, dtype=np.uint8).reshape(1, 1, 1), GREY, RNG.integers(0, 2, (30, 4, 4), dtype=np.uint8))


def _saved(save: Callable[[Path], Any]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


SMALL: dict[str, Any] = {"layers": 2, "hidden": (4,), "seed": 0}
MODELS: tuple[Callable[[], torch.nn.Module], ...] = (
    lambda: cf.MAF(3, **SMALL),
    lambda: cf.NSF(2, 1, bins=3, **SMALL),
    lambda: cf.Coupling(3, univariate=cf.Gated(), **SMALL).double(),
    lambda: cf.VAE((2,), latent=2, hidden=(3,), context=2, posterior_layers=2, posterior_hidden=(3,)),
    lambda: cf.VAE((1, 5, 5), latent=1, channels=1, context=1, posterior="gaussian", network="conv"),
    lambda: cf.Flow(
        cf.bases.StudentT(2),
        cf.Compose([cf.Inverse(cf.transforms.Whiten([0.0, 1.0], [[1.0, 0.0], [0.5, 2.0]])), cf.Permute([1, 0])]),
    ),
    lambda: cf.flows.FlowMixture(
        [cf.Flow(cf.bases.KernelMixture(2, 5), cf.Standardize([0.0, 1.0], [1.0, 2.0])) for _ in range(2)]
    ),
    lambda: cf.Flow(
        cf.bases.DiagonalNormal(2, 1),
        cf.Autoregressive(2, 1, (4, 4), architecture=cf.transforms.Architecture(skips=(None, 0), skip_to_output=True)),
    ),
    lambda: cf.Flow(
        cf.bases.StandardNormal(3), cf.transforms.CouplingLayer(3, [1], 0, (4,), cf.RationalQuadraticSpline(bins=3))
    ),
    lambda: cf.Flow(
        cf.bases.StandardNormal(2),
        cf.transforms.TableTransform(
            [
                cf.transforms.LogColumn("a", low=0.0),
                cf.transforms.GridColumn(cf.transforms.LinearColumn("b"), step=1.0),
            ]
        ),
    ),
)


@cache
def _checkpoints() -> list[Files]:
    return [_saved(lambda folder, make=make: cf.save(make(), folder / "model.safetensors")) for make in MODELS]


@cache
def _densities() -> list[Files]:
    tiny = {"epochs": 1, "members": 1, "hidden": (3,), "layers": 1, "bins": 3, "random_state": 0}
    x = np.random.default_rng(1).lognormal(size=(60, 2))
    given = {"colour": np.array(["red", "blue"] * 30), "year": np.arange(60.0)}
    return [
        _saved(cf.FlowDensity(**tiny).fit(x).save),
        _saved(cf.FlowDensity(columns={"x1": "real"}, bounds={"x0": (0, None)}, **tiny).fit(x).save),
        _saved(cf.FlowDensity("maf", **tiny).fit(x[:, :1], context=pandas_of(given)).save),
    ]


def pandas_of(columns: dict[str, Any]) -> Any:
    import pandas

    return pandas.DataFrame(columns)


@cache
def _posteriors() -> list[Files]:
    theta = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)).double()
    draws = WeightedDraws(theta, theta[:, 0], theta[:, 1], torch.full((30,), -math.log(30)))
    stage = Stage("path", 2, 8, 5, 0, "finished", 0.5, (1.0, math.nan), 0.3, 15.0, 30, -1.0, True)
    fitted = FlowFit(cf.IAF(2, **SMALL).double(), draws, Verdict(30, 0.3, 15.0, -1.0, 0.1, -0.9), (stage,))
    values = {"mu": theta[:, 0].contiguous(), "z": theta[:, :, None].contiguous()}
    return [_saved(Posterior(None, PosteriorConfig(hidden=(4,)), fitted, values, 1.5).save)]


@cache
def _states() -> list[Files]:
    tensors = {"weight": torch.ones(2, 3), "order": torch.arange(4), "generator": torch.zeros(9, dtype=torch.uint8)}
    facts = {"steps": 12, "history": {"epochs": [1.5, None]}, "best": None}
    return [
        _saved(lambda folder, k=k: Checkpoints(folder).save(Checkpoint(tensors, facts | {"steps": k}))) for k in (0, 12)
    ]


CONFIGS = (
    {"format": 1, "command": "vae", "version": "0.1", "data": "digits", "latent": 2, "hidden": [3, 4]},
    {"command": "density", "data": "table.csv"},
)
DATA = ({"y": [1.0, 2.5], "n": 3, "m": [[1, 2], [3, 4]], "names": ["a", "b"]}, {"x": [[True]], "z": {"a": 1}})


def _under(name: str, contents: Sequence[bytes]) -> Callable[[], list[Files]]:
    """Return a function that lists folders of one file."""
    return lambda: [{name: content} for content in contents]


def _json(values: Sequence[Any]) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def _load(name: str) -> Callable[[Path], Any]:
    return lambda folder: load(folder / name)


def _stream(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> None:
        source, first = open_table(folder / name), 0
        for batch in source.batches(4096):
            numbers(batch, source.names, source.path, first)
            to_numbers_or_texts(batch.column(source.names[0]))
            first += batch.num_rows

    return read


def _state(folder: Path) -> Checkpoint:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        state = Checkpoints(folder).load()
    if state is None:
        raise ValueError(f"expected a state, got: {told[0].message}")
    return state


PARQUET = _under(
    "a.parquet",
    [
        parquet(TABLE),
        parquet(TABLE, compression="zstd", use_dictionary=False, data_page_version="2.0"),
        parquet(REPEATED, row_group_size=1000, compression="gzip"),
        parquet(pa.table({"a": [True, False], "b": pa.array([1, 2], "u1")}), compression="none"),
    ],
)
FEATHER = _under("a.feather", [feather(TABLE, "zstd"), feather(TABLE, "lz4"), feather(REPEATED, "uncompressed")])


def _excel() -> list[Files]:
    import openpyxl

    books = []
    for rows in ([["a", "b"], [1, 2.5], [3, 4.5]], [["day", "ok"], [datetime.date(2024, 5, 31), True]]):
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        stream = io.BytesIO()
        book.save(stream)
        books.append({"a.xlsx": stream.getvalue()})
    return books


def _database(name: str, connect: Callable[[str], Any]) -> list[Files]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        database = connect(str(path))
        database.execute("CREATE TABLE rows (a INTEGER, b REAL, c TEXT)")
        for k in range(40):
            database.execute("INSERT INTO rows VALUES (?, ?, ?)", (k, k / 7, str(k * k)))
        database.commit()
        database.close()
        return [{name: path.read_bytes()}]


def _sqlite() -> list[Files]:
    return _database("a.sqlite", sqlite3.connect)


def _duckdb() -> list[Files]:
    import duckdb

    return _database("a.duckdb", duckdb.connect)


NO_NUMBERS = [
    {"a.parquet": parquet(TABLE.append_column("text", pa.array(list("abcdefg"))))},
    {"a.parquet": parquet(pa.table({"a": range(50), "b": ["long " * 40 + str(k % 3) for k in range(50)]}))},
    {
        "a.parquet": parquet(
            pa.table({"a": ["long " * 40 + str(k) for k in range(50)]}),
            use_dictionary=False,
            column_encoding={"a": "DELTA_BYTE_ARRAY"},
        )
    },
    {"a.parquet": parquet(pa.table({"a": pa.array([[1.0], [2.0, 3.0]]), "b": pa.array([1, None])}))},
]
CSV = _under(
    "a.csv",
    [b"a,b\n1,-2.5\n3, 4e1\n\n", "\ufeffa,b\r\n1,2\r\n".encode(), b"1,2,3\n4,5,6\n" * 9, b'"a ""b""",c\n1,"2"\n'],
)
NPY = _under("a.npy", [npy(array) for array in ARRAYS])
CUBE = [{"a.npy": npy(GREY)}]
NPZ = _under("a.npz", [npz(method, **{"a.npy": npy(a)}) for a in ARRAYS for method in METHODS[:2]])
CHECKPOINT = (other_tensors, other_description, other_description)

READERS: dict[str, Reader] = {
    "idx": Reader(_under("a.idx", [idx(x) for x in IMAGES]), _load("a.idx"), knowing=(other_sizes,)),
    "idx.gz": Reader(
        _under("a.idx.gz", [gzip.compress(idx(x), mtime=0) for x in IMAGES]),
        _load("a.idx.gz"),
        knowing=(gzip_bomb, *(partial(zipped_again, m) for m in (flip, truncate, overwrite))),
    ),
    "npy": Reader(NPY, _load("a.npy"), knowing=(other_header,), sound=CUBE),
    "npy, in batches": Reader(NPY, _stream("a.npy"), knowing=(other_header,), sound=CUBE),
    "npz": Reader(NPZ, _load("a.npz"), knowing=(other_member, lying_directory, zip_bomb)),
    "npz, in batches": Reader(NPZ, _stream("a.npz"), knowing=(other_member, lying_directory, zip_bomb)),
    "pictures": Reader(
        lambda: [
            {f"{k}.png": picture(x) for k, x in enumerate(GREY)},
            {"a.png": picture(COLOUR[0], mode="RGBA"), "b.png": picture(COLOUR[1], mode="P")},
            {"a.jpg": picture(GREY[0], "JPEG"), "b.png": picture(GREY[0] > 99)},
            {"a.jpg": picture(COLOUR[0], "JPEG")},
        ],
        load,
        knowing=(other_chunk,),
    ),
    "csv": Reader(CSV, _load("a.csv"), knowing=(other_text, wide_line)),
    "csv, in batches": Reader(CSV, _stream("a.csv"), knowing=(other_text, wide_line)),
    "parquet": Reader(PARQUET, _load("a.parquet"), knowing=(other_footer, other_page), sound=NO_NUMBERS),
    "parquet, in batches": Reader(PARQUET, _stream("a.parquet"), knowing=(other_footer, other_page), sound=NO_NUMBERS),
    "feather, in batches": Reader(FEATHER, _stream("a.feather")),
    "xlsx, in batches": Reader(_excel, _stream("a.xlsx"), knowing=(other_part, other_part, lying_directory)),
    "sqlite, in batches": Reader(_sqlite, _stream("a.sqlite")),
    "duckdb, in batches": Reader(_duckdb, _stream("a.duckdb")),
    "checkpoint": Reader(_checkpoints, lambda folder: cf.load(folder / "model.safetensors"), knowing=CHECKPOINT),
    "density": Reader(_densities, cf.FlowDensity.load, ("model.safetensors",), CHECKPOINT),
    "density.json": Reader(_densities, cf.FlowDensity.load, ("density.json",), (other_json,)),
    "posterior": Reader(_posteriors, Posterior.load, ("model.safetensors", "draws.safetensors"), CHECKPOINT),
    "posterior.json": Reader(_posteriors, Posterior.load, ("posterior.json",), (other_json,)),
    "checkpoints": Reader(_states, _state, knowing=(other_tensors, other_numbers)),
    "config.json": Reader(_under("config.json", _json(CONFIGS)), kind_of_run, knowing=(other_json,)),
    "data.json": Reader(_under("data.json", _json(DATA)), lambda f: read_data(f / "data.json"), knowing=(other_json,)),
}
