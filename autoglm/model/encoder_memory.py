"""Bytes that encoding a picture or a sound takes at most, from an mmproj's header alone.

Counted are the native programs' buffers as program.cpp lays them out, one layer's keys and values, and NumPy's arrays
around them at their widest moment. Some arrays are counted that never live at once: what is meant is an upper bound
close enough to plan with, and tests/model/test_encoder_memory.py holds it to what is really allocated.
"""

from __future__ import annotations

import math

from autoglm.formats.gguf import GGUFFile
from autoglm.formats.quant_types import BLOCK, FLOAT_TYPES, GGMLType
from autoglm.kernels import KvCache, Program
from autoglm.media import glm4v_pixels
from autoglm.media.log_mel import HOP, SAMPLE_RATE_HZ
from autoglm.model.encoder import KEYS_IN_A_BLOCK
from autoglm.model.gcmf_audio import GcmfAudioConfig, read_gcmf_audio_config
from autoglm.model.gcmf_vision import GcmfVisionConfig, read_gcmf_vision_config
from autoglm.model.glm4v_vision import MERGED_AT_ONCE, read_glm4v_config
from autoglm.model.loader import runs_in_floats
from autoglm.model.projector import read_projector_type

_FLOAT = 4
_CHUNK, _CHUNK_META_BYTES = 256, 96  # of a quantized activation row (native/kernels.h)
# What programs hold for their threads, whatever the picture.
_SCRATCH_BYTES = 8 << 20
# log_mel's windows, spectrum and powers for one frame of 10 ms, measured.
_MEL_FRAME_BYTES = 12_000


def picture_bytes(gguf: GGUFFile, max_pixels: int) -> int:
    """For one picture under a budget of max_pixels, as the model's processor counts them."""
    if read_projector_type(gguf) == "glm4v":
        return _glm4v(gguf, max_pixels) + _SCRATCH_BYTES
    return _gcmf_vision(gguf, read_gcmf_vision_config(gguf), max_pixels) + _SCRATCH_BYTES


def weights_bytes(gguf: GGUFFile, in_floats: bool = False) -> dict[str, int]:
    """Weights in memory of the parts "vision" (projector and fusion with it) and "audio".

    Kernels become f32, a glm4v merger's 16-bit whole numbers where attention is in such.
    """
    sums = {"vision": 0, "audio": 0}
    for name, tensor in gguf.tensors.items():
        is_kept = len(tensor.shape) == 2 and not in_floats
        num_bytes = tensor.nbytes if is_kept else _FLOAT * math.prod(tensor.shape)
        if name == "mm.patch_merger.weight" and _quantized_attention(gguf):
            num_bytes = num_bytes * 33 // 64  # 64 numbers of two bytes and a scale of four
        sums["audio" if name.startswith(("a.", "mm.a.", "gcmf.audio.")) else "vision"] += num_bytes
    return sums


def sound_bytes(gguf: GGUFFile, max_sound_s: float) -> int:
    """For one sound of so many seconds, by a file that has an audio encoder."""
    num_frames = math.ceil(max_sound_s * SAMPLE_RATE_HZ / HOP)
    return _gcmf_audio(gguf, read_gcmf_audio_config(gguf), num_frames) + _SCRATCH_BYTES


