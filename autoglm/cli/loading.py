"""From flags to a loaded engine: find the file, fit it to the memory, read it. All that answers shares this.

What only pictures and sounds need is imported where an mmproj is found: a model of text starts without it. What has to
do with text and not with weights is imported once native threads read these.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from autoglm.cli.console import parameter_count, size
from autoglm.cli.memory import memory_table
from autoglm.config import ENGINE_DEFAULTS, EngineConfig, ModelConfig
from autoglm.deploy import preflight, pull
from autoglm.deploy.machine import available_memory_bytes, usable_cores
from autoglm.engine.fit import MediaMemory, MemoryPlan, fit_engine_config, kv_token_bytes, memory_plan
from autoglm.engine.model_runner import CpuModelRunner
from autoglm.errors import ConfigError
from autoglm.formats.gguf import GGUFFile
from autoglm.kernels import Runtime
from autoglm.media.limits import MediaLimits
from autoglm.model.loader import WeightReader, float_bytes, read_model_config, runs_in_floats

if TYPE_CHECKING:
    from autoglm.chat.template import ChatTemplate
    from autoglm.chat.tokenizer import Tokenizer
    from autoglm.engine.engine import Engine
    from autoglm.model.multimodal import Multimodal

logger = logging.getLogger("autoglm.cli")

_QUANTIZATION_SUFFIX = re.compile(r"[.-](?:[IT]?Q\d\w*|B?F16|F32|FP16)$", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_MAX_TEMPLATE_BYTES = 1 << 20


class ModelOptions(Struct, frozen=True):
    """The flags about model and engine; None = fit it to the machine."""

    model: str | None = None
    alias: str | None = None
    chat_template_file: Path | None = None
    ctx_size: int | None = None
    threads: int | None = None
    parallel: int = ENGINE_DEFAULTS.max_num_seqs
    max_batched_tokens: int | None = None
    queue: int = ENGINE_DEFAULTS.max_waiting
    cache_type_k: str = ENGINE_DEFAULTS.cache_type_k
    cache_type_v: str = ENGINE_DEFAULTS.cache_type_v
    kv_blocks: int | None = None
    kv_memory: str | None = None
    prefix_cache: bool = True
    draft_max: int = ENGINE_DEFAULTS.draft_max
    mmproj: Path | None = None
    takes_media: bool = False  # look for the mmproj beside the model
    max_sound_s: float = MediaLimits().max_sound_s
    max_pixels: int | None = None  # of a picture where a request names none


class LoadedModel(Struct, frozen=True):
    """Everything a command needs to generate: the engine over one model, and how it was fitted.

    media        the memory counted for pictures and sounds
    most_pixels  what a request's max_pixels may reach
    """

    model_id: str
    aliases: tuple[str, ...]
    path: Path
    model_config: ModelConfig
    engine_config: EngineConfig
    plan: MemoryPlan
    tokenizer: Tokenizer
    template: ChatTemplate
    engine: Engine
    runtime: Runtime
    multimodal: Multimodal | None = None
    media: MediaMemory | None = None
    most_pixels: int | None = None


def served_names(options: ModelOptions) -> tuple[str, tuple[str, ...]]:
    """The model's id and its other names: what --alias lists, or else the file's name with and without quantization."""
    if options.alias is not None:
        names = [name.strip() for name in options.alias.split(",") if name.strip()]
        if not names:
            raise ConfigError(f"--alias is {options.alias!r}, expected a name, or names with commas between")
        return names[0], tuple(names[1:])
    model = options.model or pull.DEFAULT_MODEL
    if model.lower() in pull.NAMED_MODELS:
        return pull.NAMED_MODELS[model.lower()].served_name, (model.lower(),)
    stem = re.sub(r"\.gguf$", "", re.split(r"[/:]", model)[-1], flags=re.IGNORECASE)
    short = _QUANTIZATION_SUFFIX.sub("", stem) or stem
    return short, () if short == stem else (stem,)


def check_model_option(options: ModelOptions) -> None:
    """Raises ConfigError at once if --model is neither a file nor a name, or --mmproj is no file."""
    try:
        if options.mmproj is not None:
            preflight.check_mmproj_file(str(options.mmproj))
        if options.model is not None and not pull.is_model_name(options.model):
            preflight.check_model_file(options.model)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def find_model(options: ModelOptions, report: pull.Progress) -> Path:
    """The GGUF to serve; a model that goes by a name is fetched if it is not here."""
    if options.model is None or (pull.is_model_name(options.model) and not Path(options.model).exists()):
        return pull.pull(options.model or pull.DEFAULT_MODEL, progress=report).path
    return Path(options.model)


def find_mmproj(path: Path, options: ModelOptions) -> Path | None:
    """The projector to load: --mmproj, or the one of the model's own name that lies beside it; None: text only."""
    if options.mmproj is not None:
        return options.mmproj
    if not options.takes_media:
        return None
    name = _QUANTIZATION_SUFFIX.sub("", path.stem) or path.stem
    found = sorted(path.parent.glob("mmproj-*.gguf"))
    own = [file for file in found if file.stem.removeprefix("mmproj-") in (name, path.stem)]
    own += [file for file in found if _QUANTIZATION_SUFFIX.sub("", file.stem.removeprefix("mmproj-")) == name]
    # Of several the smallest that is not below 8 bits: what people publish are Q8_0, F16, BF16 and F32.
    return min(own, key=lambda file: file.stat().st_size) if own else None


