"""Tiny files in the real formats of public data sets, for tests that use the real readers.

Shapes: N samples, C classes.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

__all__ = [
    "class_images",
    "png16",
    "python2_pickle",
    "write_cifar_archive",
    "write_image_files",
    "write_image_parquet",
    "write_npz",
]

_CIFAR10_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def class_images(
    per_class: int, classes: int, *, size: int = 32, channels: int = 3, seed: int = 0
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return noisy images of which each class has its own pattern, sorted by class.

    Shape:
        - (N, channels, size, size) uint8 and (N,) int64, N = per_class · C.

    Example:
        >>> images, labels = class_images(2, 3, size=4)
        >>> images.shape, labels.tolist()
        ((6, 3, 4, 4), [0, 0, 1, 1, 2, 2])
    """
    patterns = np.random.default_rng(0).uniform(40, 215, (classes, channels, size, size))
    labels = np.repeat(np.arange(classes), per_class)
    noise = np.random.default_rng([1, seed]).normal(0, 20, (len(labels), channels, size, size))
    return (patterns[labels] + noise).clip(0, 255).astype(np.uint8), labels


_Pickler: Any = pickle._Pickler  # type: ignore[attr-defined,unused-ignore]  # lets bytes be changed


class _Python2Pickler(_Pickler):  # type: ignore[misc]
    """Writes bytes as Python 2 wrote its strings."""

    dispatch: ClassVar[dict[type, Any]] = dict(_Pickler.dispatch)

    def save_bytes(self, obj: bytes) -> None:
        """Write one string."""
        if len(obj) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(obj)]) + obj)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)
        self.memoize(obj)

    dispatch[bytes] = save_bytes


def python2_pickle(value: object) -> bytes:
    """Pickle as Python 2 with an old NumPy did: protocol 2, byte strings, ``numpy.core``.

    Example:
        >>> pickle.loads(python2_pickle({b"a": [1]}), encoding="bytes")
        {b'a': [1]}
    """
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def png16(pixels: npt.NDArray[Any]) -> bytes:
    """Encode 16-bit samples as a PNG, which Pillow does for grey alone.

    Shape:
        - (H, W) grey, or (H, W, C) with 2 (grey, alpha), 3 (RGB) or 4 channels.

    Example:
        >>> png16(np.zeros((2, 2, 3), np.uint16))[1:4]
        b'PNG'
    """
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2] if pixels.ndim == 3 else 1]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + content))
        png += struct.pack(">I", len(content)) + kind + content + check
    return png


