"""A file of `torch.save`, opened without running it: its object, with every tensor left on the disk.

Format: an uncompressed zip of `<root>/data.pkl`, a pickle in which storages are references, and
`<root>/data/<key>`, the bytes of one storage each.

The pickle goes through an unpickler that knows a fixed list of names, and gives inert stand-ins for them. So
no code of the file's choosing ever runs, and DeepSpeed's own classes need not be importable.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import InputError
from pipeline.weights.io.pread import PreadFile
from pipeline.weights.source import DTYPE_BYTES
from pipeline.weights.stored import Piece, StoredTensor

MAX_PICKLE_BYTES = 1 << 28
_LOCAL_HEADER_BYTES = 30

_DTYPE_OF_STORAGE = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

# Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) pickle a member of an Enum as getattr(its class, its name).
_ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}


class ShapedTensor(NamedTuple):
    """A tensor in a torch file: contiguous, of this shape."""

    shape: tuple[int, ...]
    stored: StoredTensor


class _Storage(NamedTuple):
    """A pickle's reference to a storage."""

    dtype: str
    key: str
    num_elements: int


class Stub:
    """Stands for an object whose class is not wanted: takes any arguments, keeps the state as attributes."""

    def __new__(cls, *args: Any) -> Stub:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass


class Name(str):
    """Stands for a class or constant that is only referred to, such as `torch.bfloat16`."""


