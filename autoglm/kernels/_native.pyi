"""
CPU kernels of autoglm. Shapes and arithmetic: native/kernels.h and native/program.h.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


class Runtime:
    """A kernel table and a thread pool."""

    def __init__(self, num_threads: int, isa: str = '', slow_page_s: float = 0.001) -> None:
        """
        slow_page_s: once the system took longer to hand out 2 MB, weights come in pages of 4 kB until collapse().
        """

    @property
    def isa(self) -> str: ...

    @property
    def num_threads(self) -> int: ...

    def collapse(self) -> bool:
        """
        Move the next 2 MB of weights that lie in small pages into a huge one; false once there are none. From one thread.
        """

class Matrix:
    """A weight matrix [rows, cols] repacked for the kernels."""

    @staticmethod
    def pack(runtime: Runtime, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], type_id: int, rows: int, cols: int) -> Matrix: ...

    @property
    def type_id(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def cols(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

class WeightLoader:
    """
    Reads and repacks the matrices of one open file while the caller goes on.
    """

    def __init__(self, runtime: Runtime, fd: int) -> None: ...

    def read(self, offset: int, type_id: int, rows: int, cols: int, in_floats: bool = False) -> Matrix:
        """
        The matrix at the offset, in_floats unpacked to F32. Its contents come later; what computes with it waits for them.
        """

    def wait(self, seconds: float) -> bool:
        """
        Wait for at most so long; whether all is read. Raises EOFError if the file ends too early, OSError if it cannot be read.
        """

    def stop(self) -> None:
        """
        Give up what has not begun, and wait for the matrix that is being read.
        """

    @property
    def done_bytes(self) -> int: ...

class KvCache:
    """The paged keys and values of all layers."""

    def __init__(self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, type_k: str, type_v: str) -> None: ...

    @staticmethod
    def block_bytes(num_kv_heads: int, head_dim: int, type_k: str, type_v: str) -> int: ...

    def fill(self) -> None:
        """
        Overwrite all keys and values with one small number, so that reads of them can be timed.
        """

    @property
    def nbytes(self) -> int: ...

class OpProfile:
    """
    What one operation of a program took, and how much of it there was to do.
    """

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int:
        """Of its weights; 0 where it has none."""

    @property
    def cols(self) -> int: ...

    @property
    def types(self) -> list[int]:
        """Type ids of its weights, each once."""

    @property
    def calls(self) -> int: ...

    @property
    def seconds(self) -> float:
        """Wall time."""

    @property
    def busy_s(self) -> float:
        """Time at work, summed over the threads."""

    @property
    def bytes(self) -> float:
        """Of packed weights, table rows, keys and values read."""

    @property
    def int8_macs(self) -> float: ...

    @property
    def int16_macs(self) -> float: ...

    @property
    def float_macs(self) -> float: ...

class MachineLimits:
    """What all threads of a runtime reach together at best."""

    @property
    def read_bytes_per_s(self) -> float: ...

    @property
    def int8_macs_per_s(self) -> float: ...

    @property
    def int16_macs_per_s(self) -> float: ...

    @property
    def float_macs_per_s(self) -> float: ...

class MemoryReader:
    """Memory held to be read again and again by all threads of a runtime."""

    def __init__(self, runtime: Runtime, num_bytes: int) -> None:
        """num_bytes: several times what the last cache holds."""

    def bytes_per_s(self, seconds: float) -> float:
        """The fastest eighth of what is read in about so many seconds."""

class Program:
    """A network as a list of operations over named buffers."""

    def __init__(self, runtime: Runtime, max_tokens: int) -> None: ...

    def buffer(self, width: int) -> int: ...

    def activation(self, width: int) -> int: ...

    def embed(self, table: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], type_id: int, vocab: int, width: int, out: int) -> None: ...

    def norm(self, x: int, act: int, weight: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], eps: float, branch: int | None = None, post_weight: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None) -> None: ...

    def layer_norm(self, x: int, act: int, weight: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], eps: float, branch: int | None = None) -> None: ...

    def normalize(self, x: int, out: int, weight: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], eps: float, bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None) -> None: ...

    def quantize(self, x: int, act: int, gelu: bool = False) -> None: ...

    def linear(self, act: int, matrices: Sequence[Matrix], out: int, biases: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None] = [], accumulate: bool = False, scale: float = 1.0, name: str = 'linear') -> None: ...

    def gated_mlp(self, act: int, gate: Matrix, up: Matrix, result: int) -> None: ...

    def set_attention(self, cache: KvCache, num_heads: int, rotary_dim: int, interleaved: bool, sections: tuple[int, int, int], head_dim: int, inv_freq: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    def rope_cache(self, rows: int, layer: int) -> None:
        """
        Rows [q | k | v], or [k | v]: q and k are rotated, q scaled, k and v written into the cache.
        """

    def rope_queries(self, q: int) -> None:
        """
        Queries alone, rotated and scaled; after gather those of the rows gathered.
        """

    def attention(self, q: int, layer: int, out: int) -> None:
        """
        Rows that begin with rotated queries; after gather those of the rows gathered.
        """

    def set_full_attention(self, num_heads: int, rotary_dim: int, interleaved: bool, sections: tuple[int, int, int], head_dim: int, inv_freq: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    @staticmethod
    def full_attention_bytes(num_rows: int, num_heads: int, head_dim: int) -> int:
        """Bytes of what set_full_attention allocates."""

    def full_attention(self, qkv: int, out: int) -> None: ...

    def gather(self, x: int, out: int) -> None: ...

    def result(self, x: int) -> None: ...

    def populate_in_background(self, tokens: int) -> None:
        """
        Have the system hand out the memory of a first step of so many tokens while the caller goes on; once.
        """

    def run(self, token_ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], positions: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], slot_mapping: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], cu_seqlens_q: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], context_lens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], block_tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], logits_rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], limits: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, embeddings: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None = None) -> NDArray[numpy.float32]: ...

    def start(self, token_ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], positions: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], slot_mapping: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], cu_seqlens_q: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], context_lens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], block_tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], logits_rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], limits: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, embeddings: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None = None) -> None: ...

    def advance(self, seconds: float) -> bool:
        """Go on with the started step for about so long; whether it is done."""

    def result_rows(self) -> NDArray[numpy.float32]:
        """
        Where a step that is done has its rows, the first of f32 [max_tokens, width], until the next start: shared memory.
        """

    def set_profiling(self, on: bool) -> None: ...

    def profile(self) -> list[OpProfile]:
        """
        One entry an operation, in order, summed since profiling was switched on; the first, 'plan', is start().
        """

    def view(self, buffer: int) -> NDArray[numpy.float32]:
        """The buffer as f32 [max_tokens, width], shared memory."""

    @property
    def nbytes(self) -> int: ...

class Vocabulary:
    """
    A byte-level BPE vocabulary. Strings are given as string_offsets found them.
    """

    def __init__(self, tokens: bytes, offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], is_hidden: bytes, ignore_merges: bool) -> None: ...

    def add_merges(self, merges: bytes, offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> int:
        """
        How many are two tokens that make a third, before the first that is not.
        """

    def encode(self, pieces: str) -> list[int]:
        """Token ids of pieces in GPT-2's byte alphabet, with spaces between."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for."""

    @property
    def longest_bytes(self) -> int: ...