def write_cifar_archive(
    path: str | Path,
    variant: str = "cifar10",
    *,
    per_class: int = 5,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write an archive like ``cifar-10-python.tar.gz`` or ``cifar-100-python.tar.gz``.

    Args:
        path: The ``.tar.gz`` to write.
        variant: ``cifar10`` or ``cifar100``.
        per_class: Training images of each class; there is one test image of each.
        extra: Contents of files to add or to replace, by name inside the archive's folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with tarfile.open(write_cifar_archive(Path(folder) / "c.tar.gz")) as archive:
        ...         sorted(archive.getnames())[-2:]
        ['cifar-10-batches-py/data_batch_5', 'cifar-10-batches-py/test_batch']
    """
    ten = variant == "cifar10"
    classes, folder = (10, "cifar-10-batches-py") if ten else (100, "cifar-100-python")

    def table(
        images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], title: str
    ) -> dict[bytes, Any]:
        numbers = [int(label) for label in labels]
        return {
            b"data": images.reshape(len(images), -1),
            b"batch_label": title.encode(),
            b"filenames": [b"image_%d.png" % i for i in range(len(images))],
            **(
                {b"labels": numbers}
                if ten
                else {b"fine_labels": numbers, b"coarse_labels": [n // 5 for n in numbers]}
            ),
        }

    images, labels = class_images(per_class, classes)
    order = np.random.default_rng(2).permutation(len(labels))
    test = table(*class_images(1, classes, seed=1), "testing batch 1 of 1")
    if ten:
        files = {
            f"data_batch_{i + 1}": table(images[part], labels[part], f"training batch {i + 1} of 5")
            for i, part in enumerate(np.array_split(order, 5))
        }
        names = [name.encode() for name in _CIFAR10_NAMES]
        files |= {"test_batch": test, "batches.meta": {b"label_names": names}}
    else:
        names = [b"class_%02d" % c for c in range(100)]
        files = {
            "train": table(images[order], labels[order], "training batch 1 of 1"),
            "test": test,
            "meta": {b"fine_label_names": names},
        }
    contents = {name: python2_pickle(value) for name, value in files.items()} | dict(extra or {})
    path = Path(path)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_image_files(
    path: str | Path,
    *,
    splits: tuple[str, ...] = ("train", "test"),
    per_class: int = 3,
    classes: int = 3,
    size: int = 8,
    suffix: str = "png",
    seed: int = 0,
) -> Path:
    """Write ``SPLIT/CLASS/NNNN.png`` into a zip (if the path ends so) or a folder.

    Args:
        path: The zip or folder.
        splits: The splits; empty for ``CLASS/NNNN.png``.
        per_class: Images of each class in each split.
        classes: Number of classes.
        size: Side [pixels].
        suffix: ``png`` or ``jpg``.
        seed: Seed of the images.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with zipfile.ZipFile(write_image_files(Path(folder) / "i.zip")) as archive:
        ...         archive.namelist()[0]
        'train/class_0/0000.png'
    """
    from PIL import Image

    path, files = Path(path), {}
    for stream, split in enumerate(splits or ("",)):
        images, labels = class_images(per_class, classes, size=size, seed=10 * seed + stream)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            buffer = io.BytesIO()
            picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
            picture.save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix])
            prefix = f"{split}/" if split else ""
            files[f"{prefix}class_{label}/{i % per_class:04d}.{suffix}"] = buffer.getvalue()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


def write_npz(
    path: str | Path,
    *,
    per_class: int = 4,
    classes: int = 3,
    size: int = 8,
    channels: int = 1,
    **arrays: npt.NDArray[Any],
) -> Path:
    """Write an ``.npz`` in MedMNIST's layout: images (N, H, W) or (N, H, W, 3), labels (N, 1).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.load(write_npz(Path(folder) / "a.npz"))["train_labels"].shape
        (12, 1)
    """
    content: dict[str, npt.NDArray[Any]] = {}
    for stream, split in enumerate(("train", "val", "test")):
        images, labels = class_images(per_class, classes, size=size, channels=channels, seed=stream)
        last = images.transpose(0, 2, 3, 1)
        content[f"{split}_images"] = last[..., 0] if channels == 1 else last
        content[f"{split}_labels"] = labels[:, None].astype(np.uint8)
    path = Path(path)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=True, **(content | arrays))
    return path


def write_image_parquet(
    path: str | Path,
    images: npt.NDArray[np.uint8],
    labels: list[Any],
    class_names: list[str] | None = None,
    **columns: list[Any],
) -> Path:
    """Write a parquet table of PNGs as Hugging Face's ``Dataset.to_parquet`` does.

    Args:
        path: The file.
        images: Their pixels.
        labels: Label of each image.
        class_names: Names of the classes, for the metadata.
        columns: Other columns.

    Shape:
        - images: (N, C, H, W).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     images = np.zeros((2, 1, 4, 4), np.uint8)
        ...     write_image_parquet(Path(folder) / "a.parquet", images, [0, 1]).name
        'a.parquet'
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    cells = []
    for number, image in enumerate(images):
        buffer = io.BytesIO()
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": f"{number}.png"})
    table = pa.table({"image": cells, "label": labels, **columns})
    if class_names is not None:
        label = {"names": class_names, "_type": "ClassLabel"}
        facts = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(facts)})
    pq.write_table(table, path)
    return Path(path)