def _glm4v(gguf: GGUFFile, max_pixels: int) -> int:
    config = read_glm4v_config(gguf)
    width, text, pixels = config.hidden_size, config.text_size, 3 * config.patch_size**2
    mlp = gguf.tensors["v.blk.0.ffn_gate.weight"].shape[0] if "v.blk.0.ffn_gate.weight" in gguf.tensors else 4 * width
    real_pixels = max_pixels // glm4v_pixels.TEMPORAL_PATCH_SIZE
    # A strip as long as may be keeps one row of tokens, over the budget if that is small.
    least = glm4v_pixels.MERGE_SIZE**2 * glm4v_pixels.MAX_ASPECT_RATIO
    patches = max(least, real_pixels // config.patch_size**2)

    tower = _buffers(pixels, width, width, width, 3 * width) + _FLOAT * pixels
    tower += _activation(gguf, width, "v.blk.", "attn_qkv", "attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    tower += _activation(gguf, width, "v.blk.", "attn_out") + _activation(gguf, mlp, "v.blk.", "ffn_down")
    arrays = _FLOAT * (pixels + 2 * width + config.head_dim) + 4 * pixels + 5 * 8  # as numbers, and as bytes before
    merger = _buffers(4 * width, text, text, text) + _FLOAT * (4 * width + text)
    merger += _activation(gguf, text, "mm.", "model.fc") + _activation(gguf, text, "mm.", "gate", "up")
    merger += _activation(gguf, config.merger_size, "mm.", "down")
    keys = _keys(patches, config.num_heads, config.head_dim)
    if _quantized_attention(gguf):
        keys = Program.full_attention_bytes(patches, config.num_heads, config.head_dim)
    tokens = -(-patches // 4)
    merging = min(tokens, MERGED_AT_ONCE) * (merger + _FLOAT * 4 * width) + tokens * _FLOAT * text
    return patches * (arrays + tower) + keys + merging


def _gcmf_vision(gguf: GGUFFile, config: GcmfVisionConfig, max_pixels: int) -> int:
    width, mlp, size = config.hidden_size, config.mlp_size, config.patch_size
    merged = config.merge_size**2
    patches = max(merged, max_pixels // size**2)
    pixels = _FLOAT * 3 * size**2
    stem: float = 2 * pixels
    if config.stem_channels:
        first, second, third = config.stem_channels
        stem = max(
            _convolution(places * size**2, strides * size**2, before, after)
            for places, strides, before, after in (
                (1 / 4, 1, 3, first),
                (1 / 16, 1 / 4, first, second),
                (1 / 64, 1 / 16, second, third),
                (1 / 64, 1 / 64, third, third),
                (1 / 256, 1 / 64, third, width),
            )
        )
    tower = _buffers(width, 3 * width, width, mlp)
    tower += _activation(gguf, mlp, "v.blk.", "ffn_down") + _activation(gguf, width, "v.blk.", "attn_qkv", "ffn_up")
    tower += _activation(gguf, width, "v.blk.", "attn_out") + _FLOAT * 4 * width
    projector = _projector(gguf, "mm.0", "mm.2", merged * width, config.projector_size, config.text_size)
    after = patches * tower + -(-patches // merged) * projector
    after += _keys(patches, config.num_heads, width // config.num_heads)
    # The picture itself, as bytes and as numbers; then the stem's widest layer or all that follows it.
    return patches * (2 * pixels) + max(round(patches * stem), after)


def _gcmf_audio(gguf: GGUFFile, config: GcmfAudioConfig, num_frames: int) -> int:
    width, heads, mels = config.hidden_size, config.num_heads, config.num_mels
    rows = -(-num_frames // 4)
    if config.stem_residuals:
        stem = num_frames * _FLOAT * (mels * (5 + 5 + 2) // 2 + 4 * width)
    else:
        channels = config.subsample_channels
        stem = round(num_frames * mels * (_convolution(1 / 4, 1, 1, channels) + channels * _FLOAT))
        stem = max(stem, round(num_frames * mels * _convolution(1 / 16, 1 / 4, channels, channels)))
    # The longer rows of queries, keys and values that carry relative positions: joined, scaled, and in the program.
    head = width // heads + width
    attention = _FLOAT * 10 * heads * head + _buffers(3 * heads * head, heads * head)
    blocks = rows * (attention + _FLOAT * (6 * width + 4 * config.mlp_size)) + _keys(rows, heads, head)
    projector = rows * _projector(gguf, "mm.a.mlp.1", "mm.a.mlp.2", width, config.projector_size, config.text_size)
    mel = num_frames * _FLOAT * mels
    return mel + max(num_frames * _MEL_FRAME_BYTES, stem, blocks, projector)


def _projector(gguf: GGUFFile, first: str, second: str, width: int, hidden: int, text: int) -> int:
    program = _buffers(width, hidden, text) + _activation(gguf, width, first) + _activation(gguf, hidden, second)
    return program + _FLOAT * (width + text)


def _convolution(places: float, places_before: float, before: int, after: int) -> float:
    """A 3 x 3 layer: input and its padded copy, windows as they are multiplied, and the sums."""
    return _FLOAT * (2 * places_before * before + places * (2 * 9 * before + 3 * after))


def _quantized_attention(gguf: GGUFFile) -> bool:
    queries = (tensor for name, tensor in gguf.tensors.items() if name.startswith("v.blk.0.attn_q"))
    return not runs_in_floats(gguf) and any(tensor.type not in FLOAT_TYPES for tensor in queries)


def _keys(num_rows: int, num_heads: int, head_dim: int) -> int:
    return -(-num_rows // KEYS_IN_A_BLOCK) * KvCache.block_bytes(num_heads, head_dim, "f32", "f32")


def _buffers(*widths: int) -> int:
    """A row of each buffer: an odd number of cache lines."""
    return sum(64 * (-(-width // 16) | 1) for width in widths)


def _activation(gguf: GGUFFile, width: int, prefix: str, *parts: str) -> int:
    """A row of an activation in every form that the weights which read it ask for."""
    names = tuple(f"{part}.weight" for part in parts) or (f"{prefix}.weight",)
    readers = (t for name, t in gguf.tensors.items() if name.startswith(prefix) and name.endswith(names))
    types = {GGMLType.F32} if runs_in_floats(gguf) else {tensor.type for tensor in readers}
    per_block = {1 if type in FLOAT_TYPES else BLOCK[type][0] for type in types}
    return sum(
        _buffers(width) if block == 1 else -(-width // _CHUNK) * (_CHUNK + _CHUNK_META_BYTES) for block in per_block
    )
