"""8-bit images: IDX files such as MNIST's, folders of PNG, JPEG, TIFF and WebP images, and the digits."""

from __future__ import annotations

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

from counterflow.checks import require
from counterflow.io.data.formats import ACCEPTED, IDX, IMAGE
from counterflow.io.limits import check_memory, decoding
from counterflow.io.limits.images import check_image, read_pixels

IDX_FILE = re.compile(r"(idx\d?-ubyte|\.idx)(\.gz)?$", re.IGNORECASE)  # names of IDX files, whatever they hold
IDX_IMAGES = re.compile(r"images[-.]idx3-ubyte(\.gz)?$", re.IGNORECASE)  # names of MNIST's image files
IDX_TEST = re.compile(r"(?<![a-z])(t10k|test)(?![a-z])", re.IGNORECASE)  # in the name of test images
IDX_MAGIC = bytes([0, 0, 8, 3])  # unsigned bytes, 3 dimensions
GZIP_MAGIC = b"\x1f\x8b"
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")  # Pillow's names
ORIENTATION = 0x0112  # EXIF tag; values of 5 and more exchange width and height


def read_digits() -> torch.Tensor:
    """Return the digits that scikit-learn ships, (1797, 1, 8, 8) in 0..16."""
    datasets = require("sklearn.datasets", "data", "the digits")
    return torch.from_numpy(datasets.load_digits().images.astype(np.uint8)).unsqueeze(1)


