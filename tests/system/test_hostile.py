"""Hostile files: a reader reads them or refuses them in one line, with memory in proportion to the file."""

import gzip
import inspect
import io
import json
import pickle
import re
import resource
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from hostile import (
    READERS,
    SMALL,
    Reader,
    examples,
    joined,
    npy,
    npz,
    outcome,
    parquet,
    parts_of,
    picture,
    write,
    zeros,
)
from hypothesis import HealthCheck, Phase, given, settings

import counterflow as cf
from counterflow.commands.model_file import read_data
from counterflow.io import limits
from counterflow.io.data import load
from counterflow.io.data.tables import open_table, read_table
from counterflow.io.json import from_json
from counterflow.io.limits.checkpoint import SIZES
from counterflow.io.serialization import TYPES
from counterflow.training.checkpoints import Checkpoints

EXAMPLES = 100  # a reader; benchmarks/fuzz.py has many more


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_valid_files_are_read(reader: Reader, tmp_path: Path):
    for files in reader.valid():
        for path in tmp_path.iterdir():
            path.unlink()
        write(tmp_path, files)
        assert outcome(reader, tmp_path) == "read"


@pytest.mark.parametrize("name", READERS)
def test_broken_files_are_read_or_refused_in_one_line(name: str, tmp_path: Path):
    said = set()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(examples(name))
    def run(files):
        for path in tmp_path.iterdir():
            path.unlink()
        write(tmp_path, files)
        begun = time.process_time()
        said.add(outcome(READERS[name], tmp_path))
        assert time.process_time() - begun < 5

    run()
    assert len(said) > 1 and "read" in said  # some get through, some do not


def refused(message: str, read, *arguments) -> None:
    """Check that reading raises this ValueError within 5 s of CPU time, and takes less than 256 MB."""
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        read(*arguments)
    assert time.process_time() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # kB


def bomb_of(shape: tuple[int, ...], *, fortran: bool = False) -> bytes:
    """Return an .npz that declares an array of this shape and 4 GB, but holds no numbers."""
    header = {"descr": "<f8", "fortran_order": fortran, "shape": shape}
    text = repr(header).encode()
    packed = bytearray(npz(**{"a.npy": b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text}))
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        begin = packed.find(mark) + place
        packed[begin : begin + 4] = b"\xfe\xff\xff\xff"
    return bytes(packed)


def test_a_gzip_that_unpacks_to_gigabytes_is_refused(tmp_path):
    path = tmp_path / "a.idx.gz"
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 4096, 1024, 1024)) + zeros(64) * 5)
    with pytest.raises(
        ValueError, match=r"at most 256 MiB of memory, .* got 4,294,967,296 bytes for its pixels; .*unzip"
    ):
        load(path)