def check_media(path: Path, options: ModelOptions, media: Collection[str]) -> None:
    """Raises ConfigError, before any weight is read, if the model at `path` cannot read a "picture" or "sound"."""
    if not media:
        return
    name, _ = served_names(options)
    mmproj = find_mmproj(path, options)
    if mmproj is None:
        raise ConfigError(
            f"{name} reads text only: no mmproj-*.gguf of its name lies beside it; mend: name it with --mmproj, "
            "or leave --model out for AutoGLM-Phone-Nano"
        )
    if "sound" in media and not GGUFFile.open(mmproj).get("clip.has_audio_encoder", bool, False):
        raise ConfigError(
            f"{name} has no ears, {mmproj.name} holds no audio encoder; mend: give the words as text, "
            "or leave --model out for AutoGLM-Phone-Nano"
        )


def load_model(
    path: Path, options: ModelOptions, report: pull.Progress, meanwhile: Callable[[], object] | None = None
) -> LoadedModel:
    """Read the file, fit the engine to the memory there is, load the weights.

    meanwhile  called while native threads read the weights, when nothing else is left to do. Then weights may lie in
               small pages, which runtime.collapse() gathers when there is time
    Raises FormatError for a file this build cannot run, ConfigError if it does not fit into memory.
    """
    model_id, aliases = served_names(options)
    gguf = GGUFFile.open(path)  # stays open: the runner may keep views of the map
    model_config = read_model_config(gguf)
    mmproj = _open_mmproj(find_mmproj(path, options), model_config)
    logger.info(f"Loading GLM backbone with {parameter_count(model_config.num_parameters)} parameters")
    files = (gguf,) if mmproj is None else (gguf, mmproj)
    in_floats = runs_in_floats(*files)
    parts = {"backbone": float_bytes(gguf) if in_floats else sum(tensor.nbytes for tensor in gguf.tensors.values())}
    available = available_memory_bytes()
    wanted, media = _engine_config(options, model_config), None
    if mmproj is not None:
        from autoglm.cli.media_memory import encoders_by_part, media_memory, with_media_cache, with_room_for_media

        parts |= encoders_by_part(mmproj, in_floats)
        wanted = with_room_for_media(wanted, mmproj, model_config, options.max_sound_s)
        wanted = with_media_cache(wanted, available)
        media = media_memory(mmproj, wanted, available, max_pixels=options.max_pixels, max_sound_s=options.max_sound_s)
    weights_bytes = sum(parts.values())
    engine_config = fit_engine_config(model_config, weights_bytes, wanted, available, media)
    plan = memory_plan(model_config, weights_bytes, engine_config, available, media)
    limits = MediaLimits(max_sound_s=options.max_sound_s)
    for line in memory_table(parts, engine_config, plan, media, limits):
        logger.info(line)
    multimodal = largest_picture = None
    with _Reading() as reading:
        runner = CpuModelRunner(
            gguf,
            engine_config,
            progress=lambda done, total: report("loading weights", done, total),
            in_floats=in_floats,
            in_background=True,
        )
        reading.readers.append(runner.reader)
        from autoglm.chat.template import ChatTemplate
        from autoglm.chat.tokenizer import Tokenizer
        from autoglm.engine.engine import Engine

        tokenizer = Tokenizer.from_gguf(gguf)
        template = ChatTemplate.from_gguf(gguf, _template_source(options.chat_template_file))
        if mmproj is not None and media is not None:
            from autoglm.cli.media_memory import most_pixels
            from autoglm.cli.pairing import check_markers

            check_markers(mmproj, model_config, tokenizer, template)
            largest_picture = most_pixels(mmproj, media, plan)
            multimodal = _load_multimodal(mmproj, runner, tokenizer, report, in_floats)
            reading.readers.append(multimodal.reader)
        engine = Engine(runner, tokenizer, engine_config)
        if meanwhile is not None:
            meanwhile()
    while meanwhile is None and runner.runtime.collapse():
        pass
    return LoadedModel(
        model_id,
        aliases,
        path,
        model_config,
        engine_config,
        plan,
        tokenizer,
        template,
        engine,
        runner.runtime,
        multimodal,
        media,
        largest_picture,
    )


