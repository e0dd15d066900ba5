"""The only door to the native module: weight matrices, KV cache, programs, and single kernels for tests."""

from autoglm.kernels._native import (
    KvCache,
    MachineLimits,
    Matrix,
    MemoryReader,
    OpProfile,
    Program,
    Runtime,
    Vocabulary,
    WeightLoader,
    argmax,
    ask_for_files,
    dequantize,
    matmul,
    measure_limits,
    quantize,
    string_offsets,
)

__all__ = [
    "KvCache",
    "MachineLimits",
    "Matrix",
    "MemoryReader",
    "OpProfile",
    "Program",
    "Runtime",
    "Vocabulary",
    "WeightLoader",
    "argmax",
    "ask_for_files",
    "dequantize",
    "matmul",
    "measure_limits",
    "quantize",
    "string_offsets",
]