def read_folder(folder: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read a folder of IDX files, or of images in the formats of FORMATS, as (N, C, H, W).

    Returns:
        The images, and the official test images where the folder has IDX files of them.
    """
    idx = [path for path in folder.iterdir() if IDX_IMAGES.search(path.name) and path.is_file()]
    if idx:
        return _read_idx_folder(folder, idx)
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    # without .ipynb_checkpoints, and without the ._* files that macOS adds
    files = [path for path in inside if not re.search(r"(^|/)\.", path.relative_to(folder).as_posix())]
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    if not pictures:
        found = f"{len(files)} other files, the first {files[0].name}" if files else "an empty folder"
        raise ValueError(
            f"expected IDX files or PNG, JPEG, TIFF or WebP images in {folder}, got {found}; give {ACCEPTED}"
        )
    return _read_pictures(pictures), None


def _read_idx_folder(folder: Path, paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor | None]:
    # in reverse order x comes after x.gz and replaces it in the dictionary: folders often have both
    backwards = sorted(paths, key=lambda path: path.name, reverse=True)
    files = {path.name.removesuffix(".gz").replace(".", "-"): path for path in backwards}
    test = [path for path in files.values() if IDX_TEST.search(path.name)]
    train = [path for path in files.values() if path not in test]
    if len(train) != 1 or len(test) > 1:
        raise ValueError(
            f"expected one file of training images and at most one of test images (t10k or test) in "
            f"{folder}, got {', '.join(sorted(path.name for path in paths))}; give one of them"
        )
    values = read_idx(train[0])
    official = read_idx(test[0]) if test else None
    if official is not None and official.shape[1:] != values.shape[1:]:
        raise ValueError(
            f"expected test images as large as the training images, got {tuple(values.shape[2:])} in "
            f"{train[0]} and {tuple(official.shape[2:])} in {test[0]}; put the two sets into two folders"
        )
    return values, official


def read_idx(path: Path) -> torch.Tensor:
    """Read an IDX file as images (N, 1, H, W).

    The file holds 16 bytes, a magic number and N, H and W in big-endian order, and then the pixels. It may be gzipped.
    """
    with open(path, "rb") as probe:
        zipped = probe.read(2) == GZIP_MAGIC
    with gzip.open(path) if zipped else open(path, "rb") as stream:
        with decoding(path, IDX):
            header = stream.read(16)
        if len(header) < 16 or header[:4] != IDX_MAGIC:
            raise ValueError(
                f"expected {path} to be {IDX}, which begins with 00000803 and three sizes, got "
                f"{header.hex() or 'nothing'}; labels (00000801) and other types are not images"
            )
        shape = struct.unpack(">3I", header[4:])
        pixels = read_pixels(stream, math.prod(shape), path, IDX)
    if not 0 < math.prod(shape) == len(pixels):
        got = "more" if len(pixels) > math.prod(shape) else str(len(pixels))
        raise ValueError(
            f"expected at least one image in {path}, and the {' x '.join(map(str, shape))} pixels (images x height "
            f"x width) that its header declares, got {got}; download the file again"
        )
    return torch.frombuffer(pixels, dtype=torch.uint8).view(shape[0], 1, shape[1], shape[2])


def _read_pictures(paths: Sequence[Path]) -> torch.Tensor:
    """Read image files as (N, C, H, W); all headers are checked before the first image is decoded."""
    image = require("PIL.Image", "data", "a folder of images")
    with warnings.catch_warnings():
        warnings.simplefilter("error", image.DecompressionBombWarning)
        headers = [_read_picture_header(image, path) for path in paths]
        sizes = [size for size, _ in headers]
        other = next((row for row, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None:
            raise ValueError(
                f"expected images of one size, got {sizes[0]} in {paths[0]} and {sizes[other]} in "
                f"{paths[other]} (height, width); resize or crop them first"
            )
        channels = 1 if all(grey for _, grey in headers) else 3
        stored = sum(path.stat().st_size for path in paths)
        needed = len(paths) * channels * math.prod(sizes[0])
        check_memory(paths[0].parent, f"{len(paths)} images of {sizes[0]}", needed, stored, "resize them or use fewer")
        values = torch.empty(len(paths), channels, *sizes[0], dtype=torch.uint8)
        for row, path in zip(values, paths, strict=True):
            row.copy_(_read_picture(image, path, channels))
    return values


def _read_picture_header(image: Any, path: Path) -> tuple[tuple[int, int], bool]:
    """Return an image's (height, width) as it is shown, and True if it is grey."""
    with decoding(path, IMAGE), image.open(path, formats=FORMATS) as opened:
        # the further images of a PNG or a JPEG, such as the previews of a camera, are only additions to the first
        frames = opened.n_frames if opened.format in ("TIFF", "WEBP") else 1
        mode, deep = opened.mode, _is_deep(opened)
        size = (opened.height, opened.width)
        # Pillow turns TIFF images itself
        if opened.format != "TIFF" and opened.getexif().get(ORIENTATION, 1) >= 5:
            size = size[::-1]
    check_image(path, size)
    if frames > 1:
        raise ValueError(f"expected one image in {path}, got {frames}; save each of them in a file of its own")
    if mode in ("I", "F") and not deep:
        raise ValueError(f"expected 8 or 16 bits per channel in {path}, got 32 (mode {mode}); convert it to 8 bits")
    return size, deep or mode in ("1", "L", "LA")


def _is_deep(opened: Any) -> bool:
    """Return True for grey images of 16 bits, whose mode is I in older versions of Pillow."""
    return bool(opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PNG"))


def _read_picture(image: Any, path: Path, channels: int) -> torch.Tensor:
    """Read an image file as (C, H, W), turned as its EXIF data say. 16 bits are rounded to 8, in colour by Pillow."""
    # from memory: Pillow asks a file for as many bytes as a chunk declares
    content = io.BytesIO(path.read_bytes())
    with decoding(path, IMAGE), image.open(content, formats=FORMATS) as opened:
        deep = _is_deep(opened)
        upright = require("PIL.ImageOps", "data", "a folder of images").exif_transpose(opened)
        if deep:
            wide = np.array(upright).astype(np.uint32)
            upright = image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
        # Pillow warns unless a palette is converted to RGBA first
        plain = upright.convert("RGBA") if upright.mode in ("P", "PA") else upright
        pixels = np.array(plain.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1)