@pytest.mark.parametrize("fortran", [False, True])
def test_an_npz_that_unpacks_to_gigabytes_is_refused(fortran, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(bomb_of((10_000, 10_000), fortran=fortran))
    message = (
        r"at most 256 MiB of memory, or 100 times its \d+ bytes, got 800,000,000 bytes for an array .*save it as .npy"
    )
    refused(message, load, path)
    if fortran:  # the rows of which are spread over all of it
        refused(message, lambda: next(open_table(path).batches(10)))


def test_rows_and_columns_beyond_the_file_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(bomb_of((3, 10_000_000)))
    refused("got .* bytes for 10,000,000 columns", open_table, path)
    path.write_bytes(bomb_of((0, 10**18)))
    refused(r"it declares an array \(0, 1000000000000000000\)", open_table, path)


@pytest.mark.parametrize("text", ["-" * 9000 + "1", "not " * 2000 + "1", "lambda:" * 1000 + "1"])
def test_a_header_that_exhausts_the_parser_is_refused(text, tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode())
    refused("its header is not a dictionary of texts and numbers", load, path)


def test_a_header_of_4_gigabytes_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x02\0" + struct.pack("<I", 2**32 - 1) + b"{")
    refused("its header has 4,294,967,295 bytes, more than 10,000", load, path)


def test_headers_that_numpy_never_writes_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(npz(zipfile.ZIP_LZMA, **{"a.npy": npy(np.ones((3, 2)))}))
    refused("'a.npy' is neither stored nor deflated", load, path)


def test_a_large_blank_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(np.zeros((8000, 8000), np.uint8)))
    with pytest.raises(ValueError, match=r"got 512,000,000 bytes for an image of \(8000, 8000\); resize it"):
        load(tmp_path)


def test_a_chunk_that_claims_2_gigabytes_allocates_nothing(tmp_path, monkeypatch):
    whole = picture(np.zeros((5, 7), np.uint8))
    place = whole.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(whole[:place] + b"\x7f\xff\xff\xff" + whole[place + 4 :])
    reads = []
    monkeypatch.setattr(
        "io.BytesIO", lambda content, BytesIO=io.BytesIO: reads.append(len(content)) or BytesIO(content)
    )
    assert outcome(READERS["pictures"], tmp_path) and reads == [len(whole)]


def test_a_csv_of_too_many_columns_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    wide = "1," * 50_000 + "1\n"
    for content, columns in ((wide, "50,001"), ('a"b,' + wide, "50,002"), ('"a\n",b"c,' + wide, "50,003")):
        path.write_text(content)
        for read in (load, open_table):
            refused(rf"bytes for up to {columns} columns; .*save the table as .npy", read, path)


def test_a_parquet_page_that_claims_2_gigabytes_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    whole = parquet(pa.table({"a": [1.5, 2.5, 3.5]}), use_dictionary=False, compression="none", write_statistics=False)
    head = whole[4:12]
    assert head[:3] == b"\x15\x00\x15"  # the type, then the size that it unpacks to
    path.write_bytes(whole[:7] + b"\xfe\xff\xff\xff\x0f" + whole[8:])
    for read in (load, open_table):
        refused("got 2,147,483,647 bytes for a row group", read, path)


def repeated(name: str, path: Path) -> None:
    """Write a Parquet file with two texts of 10 kB in 2,000 rows, which the file holds once or twice."""
    which = pa.array(np.arange(2_000, dtype=np.int32) % 2)
    texts = [letter * 10_000 for letter in "xy"]
    words = pa.DictionaryArray.from_arrays(which, pa.array(texts))
    columns: dict[str, Any] = {"a": np.random.default_rng(0).normal(size=2_000), "s": words}
    options: dict[str, Any] = {"store_schema": name in ("categories", "structs")}
    if name == "lists":
        columns["s"] = pa.ListArray.from_arrays(pa.array(np.arange(2_001), pa.int32()), words)
    elif name == "structs":
        columns["s"] = pa.StructArray.from_arrays([words], ["t"])
    elif name == "prefixes":
        columns["s"] = pa.array(texts[:1]).take(pa.array(np.zeros(2_000, np.int32)))
        options |= {"use_dictionary": False, "column_encoding": {"s": "DELTA_BYTE_ARRAY", "a": "PLAIN"}}
    elif name == "of one length":
        columns["s"] = words.dictionary_decode().cast(pa.binary()).cast(pa.binary(10_000))
        options |= {"use_dictionary": ["s"]}
    path.write_bytes(parquet(pa.table(columns), **options))


@pytest.mark.parametrize("name", ["dictionary", "categories", "structs", "lists", "prefixes", "of one length"])
def test_texts_that_a_parquet_file_repeats_are_refused_before_they_fill_memory(name, tmp_path, monkeypatch):
    most = 1 << 21  # bytes; all texts together have ten times as many
    monkeypatch.setattr(limits, "FREE_BYTES", most)
    monkeypatch.setattr(limits, "MAX_RATIO", 10)
    monkeypatch.setattr("counterflow.io.data.parquet.TEXT_BYTES", most // 4)
    repeated(name, path := tmp_path / "a.parquet")
    for read in (load, lambda path: list(open_table(path).batches(1_000)), whole_table):
        with pytest.raises(ValueError, match="to take at most 2 MiB of memory") as told:
            read(path)
        (got, what) = re.search(r"got ([\d,]+) bytes for (.*);", str(told.value)).groups()
        assert what == "a row group" if name == "lists" else int(got.replace(",", "")) < 1.3 * most, told.value


def whole_table(path: Path) -> Any:
    return read_table(open_table(path), ["a"], ["s"])


def test_a_text_in_parquet_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    whole = parquet(pa.table({"a": [1.0, 2.0], "s": ["here", "where"]}), compression="none", write_statistics=False)
    path.write_bytes(whole.replace(b"here", b"h\xffre"))
    for read in (load, whole_table):
        refused("expected .*a.parquet to be a Parquet file, .* Invalid UTF8", read, path)


def test_numbers_that_a_file_repeats_are_refused(tmp_path):
    """40 million zeros in a few kilobytes are read in batches, but not at once."""
    zeros_of = pa.chunked_array([np.zeros(1_000_000)] * 40)
    pyarrow.parquet.write_table(pa.table({"a": zeros_of}), tmp_path / "a.parquet")
    (tmp_path / "a.npz").write_bytes(npz(zipfile.ZIP_DEFLATED, **{"a.npy": npy(np.zeros((40_000_000, 1)))}))
    for name, column in (("a.parquet", "a"), ("a.npz", "f0")):
        source = open_table(tmp_path / name)
        refused(
            "got 320,000,000 bytes for its rows; .* split the table",
            read_table,
            source,
            [column],
            [],
        )
        assert sum(batch.num_rows for batch in source.batches(1 << 16)) == 40_000_000


def test_a_footer_with_a_list_of_2_to_60_truth_values_is_refused(tmp_path):
    footer = b"\x19\xf1" + b"\x80" * 8 + b"\x10"  # field 1: a list, of truth values, as many as a varint says
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1")
    for read in (load, open_table):
        refused("a.parquet to be a Parquet file, .* its metadata is cut off", read, tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["parquet", "parquet, in batches"])
def test_any_changed_byte_of_a_parquet_footer_is_read_or_refused(name, tmp_path):
    (files, *_) = READERS[name].valid()
    whole = files["a.parquet"]
    said = set()
    for place in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole)):
        for byte in (0, whole[place] ^ 1):  # one makes a column required, at which Arrow's Python ends the process
            write(tmp_path, {"a.parquet": whole[:place] + bytes([byte]) + whole[place + 1 :]})
            said.add(outcome(READERS[name], tmp_path))
    assert "read" in said and len(said) > 10


