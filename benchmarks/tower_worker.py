"""One image encoder in its own process, driven over stdin and stdout as engine_worker.py is.

    python benchmarks/tower_worker.py llama.cpp|autoglm MMPROJ VOCABULARY THREADS [flash]

Request: {"width": 540, "height": 1200} and, to keep what came out, "features": a path for an .npy f32 [tokens, 4096].
Both engines get the same drawn screenshot as RGB bytes. Timed apart: preprocess_s, from those bytes to normalized
pixels (resizing, and with llama.cpp finding the picture's place in a prompt); encode_s, from there to the decoder's
tokens in ordinary memory (patch embedding, positions, layers, merger). No picture file is decoded.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import numpy as np
from engine_worker import serve
from PIL import Image, ImageDraw

FEATURES = 4096
LOG_LEVEL_ERROR = 4  # of ggml


def draw_screen(width: int, height: int) -> np.ndarray:
    """u8 [height, width, 3]: a photo of smooth noise, cards with icons and lines as of text; the same in each call."""
    rng = np.random.default_rng(0)
    screen = Image.new("RGB", (width, height), (244, 245, 248))
    photo = Image.fromarray(rng.integers(0, 256, (9, 16, 3), np.uint8)).resize((width, height // 3))
    screen.paste(photo, (0, height // 24))
    draw = ImageDraw.Draw(screen)
    row = height // 16
    for top in range(height * 2 // 5, height - row, row):
        tint = tuple(rng.integers(40, 220, 3).tolist())
        draw.rounded_rectangle((width // 30, top, width - width // 30, top + row * 9 // 10), row // 6, (255, 255, 255))
        draw.ellipse((width // 18, top + row // 8, width // 18 + row * 5 // 8, top + row * 6 // 8), tint)
        for line in range(2):
            x, y = width // 18 + row, top + row // 6 + line * row // 3
            for word in rng.integers(width // 60, width // 8, 5).tolist():
                if x + word < width * 9 // 10:
                    draw.rectangle((x, y, x + word, y + row // 8), (40 + 80 * line,) * 3)
                x += word + width // 60
    return np.array(screen)


def print_errors(level: int, text: bytes, user: object) -> None:
    if level == LOG_LEVEL_ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


class LlamaCpp:
    """mtmd through its C API: mtmd_tokenize preprocesses, mtmd_encode_chunk encodes.

    Without warmup: that only reserves memory for a picture of another size, which the measured peak must show.
    """

    def __init__(self, mmproj: str, vocabulary: str, threads: int, flash: bool) -> None:
        from llama_cpp import llama_cpp as c

        try:
            from llama_cpp import mtmd_cpp as m
        except ImportError:
            m = None
        # Setting a field that an older structure lacks would silently do nothing.
        if not all(hasattr(getattr(m, "mtmd_context_params", None), name) for name in ("flash_attn_type", "warmup")):
            raise SystemExit(
                "this llama-cpp-python is too old for images of glm4v; mend: install version 0.3.36 or later"
            )
        self.m = m
        self._log = c.llama_log_callback(print_errors)
        c.llama_log_set(self._log, ctypes.c_void_p(0))
        m.mtmd_log_set(self._log, ctypes.c_void_p(0))
        c.llama_backend_init()
        params = c.llama_model_default_params()
        params.vocab_only = True
        self.model = c.llama_model_load_from_file(vocabulary.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {vocabulary}")
        settings = m.mtmd_context_params_default()
        settings.use_gpu = settings.print_timings = settings.warmup = False
        settings.n_threads = threads
        settings.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = m.mtmd_init_from_file(mmproj.encode(), self.model, settings)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot load {mmproj}")
        self.description = c.llama_print_system_info().decode()
        self.chunks: Any = None

    def preprocess(self, rgb: np.ndarray) -> None:
        m = self.m
        if self.chunks:
            m.mtmd_input_chunks_free(self.chunks)
        height, width, _ = rgb.shape
        bitmap = m.mtmd_bitmap_init(width, height, rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        marker = m.mtmd_default_marker()
        text = m.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
        self.chunks = m.mtmd_input_chunks_init()
        code = m.mtmd_tokenize(self.context, self.chunks, ctypes.byref(text), (ctypes.c_void_p * 1)(bitmap), 1)
        m.mtmd_bitmap_free(bitmap)
        chunks = [m.mtmd_input_chunks_get(self.chunks, i) for i in range(m.mtmd_input_chunks_size(self.chunks))]
        pictures = [chunk for chunk in chunks if m.mtmd_input_chunk_get_type(chunk) == m.MTMD_INPUT_CHUNK_TYPE_IMAGE]
        if code or len(pictures) != 1:
            raise SystemExit(f"llama.cpp cannot preprocess the picture (code {code}, {len(pictures)} chunks)")
        self.picture = pictures[0]

    def encode(self) -> np.ndarray:
        if self.m.mtmd_encode_chunk(self.context, self.picture):
            raise SystemExit("llama.cpp cannot encode the picture")
        num_tokens = self.m.mtmd_input_chunk_get_n_tokens(self.picture)
        return np.ctypeslib.as_array(self.m.mtmd_get_output_embd(self.context), shape=(num_tokens, FEATURES))


class Autoglm:
    """Our encoder, the way the engine's jobs call it, in one slice."""

    def __init__(self, mmproj: str, vocabulary: str, threads: int, flash: bool) -> None:
        import autoglm
        from autoglm.formats.gguf import GGUFFile
        from autoglm.kernels import Runtime
        from autoglm.media import glm4v_pixels
        from autoglm.model.encoder import finish
        from autoglm.model.glm4v_vision import Glm4vVision, read_glm4v_config
        from autoglm.model.loader import WeightReader

        self.pixels, self.finish = glm4v_pixels, finish
        runtime = Runtime(threads)
        self.gguf = GGUFFile.open(mmproj)
        reader = WeightReader(self.gguf, runtime)
        self.vision = Glm4vVision(runtime, reader, read_glm4v_config(self.gguf))
        reader.finish()
        self.description = f"autoglm {autoglm.__version__}, {runtime.isa}"

    def preprocess(self, rgb: np.ndarray) -> None:
        height, width, _ = rgb.shape
        grid = self.pixels.patch_grid(width, height)
        self.patches = self.pixels.pixel_values(rgb, grid)
        _, self.rows, self.columns = grid.image_grid_thw

    def encode(self) -> np.ndarray:
        return self.finish(self.vision.encode(lambda: self.patches, self.rows, self.columns))


def answer(engine: LlamaCpp | Autoglm, request: dict[str, Any]) -> dict[str, Any]:
    """Encode one drawn screenshot."""
    rgb = draw_screen(request["width"], request["height"])
    begin = time.perf_counter()
    engine.preprocess(rgb)
    preprocessed = time.perf_counter()
    features = engine.encode()
    encode_s = time.perf_counter() - preprocessed
    if "features" in request:
        np.save(request["features"], features)
    return {"preprocess_s": preprocessed - begin, "encode_s": encode_s, "num_tokens": len(features)}


def main() -> None:
    kind, mmproj, vocabulary, threads = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    engine = LlamaCpp if kind == "llama.cpp" else Autoglm
    serve(lambda: engine(mmproj, vocabulary, threads, "flash" in sys.argv[5:]), answer)


if __name__ == "__main__":
    main()
