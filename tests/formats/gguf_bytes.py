"""Builds small GGUF files byte by byte, and remembers where each header field lies, so that tests can break it."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Field:
    """One number or text of the header: width in bytes, code is its struct code ("" for raw text)."""

    name: str
    offset: int
    width: int
    code: str


@dataclass
class GGUFBytes:
    """Bytes written so far and the fields in them."""

    data: bytearray = field(default_factory=bytearray)
    fields: list[Field] = field(default_factory=list)

    def number(self, name: str, code: str, value: float) -> None:
        packed = struct.pack("<" + code, value)
        self.fields.append(Field(name, len(self.data), len(packed), "<" + code))
        self.data += packed

    def text(self, name: str, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.number(f"length of {name}", "Q", len(raw))
        self.fields.append(Field(name, len(self.data), len(raw), ""))
        self.data += raw

    def header(self, num_tensors: int, num_keys: int, *, magic: bytes = b"GGUF", version: int = 3) -> None:
        self.fields.append(Field("magic", 0, 4, ""))
        self.data += magic
        self.number("version", "I", version)
        self.number("number of tensors", "Q", num_tensors)
        self.number("number of keys", "Q", num_keys)

    def key(self, name: str | bytes, type_id: int, code: str, value: float) -> None:
        self.text("key", name)
        self.number("value type", "I", type_id)
        self.number("value", code, value)

    def string_key(self, name: str | bytes, value: str | bytes) -> None:
        self.text("key", name)
        self.number("value type", "I", 8)
        self.text("string value", value)

    def array_key(self, name: str, element_type: int, code: str, values: list[float]) -> None:
        self.text("key", name)
        self.number("value type", "I", 9)
        self.number("element type", "I", element_type)
        self.number("array count", "Q", len(values))
        for value in values:
            self.number("array element", code, value)

    def string_array_key(self, name: str, values: list[str | bytes]) -> None:
        self.text("key", name)
        self.number("value type", "I", 9)
        self.number("element type", "I", 8)
        self.number("array count", "Q", len(values))
        for value in values:
            self.text("array string", value)

    def tensor(self, name: str | bytes, dims: list[int], type_id: int, offset: int) -> None:
        self.text("tensor name", name)
        self.number("number of dimensions", "I", len(dims))
        for dim in dims:
            self.number("dimension", "Q", dim)
        self.number("tensor type", "I", type_id)
        self.number("tensor offset", "Q", offset)

    def finish(self, data_bytes: int, alignment: int = 32) -> bytes:
        """The whole file, with data_bytes of tensor data."""
        padding = -len(self.data) % alignment
        return bytes(self.data) + bytes(padding) + bytes(i % 251 for i in range(data_bytes))


def sample() -> GGUFBytes:
    """A sound header with every kind of value in it and two tensors; finish(SAMPLE_DATA_BYTES) completes it."""
    file = GGUFBytes()
    file.header(num_tensors=2, num_keys=8)
    file.string_key("general.architecture", "llama")
    file.key("general.alignment", 4, "I", 32)
    file.key("a.u8", 0, "B", 7)
    file.key("a.f32", 6, "f", 1.5)
    file.key("a.bool", 7, "B", 1)
    file.key("a.i64", 11, "q", -5)
    file.array_key("a.numbers", 5, "i", [1, -2, 3])
    file.string_array_key("a.strings", ["one", "zwei", "三"])
    file.tensor("first.weight", [32, 4], 8, 0)  # Q8_0: 136 bytes
    file.tensor("second.weight", [8], 0, 160)  # F32: 32 bytes
    return file


SAMPLE_DATA_BYTES = 192
