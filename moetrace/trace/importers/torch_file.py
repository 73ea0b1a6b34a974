"""Tensors, lists and numbers of a file that ``torch.save`` wrote, without torch and without running what it says.

Such a file is a zip archive: ``data.pkl``, a pickle that names tensors' storages, and each storage's bytes. The pickle
is read by a reader that knows three names, all of them inert: a storage's type, the rebuilding of a tensor, and an
ordered dict. Anything else that it names is refused.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError
from moetrace.trace.importers.source import malformed

_STORAGES = {
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
}
_MOST = 1 << 34  # bytes of one storage


def is_torch_file(path: Path) -> bool:
    """Whether a file looks like what ``torch.save`` writes."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # damaged, or something else: who reads it says so
        return False


def read_torch_file(path: Path) -> Any:
    """Give what the file holds; tensors as numpy arrays, copies.

    Raises InputError if it is damaged, or holds anything but tensors, numbers, texts, lists and dicts.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix(
                "data.pkl"
            )
            order = (
                archive.read(f"{root}byteorder") if f"{root}byteorder" in archive.namelist() else b"little"
            )
            if order.strip() != b"little":
                raise malformed(path, None, "byteorder", "is not little")
            with archive.open(f"{root}data.pkl") as data:
                return _Reader(data, path, lambda key: archive.read(f"{root}data/{key}")).load()
    except InputError:
        raise
    except Exception as e:  # whatever zipfile and pickle make of a damaged file
        why = (str(e) or type(e).__name__)[:200]
        raise InputError(f"{path} cannot be read", why=why, fix="give the file as torch.save wrote it") from e


class _Reader(pickle.Unpickler):
    def __init__(self, file: Any, path: Path, storage: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self._path, self._storage = path, storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise malformed(
            self._path, None, f"{module}.{name}", "is neither a tensor nor a number, and is not run",
            "save tensors, numbers, texts, lists and dicts alone",
        )  # fmt: skip

    def persistent_load(self, said: Any) -> NDArray[Any]:
        kind, dtype, key, _, n = said
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str) or not key.isalnum():
            raise malformed(self._path, None, "data.pkl", "names a storage in another way than torch does")
        if not isinstance(n, int) or not 0 <= n * np.dtype(dtype).itemsize < _MOST:
            raise malformed(self._path, None, "data.pkl", f"names a storage of {n} numbers")
        data = self._storage(key)
        if len(data) < n * np.dtype(dtype).itemsize:
            raise malformed(self._path, None, f"data/{key}", "is cut off")
        return np.frombuffer(data, dtype, n)


def _rebuilt(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> NDArray[Any]:
    """A tensor of a storage, as torch lays it out: checked, because numpy would believe it."""
    numbers = (offset, *size, *stride)
    if (
        not isinstance(storage, np.ndarray)
        or len(size) != len(stride)
        or not all(type(n) is int and n >= 0 for n in numbers)
    ):
        raise ValueError("a tensor is laid out in a way that is not known")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if all(size) and last >= len(storage):
        raise ValueError("a tensor reaches beyond its storage")
    if not all(size):
        return np.empty(size, storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    return np.array(np.lib.stride_tricks.as_strided(storage[offset:], size, steps))