def string_offsets(buffer: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], first: int, end: int, count: int) -> Annotated[NDArray[numpy.uint32], dict(shape=(None,))]:
    """
    Where the strings of a GGUF array at `first` begin, u32 [count + 1] from there; fewer before the first bad one.
    """

def ask_for_files(paths: Sequence[str]) -> None:
    """
    Have the system read whole files into its page cache, while the caller goes on.
    """

def matmul(runtime: Runtime, matrix: Matrix, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> NDArray[numpy.float32]:
    """
    x [T, cols] @ matrix.T with the engine's own arithmetic -> f32 [T, rows].
    """

def dequantize(data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], type_id: int, num_elements: int) -> NDArray[numpy.float32]: ...

def quantize(runtime: Runtime, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], type_id: int) -> NDArray[numpy.uint8]:
    """
    Rows of finite weights [rows, cols] as Q8_0, Q5_0, Q4_K or Q6_K blocks, u8 [rows * row bytes].
    """

def measure_limits(runtime: Runtime, read_bytes: int, seconds: float) -> MachineLimits:
    """
    Memory read and multiply-adds a second with the runtime's kernels, about `seconds` for each. read_bytes: more than the last cache holds.
    """

def argmax(runtime: Runtime, x: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> int:
    """
    Index of the largest value, the lowest among equals; -1 if there is a NaN or infinity.
    """