def test_pickles_in_arrays_are_not_loaded(tmp_path):
    canary = tmp_path / "canary"
    objects = np.array([[Canary(canary), 1]], dtype=object)
    np.save(tmp_path / "a.npy", objects)
    np.savez(tmp_path / "a.npz", a=objects)
    for name in ("a.npy", "a.npz"):
        refused("got dtype object; objects are pickled, may run code and are never loaded", load, tmp_path / name)
    assert not canary.exists()


class Canary:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_for_a_checkpoint_does_not_run(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "model.safetensors"
    for content in (pickle.dumps(Canary(canary)), pickle.dumps({"counterflow": Canary(canary)}, protocol=0)):
        path.write_bytes(content)
        refused("expected a safetensors file, got .* which does not read as one", cf.load, path)
    torch.save({"a": Canary(canary)}, path)
    refused("expected a safetensors file", cf.load, path)
    assert not canary.exists()
    pickle.loads(content)  # it would have
    assert canary.exists()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    cf.save(cf.MAF(2, **SMALL), path)
    return path


def test_a_tensor_of_2_to_60_bytes_is_refused(saved):
    header, rest = parts_of(saved.read_bytes())
    name = next(name for name in header if name != "__metadata__")
    for shape, end in ([2**58], 2**60), ([2**40, 2**40], 16), ([0, 2**62], 0):
        lie = {**header, name: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
        saved.write_bytes(joined(lie, rest))
        refused("expected a safetensors file, got", cf.load, saved)
    saved.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    refused("expected a safetensors file, got", cf.load, saved)


def described(path: Path, value) -> None:
    header, rest = parts_of(path.read_bytes())
    header["__metadata__"]["counterflow"] = value if isinstance(value, str) else json.dumps(value)
    path.write_bytes(joined(header, rest))


def of(name: str, **arguments):
    return {"type": name, "arguments": arguments}


def flow_of(transform, features: int = 2):
    return of("Flow", base=of("StandardNormal", features=features), transform=transform)


MAF = of("Autoregressive", features=2, hidden=[4])
SIZES_BEYOND = {
    "features": of("StandardNormal", features=10**12),
    "context": of("Autoregressive", features=2, context=10**12, hidden=[2]),
    "hidden": of("Autoregressive", features=2, hidden=[10**12]),
    "a product": of("Autoregressive", features=400_000, hidden=[400_000]),
    "layers in layers": of("Autoregressive", features=1, hidden=[1] * 20_000),
    "many widths": of("Autoregressive", features=1, hidden=[10_000] * 100),
    "bins": of(
        "Autoregressive",
        features=100_000,
        hidden=[1000],
        univariate=of("RationalQuadraticSpline", bins=500, min_slope=1e-4),
    ),
    "many modules": of("Compose", transforms=[MAF] * 500),
    "many large ones": of("FlowMixture", flows=[of("StandardNormal", features=30_000)] * 5000),
    "degrees": of("Autoregressive", features=300_000, hidden=[1], degrees=[1] * 300_000),
    "a degree": of("Autoregressive", features=2, hidden=[4], degrees=[1, 10**12]),
    "architecture": of(
        "Autoregressive", features=500_000, hidden=[500_000], architecture=of("Architecture", skip_to_output=True)
    ),
    "coupling": of("CouplingLayer", features=10**12, moved=[0]),
    "points": of("KernelMixture", features=1000, points=10**9),
    "latent": of("VAE", data_shape=[2], latent=10**12),
    "layers": of("VAE", data_shape=[2], latent=1, context=1, hidden=[1], posterior_layers=10**6, posterior_hidden=[1]),
    "pixels": of("VAE", data_shape=[1, 10**6, 10**6], network="mlp"),
    "channels": of("VAE", data_shape=[1, 16, 16], channels=10**5),
    "text": of("StandardNormal", features="9" * 100),
    "a huge number": of("Permute", order=[10**30]),
    "infinity": of("Standardize", mean=[float("inf")], std=[1]),
    "nested": flow_of(of("Inverse", transform=of("Inverse", transform=MAF))),
    "lists without end": "[" * 100_000 + "]" * 100_000,
    "modules without end": '{"type": "Inverse", "arguments": {"transform": ' * 900 + "1" + "}}" * 900,
    "a callable": of("Permute", order={"type": "os.system", "arguments": {"command": "touch canary"}}),
    "a path": {"type": "../../x", "arguments": {}},
}


@pytest.mark.parametrize("value", SIZES_BEYOND.values(), ids=SIZES_BEYOND)
def test_a_header_allocates_no_more_than_the_file_holds(value, saved):
    described(saved, value)
    refused(r"(?s)expected .*model\.safetensors to hold what its header describes, got: ", cf.load, saved)
    assert len(list(saved.parent.iterdir())) == 1


def test_every_size_of_a_constructor_is_counted():
    """Other integers are indices and values, bounded by the lists that hold them or by the constructor."""
    known = {
        "adjacency",
        "moved",
        "degrees",
        "skips",
        "linear",
        "gates",
        "order",
        "hidden_degrees",
        "contexts",
        "activated_contexts",
    }
    known |= {"levels", "bins", "decimals"}
    for cls in TYPES.values():
        for name, parameter in inspect.signature(cls).parameters.items():
            if "int" in str(parameter.annotation):
                assert (name in SIZES) != (name in known), (
                    f"{cls.__name__}({name}): expected a size in counterflow.io.limits.checkpoint.SIZES, or in known"
                )


def test_the_message_about_a_huge_file_is_short(saved):
    described(saved, of("x" * 10**6))
    with pytest.raises(ValueError, match=r"expected .* got: ") as caught:
        cf.load(saved)
    assert len(str(caught.value)) < 2000


WRONG = {
    "settings": (
        None,
        "a",
        [1],
        {"colour": 1},
        {"layers": "x"},
        {"hidden": 3},
        {"cell_points": 1.5},
        {"bounds": {"a": [1]}},
    ),
    "cell_points": (None, "a", [1], -1, 0, 1e308, True),
    "seed": (None, "a", [1], 0.5, True),
    "names": ("ab", ["a"], [1, 2], {"a": 1}),
    "context": ("a", [["a"]], [["a", None, "x", 1.0]], [["a", ["b", "c"], 0.0, 1.0]], 3),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_density_of_another_kind_is_refused(name: str, tmp_path: Path):
    (files, *_) = READERS["density.json"].valid()
    write(tmp_path, files)
    for value in WRONG[name]:
        (tmp_path / "density.json").write_text(json.dumps({**json.loads(files["density.json"]), name: value}))
        with pytest.raises(ValueError, match=r"to hold a FlowDensity as save writes it, got: "):
            cf.FlowDensity.load(tmp_path)


def test_a_posterior_that_lacks_a_fact_is_refused(tmp_path):
    (files,) = READERS["posterior.json"].valid()
    facts = json.loads(files["posterior.json"])
    for name in facts:
        write(tmp_path, files)
        (tmp_path / "posterior.json").write_text(json.dumps({k: v for k, v in facts.items() if k != name}))
        with pytest.raises(ValueError, match=f"to be a folder written by Posterior.save, got: KeyError.'{name}'"):
            cf.posterior.Posterior.load(tmp_path)
    write(tmp_path, files)
    safetensors.torch.save_file({"theta": torch.zeros(30, 9)}, tmp_path / "draws.safetensors")
    with pytest.raises(ValueError, match=r"to be a folder written by Posterior.save, got: "):
        cf.posterior.Posterior.load(tmp_path)


def test_a_checkpoint_with_invalid_numbers_is_passed_over(tmp_path):
    (files, *_) = READERS["checkpoints"].valid()
    write(tmp_path, files)
    for numbers in (b"[1]", b'{"steps": "x"}', b'{"steps": -1}', b'{"steps": 1e400}', b"[" * 10**5):
        tensors = {"numbers": torch.frombuffer(bytearray(numbers), dtype=torch.uint8)}
        safetensors.torch.save_file(tensors, tmp_path / "999999999999.safetensors")
        with pytest.warns(RuntimeWarning, match="cannot read"):
            assert Checkpoints(tmp_path).load().steps == 0


def test_texts_of_data_take_no_memory(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"y": ["x" * 10**6] + [""] * 10**5, "n": [[1, 2], [3, 4]]}))
    values = read_data(path)  # as an array of texts it would have 400 GB
    assert isinstance(values["y"], list) and values["n"].shape == (2, 2)
    path.write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"expected .*data\.json to be JSON, but it does not read as JSON"):
        read_data(path)
    with pytest.raises(ValueError, match=r"data\.json to be the data of a Stan program, but it does not read as JSON"):
        cf.targets.from_stan("parameters { real x; } model { x ~ normal(0, 1); }", path)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (1.5, int, "expected x to be int, got 1.5"),
        (True, int, "expected x to be int, got True"),
        (True, float, "expected x to be float, got True"),
        ("1", float | None, r"expected x to be float \| None, got '1'"),
        ([1, "a"], tuple[int, ...], r"expected x\[1\] to be int, got 'a'"),
        ([1], tuple[int, int], r"expected x to be tuple\[int, int\], got \[1\]"),
        ({"a": [1]}, dict[str, int], r"expected x\['a'\] to be int, got \[1\]"),
        ({"layers": 1, "colour": 2}, cf.FitConfig, "expected x to be FitConfig, got {'layers'"),
    ],
)
def test_values_that_contradict_their_type_hints_are_named(value, hint, message):
    with pytest.raises(ValueError, match=message):
        from_json(value, hint, "x")


def test_values_of_the_hinted_type_are_kept():
    assert from_json({"a": [1, None]}, dict[str, tuple[float | None, ...]], "x") == {"a": (1, None)}
    assert from_json(3.0, int, "x") == 3 and from_json(1, bool, "x") == 1
