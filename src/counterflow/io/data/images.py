"""Images of 8 bits: IDX files as MNIST has them, folders of PNG and JPEG images, and the digits."""

import gzip
import io
import math
import re
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from counterflow.io.data.formats import ACCEPTED, needs, reading
from counterflow.io.limits import ALWAYS, RATIO, check_taken

IDX_FILE = re.compile(r"(idx\d?-ubyte|\.idx)(\.gz)?$", re.IGNORECASE)  # by its name, whatever it holds
_IDX_IMAGES = re.compile(r"images[-.]idx3-ubyte(\.gz)?$", re.IGNORECASE)
_IDX_TEST = re.compile(r"(?<![a-z])(t10k|test)(?![a-z])", re.IGNORECASE)
PIXEL = 8  # bytes that an image takes for each while it is decoded: in four channels, and once more in those asked for
_IDX_MAGIC = bytes([0, 0, 8, 3])  # unsigned bytes, 3 dimensions


def read_digits() -> torch.Tensor:
    """(1797, 1, 8, 8) of 0..16, the digits that scikit-learn ships."""
    datasets = needs("sklearn.datasets", "scikit-learn", "the digits")
    return torch.from_numpy(datasets.load_digits().images.astype(np.uint8)).unsqueeze(1)


def read_folder(folder: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(N, C, H, W) of a folder of IDX files or of PNG and JPEG images, and its official test images, if any."""
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
    values, official = read_idx(train[0]), read_idx(test[0]) if test else None
    if official is not None and official.shape[1:] != values.shape[1:]:
        raise ValueError(
            f"expected test images as large as the training images, got {tuple(values.shape[2:])} in "
            f"{train[0]} and {tuple(official.shape[2:])} in {test[0]}; put the two sets into two folders"
        )
    return values, official


def read_idx(path: Path) -> torch.Tensor:
    """(N, 1, H, W) of an IDX file: 16 bytes of magic number, N, H and W, big-endian, then the pixels."""
    kind, shape, body = "an IDX file of images", (0, 0, 0), bytearray()
    with reading(path, kind):
        with open(path, "rb") as probe:
            zipped = probe.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else open(path, "rb") as stream:
            header = stream.read(16)
            whole = len(header) == 16 and header[:4] == _IDX_MAGIC
            if whole:
                shape = struct.unpack(">3I", header[4:])
            # by the megabyte, so that a header that lies about the size makes nobody allocate it
            most = min(math.prod(shape), max(ALWAYS, RATIO * path.stat().st_size))
            while whole and len(body) <= most and (chunk := stream.read(1 << 20)):
                body += chunk
    if not whole:
        raise ValueError(
            f"expected {path} to be {kind}, which begins with 00000803 and three sizes, got "
            f"{header.hex() or 'nothing'}; labels (00000801) and other types are no images"
        )
    if len(body) > most:
        check_taken(path, "the pixels in it", math.prod(shape), path.stat().st_size, "unzip it, if they are images")
    if not 0 < math.prod(shape) == len(body):
        came = f"{'more' if len(body) > math.prod(shape) else len(body)}"
        raise ValueError(
            f"expected at least one image in {path}, and the {' x '.join(map(str, shape))} pixels (images x height "
            f"x width) that its header declares, got {came}; fetch the file again"
        )
    return torch.frombuffer(body, dtype=torch.uint8).view(shape[0], 1, shape[1], shape[2])


def _pictures(paths: Sequence[Path]) -> torch.Tensor:
    """(N, C, H, W) of image files; all headers are checked before the first image is decoded."""
    image = needs("PIL.Image", "pillow", "a folder of images")
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
        stored = sum(path.stat().st_size for path in paths)
        taken = len(paths) * channels * math.prod(sizes[0])
        check_taken(paths[0].parent, f"{len(paths)} images of {sizes[0]}", taken, stored, "resize them, or take fewer")
        values = torch.empty(len(paths), channels, *sizes[0], dtype=torch.uint8)
        for row, path in zip(values, paths, strict=True):
            row.copy_(_picture(image, path, channels))
    return values


def _picture_header(image: Any, path: Path) -> tuple[tuple[int, int], bool]:
    """(height, width), and whether it is grey."""
    with reading(path, "a PNG or JPEG image"), image.open(path, formats=("PNG", "JPEG")) as opened:
        # Pillow makes 8 bits of 16-bit colour without a word: only the tile still says "RGB;16B"
        modes = [opened.mode, *(str(tile[3]) for tile in opened.tile)]
        size, grey = (opened.height, opened.width), opened.mode in ("1", "L", "LA")
    taken = PIXEL * math.prod(size)
    check_taken(path, f"an image of {size}", taken, path.stat().st_size, "resize it, if it is one")
    if any("16" in mode or mode == "I" for mode in modes):
        raise ValueError(f"expected 8 bits per channel in {path}, got 16-bit {modes}; convert it to 8 bits")
    return size, grey


def _picture(image: Any, path: Path, channels: int) -> torch.Tensor:
    # from memory, since Pillow asks a file for as many bytes as a chunk says that it has
    content = io.BytesIO(path.read_bytes())
    with reading(path, "a PNG or JPEG image"), image.open(content, formats=("PNG", "JPEG")) as opened:
        # a palette goes by way of RGBA, or Pillow warns
        plain = opened.convert("RGBA") if opened.mode in ("P", "PA") else opened
        pixels = np.array(plain.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1)