class TorchFile:
    """A `torch.save` file; `content` is what was saved, with a `ShapedTensor` for each tensor."""

    def __init__(self, path: Path) -> None:
        """Raises InputError for a file that is truncated, old, compressed, or names a class not on the
        list.
        """
        self.file = PreadFile(path)
        if self.file.size < 4 or self.file.read_bytes(0, 4) != b"PK\x03\x04":
            raise InputError(
                f"{path}: not a zip of torch.save; if torch < 1.6 wrote it,"
                " load it and save it again with a newer torch"
            )
        try:
            with zipfile.ZipFile(path) as archive:
                self._entries = {entry.filename: entry for entry in archive.infolist()}
                self._root = self._find_root()
                pickled = self._read_pickle(archive)
        except (
            zipfile.BadZipFile,
            OSError,
            EOFError,
            NotImplementedError,
            RuntimeError,
            UnicodeError,
        ) as error:
            raise InputError(f"{path}: truncated or damaged ({error}); get it again") from error
        self._storages: dict[str, StoredTensor] = {}
        self.content = self._unpickle(pickled)

    def _find_root(self) -> str:
        roots = [
            name.removesuffix("/data.pkl")
            for name in self._entries
            if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(roots) != 1:
            raise InputError(f"{self.file.path}: has no data.pkl, so torch.save did not write it")
        return roots[0]

    def _read_pickle(self, archive: zipfile.ZipFile) -> bytes:
        name = f"{self._root}/data.pkl"
        if self._entries[name].file_size > MAX_PICKLE_BYTES:
            raise InputError(
                f"{self.file.path}: its data.pkl has {self._entries[name].file_size} bytes;"
                f" at most {MAX_PICKLE_BYTES} are read"
            )
        self._require_plain(self._entries[name])
        order = f"{self._root}/byteorder"
        if order in self._entries and archive.read(order) != b"little":
            raise InputError(f"{self.file.path}: written on a big-endian machine, which is not supported")
        return archive.read(name)

    def _require_plain(self, entry: zipfile.ZipInfo) -> None:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise InputError(
                f"{self.file.path}: {entry.filename!r} is compressed or encrypted;"
                " save the file again with torch.save"
            )

    def _unpickle(self, pickled: bytes) -> Any:
        try:
            _check_opcodes(pickled)
            return _Unpickler(self, pickled).load()
        except InputError:
            raise
        except Exception as error:  # a damaged pickle raises anything
            raise InputError(
                f"{self.file.path}: its pickle is damaged ({type(error).__name__}: {error})".splitlines()[0]
            ) from error

    def storage(self, dtype: str, key: str, num_elements: int) -> StoredTensor:
        """The storage `key`, `num_elements` of `dtype`. Raises InputError unless the file holds just that."""
        if key not in self._storages:
            self._storages[key] = self._find_storage(dtype, key, num_elements)
        found = self._storages[key]
        if (found.dtype, found.num_elements) != (dtype, num_elements):
            raise InputError(
                f"{self.file.path}: storage {key!r} is used with two dtypes or sizes, which is not supported"
            )
        return found

    def _find_storage(self, dtype: str, key: str, num_elements: int) -> StoredTensor:
        entry = self._entries.get(f"{self._root}/data/{key}")
        if entry is None:
            raise InputError(f"{self.file.path}: storage {key!r} is absent; the file is damaged")
        num_bytes = num_elements * DTYPE_BYTES[dtype]
        self._require_plain(entry)
        # The local header's own name and extra field decide where the bytes begin: torch pads them to 64
        # bytes, and the directory at the file's end does not know by how much.
        header = self.file.read_bytes(entry.header_offset, _LOCAL_HEADER_BYTES)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        offset = entry.header_offset + _LOCAL_HEADER_BYTES + names
        if header[:4] != b"PK\x03\x04" or entry.file_size != num_bytes or offset + num_bytes > self.file.size:
            raise InputError(
                f"{self.file.path}: storage {key!r} does not have the {num_bytes} bytes it should;"
                " the file is damaged"
            )
        return StoredTensor(dtype, (Piece(self.file, offset, num_elements),))


class _Unpickler(pickle.Unpickler):
    """Builds plain containers, numbers, texts, `ShapedTensor`s and stand-ins; refuses every other name."""

    def __init__(self, owner: TorchFile, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self._owner = owner
        # made anew for each file, because a pickle may set attributes on what it is given
        self._known = _stand_ins(owner)

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._known:
            return self._known[full]
        if module == "torch" and name in _DTYPE_OF_STORAGE:
            return Name(name)
        if module == "torch" and name in DTYPE_BYTES:
            return Name(name)
        raise _refusal(self._owner, full)

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage, key, _device, num_elements = reference
        if (
            kind != "storage"
            or storage not in _DTYPE_OF_STORAGE
            or type(num_elements) is not int
            or num_elements < 0
        ):
            raise InputError(
                f"{self._owner.file.path}: refers to {kind!r} {storage!r},"
                " which is not a storage of a supported dtype"
            )
        return _Storage(_DTYPE_OF_STORAGE[storage], str(key), num_elements)


def _refusal(owner: TorchFile, name: str) -> InputError:
    return InputError(
        f"{owner.file.path}: its pickle names {name!r}, which is not on the list of what may be read;"
        " nothing was run"
    )


def _stand_ins(owner: TorchFile) -> dict[str, Any]:
    def tensor(
        storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: Any
    ) -> ShapedTensor:
        return _shaped(owner.storage(*storage), offset, tuple(shape), tuple(stride))

    def parameter(data: ShapedTensor, *rest: Any) -> ShapedTensor:
        return data

    def with_attributes(rebuild: Any, kind: Any, arguments: tuple[Any, ...], attributes: Any) -> ShapedTensor:
        if rebuild not in (tensor, parameter):
            raise ValueError("not a tensor")
        return rebuild(*arguments)

    def zero_stage(value: int) -> int:
        return int(value)

    def attribute(kind: Any, name: str) -> int:
        if kind is not zero_stage or name not in _ZERO_STAGES:
            raise _refusal(owner, "getattr")
        return _ZERO_STAGES[name]

    def stub() -> type[Stub]:
        return type("Stub", (Stub,), {})

    return {
        "collections.OrderedDict": OrderedDict,
        "__builtin__.set": set,
        "builtins.set": set,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch._tensor._rebuild_from_type_v2": with_attributes,
        "torch.Tensor": Name("Tensor"),
        "torch.nn.parameter.Parameter": Name("Parameter"),
        "torch.Size": lambda sizes=(): tuple(sizes),
        "torch.device": stub(),
        "deepspeed.runtime.zero.config.ZeroStageEnum": zero_stage,
        "__builtin__.getattr": attribute,
        "deepspeed.utils.tensor_fragment.fragment_address": stub(),
        "deepspeed.runtime.fp16.loss_scaler.LossScaler": stub(),
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": stub(),
    }


def _shaped(
    stored: StoredTensor, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> ShapedTensor:
    """The tensor of `shape` at element `offset` of its storage.

    Raises ValueError if it lies outside it or is not contiguous.
    """
    if not all(type(size) is int and size >= 0 for size in (offset, *shape)) or len(shape) != len(stride):
        raise ValueError("a tensor's sizes are not natural numbers")
    num_elements = prod(shape)
    if offset + num_elements > stored.num_elements:
        raise ValueError("a tensor reaches beyond its storage")
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        # Strides of dimensions of size 1 mean nothing: torch leaves any number there.
        if num_elements > 1 and size > 1 and step != expected:
            raise ValueError("a tensor is stored transposed; save it again after .contiguous()")
        expected *= size
    return ShapedTensor(shape, stored.slice(offset, offset + num_elements))


def _check_opcodes(pickled: bytes) -> None:
    """Raises ValueError for a pickle that is cut short, or that would have the unpickler allocate
    gigabytes.
    """
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(pickled):
            raise ValueError("a memo number is out of range")
