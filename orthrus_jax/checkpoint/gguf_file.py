"""A GGUF file: its metadata, and where its tensors lie. Little-endian, versions 2 and 3.

Every length is held against the file's end, so that a damaged file is refused, not followed. Knows
no models and no tokenizers. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line

Metadata = dict[str, Any]
ALIGNMENT = 32  # of the tensors, unless the file says otherwise
SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q",
           12: "<d"}  # fmt: skip
STRING, ARRAY = 8, 9
KINDS = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K",
         11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"}  # fmt: skip  # of tensors


class GgufTensor(NamedTuple):
    """Shape, as numpy orders it; kind, a key of KINDS; and the bytes [start, stop) of the file."""

    shape: tuple[int, ...]
    kind: int
    start: int
    stop: int


class GgufFile(NamedTuple):
    """A file that was read; its tensors stay on disk.

    Attributes:
      path: of the file.
      metadata: by key; integers, floats, booleans, strings, and lists of these.
      tensors: by name.
    """

    path: pathlib.Path
    metadata: Metadata
    tensors: dict[str, GgufTensor]

    def read(self, name: str) -> np.ndarray:
        """Return a tensor, float32[shape], dequantised."""
        from gguf import GGMLQuantizationType, dequantize  # late: an extra

        tensor = self.tensors[name]
        data = np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.stop - tensor.start,))
        rows = np.ascontiguousarray(data).reshape(*tensor.shape[:-1], -1)
        return np.asarray(dequantize(rows, GGMLQuantizationType(tensor.kind)), np.float32)


def open_gguf(path: pathlib.Path) -> GgufFile:
    """Read the header of a file.

    Raises:
      UserError: naming the file, when it is no GGUF, damaged, cut off, or holds tensors of a kind
        that is not read; or when the package gguf is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(
            f"{path}: reading GGUF needs the package gguf: pip install 'orthrus-jax[gguf]'"
        ) from None
    try:
        data: Any = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        return GgufFile(path, *_header(_Cursor(data)))
    except (OSError, _DamagedError) as error:
        raise UserError(
            f"{path} is not a readable GGUF file ({first_line(error)}): fetch it again, or convert "
            "from the model's safetensors"
        ) from None


class _DamagedError(Exception):
    """What is wrong with the file, in a few words."""


class _Cursor:
    """Reads values one after another, never past the end."""

    def __init__(self, data: Any) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> Any:
        if size > len(self.data) - self.at:
            raise _DamagedError(f"cut off: it ends at byte {len(self.data):,} within its header")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        try:
            return bytes(self.take(self.scalar("<Q"))).decode()
        except UnicodeDecodeError:
            raise _DamagedError("damaged: a text is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise _DamagedError(f"damaged: a value of type {kind}")
        of, count = self.scalar("<I"), self.scalar("<Q")
        if of == STRING:
            return [self.text() for _ in range(count)]
        if of not in SCALARS:
            raise _DamagedError(f"damaged: an array of type {of}")
        code = SCALARS[of].removeprefix("<")
        part = self.take(count * struct.calcsize(f"<{code}"))
        return np.frombuffer(part, np.dtype(code).newbyteorder("<")).tolist()


def _header(cursor: _Cursor) -> tuple[Metadata, dict[str, GgufTensor]]:
    if (magic := bytes(cursor.data[:4])) != b"GGUF":
        raise _DamagedError(f"it begins with {magic!r}, not with b'GGUF'")
    cursor.take(4)
    if (version := cursor.scalar("<I")) not in (2, 3):
        raise _DamagedError(f"version {version}: 2 and 3 are read, little-endian")
    tensors, keys = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: Metadata = {}
    for _ in range(keys):
        key = cursor.text()
        if key in metadata:
            raise _DamagedError(f"damaged: the key {key!r} stands twice")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    places = [_place(cursor) for _ in range(tensors)]
    step = metadata.get("general.alignment", ALIGNMENT)
    if type(step) is not int or step < 1 or step & (step - 1):
        raise _DamagedError(f"damaged: general.alignment={step!r}")
    begin = -(-cursor.at // step) * step
    table: dict[str, GgufTensor] = {}
    for name, tensor in places:
        if name in table:
            raise _DamagedError(f"damaged: the tensor {name!r} stands twice")
        table[name] = tensor._replace(start=begin + tensor.start, stop=begin + tensor.stop)
        if table[name].stop > len(cursor.data):
            raise _DamagedError(
                f"cut off: {name} ends at byte {table[name].stop:,} of {len(cursor.data):,}"
            )
    return metadata, table


def _place(cursor: _Cursor) -> tuple[str, GgufTensor]:
    """A row of the table of tensors, its bytes counted from the first tensor's place."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # late: an extra

    name, dims = cursor.text(), cursor.scalar("<I")
    if not 1 <= dims <= 4:
        raise _DamagedError(f"damaged: {name!r} has {dims} dimensions")
    shape = tuple(cursor.scalar("<Q") for _ in range(dims))[::-1]
    kind, start = cursor.scalar("<I"), cursor.scalar("<Q")
    if kind not in KINDS:
        known = ", ".join(KINDS.values())
        raise _DamagedError(f"{name} is of type {kind}, and {known} are read")
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not all(shape) or shape[-1] % elements:
        raise _DamagedError(f"damaged: {name} has the shape {list(shape)}")
    return name, GgufTensor(shape, kind, start, start + math.prod(shape) // elements * size)
