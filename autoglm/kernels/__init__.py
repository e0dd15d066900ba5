"""The only door to the native module: weight matrices, KV cache, programs, and single kernels for tests."""

from autoglm.kernels._native import KvCache, Matrix, Program, Runtime, argmax, dequantize, matmul, quantize

__all__ = ["KvCache", "Matrix", "Program", "Runtime", "argmax", "dequantize", "matmul", "quantize"]