class _Reading:
    """A context in which native threads read weights: all there when it is left, given up if an error leaves it."""

    def __init__(self) -> None:
        self.readers: list[WeightReader] = []

    def __enter__(self) -> _Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                for reader in self.readers:
                    reader.wait()
        finally:
            for reader in self.readers:
                reader.stop()


def _open_mmproj(path: Path | None, backbone: ModelConfig) -> GGUFFile | None:
    if path is None:
        return None
    from autoglm.cli.pairing import open_mmproj

    return open_mmproj(path, backbone)


def _load_multimodal(
    mmproj: GGUFFile, runner: CpuModelRunner, tokenizer: Tokenizer, report: pull.Progress, in_floats: bool
) -> Multimodal:
    from autoglm.model.multimodal import Multimodal
    from autoglm.model.projector import find_media_tokens, has_audio_encoder

    logger.info(f"Loading vision encoder from {mmproj.path}")
    if has_audio_encoder(mmproj):
        logger.info(f"Loading audio encoder from {mmproj.path}")
    multimodal = Multimodal(
        mmproj,
        runner.runtime,
        runner.model_config,
        find_media_tokens(tokenizer.token_id),
        runner.token_embeddings,
        progress=lambda done, total: report("loading encoders", done, total),
        in_floats=in_floats,
        in_background=True,
    )
    logger.info(f"Initializing MMProj projector: {mmproj.path.name}")
    return multimodal


def describe(loaded: LoadedModel) -> str:
    """One line on what was fitted, for the log."""
    config = loaded.engine_config
    limits = f"Context {config.ctx_size} tokens, {config.max_num_seqs} sequences at once"
    machine = f"{config.num_threads} threads, {loaded.runtime.isa} kernels"
    return f"{limits}, {machine}"


def _engine_config(options: ModelOptions, model: ModelConfig) -> EngineConfig:
    config = EngineConfig(
        # As with llama-server, 0 means the model's own context and -1 all cores.
        ctx_size=options.ctx_size or None,
        max_num_seqs=options.parallel,
        max_num_batched_tokens=options.max_batched_tokens,
        max_waiting=options.queue,
        num_kv_blocks=options.kv_blocks,
        cache_type_k=options.cache_type_k,
        cache_type_v=options.cache_type_v,
        num_threads=usable_cores() if options.threads in (None, -1) else options.threads,
        enable_prefix_caching=options.prefix_cache,
        draft_max=options.draft_max,
    )
    if options.kv_memory is None:
        return config
    if options.kv_blocks is not None:
        raise ConfigError("--kv-blocks and --kv-memory both size the KV pool; give one of them")
    block_bytes = config.block_size * kv_token_bytes(model, config)
    blocks = parse_size(options.kv_memory, "--kv-memory") // block_bytes
    if blocks < 1:
        raise ConfigError(f"--kv-memory {options.kv_memory} is less than one block of {size(block_bytes)}")
    return replace(config, num_kv_blocks=blocks)


def parse_size(text: str, flag: str) -> int:
    """Bytes out of 512M, 2G, 1.5GiB: binary units, as memory is sold. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{flag} is {text!r}, expected a size such as 512M or 2G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def _template_source(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read(_MAX_TEMPLATE_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template-file '{path}' cannot be read: {error}") from None
    if len(source) > _MAX_TEMPLATE_BYTES:
        raise ConfigError(f"--chat-template-file '{path}' is over {_MAX_TEMPLATE_BYTES} characters; is it a template?")
    return source
