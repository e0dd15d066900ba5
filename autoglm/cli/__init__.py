"""The autoglm command: its subcommands and flags, exit codes, errors as one line."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

if sys.argv[1:2] == ["serve"]:  # before click, which is forty files
    from autoglm.cli import start_files

    start_files.ask()

import click  # noqa: E402

from autoglm import __version__  # noqa: E402
from autoglm.config import ENGINE_DEFAULTS  # noqa: E402
from autoglm.deploy.preflight import DEFAULT_HOST, DEFAULT_PORT  # noqa: E402
from autoglm.errors import AutoglmError, ConfigError  # noqa: E402

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
_PATH = click.Path(path_type=Path)


class _InOrder(click.Group):
    """Lists its commands as they stand here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


# Flags that serve, chat and bench share; names and short forms are llama-server's.
_model_flag = click.option(
    "-m", "--model", metavar="FILE", help="GGUF file, or a name (autoglm pull --list). Default: nano, which is here."
)
_mmproj_flag = click.option(
    "--mmproj",
    type=_PATH,
    metavar="FILE",
    help="Multimodal projector. Default: the model's own mmproj-*.gguf beside it.",
)
_url_flag = click.option(
    "--url", metavar="URL", help="Talk to a running server instead, e.g. http://127.0.0.1:8000/v1."
)
_server_key_flag = click.option(
    "--api-key", metavar="KEY", envvar="AUTOGLM_API_KEY", show_envvar=True, help="Key of that server."
)
_system_message_flag = click.option("--system", metavar="TEXT", help="System message to begin with.")
_max_tokens_flag = click.option("-n", "--max-tokens", type=click.IntRange(min=1), help="Longest answer.")
_ctx_size_flag = click.option(
    "-c",
    "--ctx-size",
    type=click.IntRange(min=0),
    help="Tokens one conversation may hold. Default, or 0: the model's own.",
)
_threads_flag = click.option(
    "-t", "--threads", type=click.IntRange(min=-1), help="Threads to compute with. Default: all cores."
)
_parallel_flag = click.option(
    "-np",
    "--parallel",
    type=click.IntRange(min=1),
    default=ENGINE_DEFAULTS.max_num_seqs,
    help="Requests that run at once.",
)
_batched_tokens_flag = click.option(
    "-b",
    "--max-batched-tokens",
    type=click.IntRange(min=1),
    help="Tokens one step may process. Default: 512, less where memory is short.",
)
_cache_type_k_flag = click.option(
    "-ctk",
    "--cache-type-k",
    default=ENGINE_DEFAULTS.cache_type_k,
    metavar="f32|f16|i16|q8_0",
    help="How keys are cached.",
)
_cache_type_v_flag = click.option(
    "-ctv",
    "--cache-type-v",
    default=ENGINE_DEFAULTS.cache_type_v,
    metavar="f32|f16|i16|q8_0",
    help="How values are cached.",
)
_kv_blocks_flag = click.option(
    "--kv-blocks", type=click.IntRange(min=1), help="KV pool in blocks of 16 tokens. Default: fitted to the memory."
)
_kv_memory_flag = click.option("--kv-memory", metavar="SIZE", help="KV pool as a size: 512M, 2G.")
_template_file_flag = click.option(
    "--chat-template-file",
    type=_PATH,
    metavar="FILE",
    help="Jinja chat template to use instead of the one in the file.",
)
_log_level_flag = click.option(
    "--log-level", default="info", metavar="debug|info|warning|error", help="What is logged."
)


@click.group("autoglm", cls=_InOrder, invoke_without_command=True, context_settings=_CONTEXT)
@click.pass_context
@click.option("--version", is_flag=True, help="Print the version and the kernels in use.")
def app(context: click.Context, version: bool) -> None:
    """Phone agents on the CPU you have, over the OpenAI API: text, pictures and speech in, thoughts and actions out."""
    if version:
        from autoglm.kernels import Runtime

        print(f"autoglm {__version__} ({Runtime(1).isa} kernels)")
        raise click.exceptions.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise click.exceptions.Exit(2)


@app.command("serve")
@_model_flag
@_mmproj_flag
@click.option("--host", default=DEFAULT_HOST, help="Address to listen on; 0.0.0.0 is every network.")
@click.option(
    "--port", type=click.IntRange(min=0, max=65535), default=DEFAULT_PORT, help="Port to listen on; 0 picks a free one."
)
@click.option("-a", "--alias", metavar="NAME[,NAME]", help="What clients may call the model.")
@click.option(
    "--api-key", metavar="KEY", envvar="AUTOGLM_API_KEY", show_envvar=True, help="Key clients must send. Default: any."
)
@click.option(
    "--allowed-origin", multiple=True, metavar="URL", help="Web page origin that may use the server; repeatable."
)
@click.option(
    "--allowed-host", multiple=True, metavar="NAME", help="Further name clients reach the server by; repeatable."
)
@click.option("--actions", is_flag=True, help="Answer in AutoGLM actions where a request names no format and no tools.")
@click.option(
    "--allow-remote-media",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Host that picture and sound addresses may name; repeatable.",
)
@click.option("--media-path", type=_PATH, metavar="FOLDER", help="Folder that file: addresses may name files in.")
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    help="Pixels a picture keeps where a request names none. Default: the model's.",
)
@_ctx_size_flag
@_threads_flag
@_parallel_flag
@_batched_tokens_flag
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=ENGINE_DEFAULTS.max_waiting,
    help="Requests that may wait; more get 429.",
)
@_template_file_flag
@_cache_type_k_flag
@_cache_type_v_flag
@_kv_blocks_flag
@_kv_memory_flag
@click.option(
    "--draft-max",
    type=click.IntRange(min=0),
    default=ENGINE_DEFAULTS.draft_max,
    help="Most tokens a step drafts by prompt lookup, fewer where they do not pay; 0: none.",
)
@click.option("--no-prefix-cache", is_flag=True, help="Compute every prompt anew.")
@click.option("--skip-self-check", is_flag=True, help="Serve even a model that misses the known tap of its click card.")
@click.option("--no-prebuild", is_flag=True, help="Leave a phone agent's known next turn alone while idle.")
@_log_level_flag
def _serve(
    model: str | None,
    mmproj: Path | None,
    host: str,
    port: int,
    alias: str | None,
    api_key: str | None,
    allowed_origin: tuple[str, ...],
    allowed_host: tuple[str, ...],
    actions: bool,
    allow_remote_media: tuple[str, ...],
    media_path: Path | None,
    max_pixels: int | None,
    ctx_size: int | None,
    threads: int | None,
    parallel: int,
    max_batched_tokens: int | None,
    queue: int,
    chat_template_file: Path | None,
    cache_type_k: str,
    cache_type_v: str,
    kv_blocks: int | None,
    kv_memory: str | None,
    draft_max: int,
    no_prefix_cache: bool,
    skip_self_check: bool,
    no_prebuild: bool,
    log_level: str,
) -> None:
    """Serve a model over the OpenAI API."""
    # What a start makes stays: looking through it for garbage took a fifth of the time modules took to read.
    gc.disable()
    # NumPy multiplies small matrices here; its library's own threads, begun as it is read, only spin beside ours.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from autoglm.cli import console, loading
    from autoglm.cli import serve as serving

    console.set_up_logging(_log_level(log_level))
    options = loading.ModelOptions(
        model=model,
        alias=alias,
        chat_template_file=chat_template_file,
        ctx_size=ctx_size,
        threads=threads,
        parallel=parallel,
        max_batched_tokens=max_batched_tokens,
        queue=queue,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        kv_blocks=kv_blocks,
        kv_memory=kv_memory,
        prefix_cache=not no_prefix_cache,
        draft_max=draft_max,
        mmproj=mmproj,
        takes_media=True,
    )
    serving.serve(
        options,
        serving.ServeOptions(
            host=host,
            port=port,
            api_key=api_key,
            allow_remote_media=allow_remote_media,
            media_path=media_path,
            max_pixels=max_pixels,
            allowed_origins=allowed_origin,
            allowed_hosts=allowed_host,
            actions=actions,
            self_check=not skip_self_check,
            prebuild=not no_prebuild,
        ),
        _import_http_server,
    )


def _import_http_server() -> Any:
    from autoglm.cli import http_server

    return http_server.run


@app.command("chat")
@_model_flag
@_mmproj_flag
@_url_flag
@_server_key_flag
@_system_message_flag
@click.option("--temperature", type=click.FloatRange(min=0, max=2), help="0 = always the likeliest token.")
@_max_tokens_flag
@click.option("--thinking/--no-thinking", default=None, help="Let the model think first, or not.")
@_ctx_size_flag
@_threads_flag
@_template_file_flag
def _chat(
    model: str | None,
    mmproj: Path | None,
    url: str | None,
    api_key: str | None,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
    thinking: bool | None,
    ctx_size: int | None,
    threads: int | None,
    chat_template_file: Path | None,
) -> None:
    """Chat in the terminal."""
    from autoglm.cli import chat as chatting
    from autoglm.cli import console, loading

    console.set_up_logging("warning")
    options = loading.ModelOptions(
        model=model,
        ctx_size=ctx_size,
        threads=threads,
        chat_template_file=chat_template_file,
        mmproj=mmproj,
        takes_media=True,
    )
    chatting.run_chat(
        options,
        chatting.ChatOptions(
            url=url,
            api_key=api_key,
            system=system,
            temperature=temperature,
            max_tokens=max_tokens,
            thinking=thinking,
        ),
    )


@app.command("see")
@click.argument("screen", type=_PATH, metavar="SCREEN", help="Screenshot: PNG, JPEG, WebP or GIF.")
@click.argument("text", required=False, metavar="[TEXT]", help="What to do, in words.")
@click.option("--say", type=_PATH, metavar="FILE", help="What to do, spoken: wav, mp3, flac or ogg, up to 60 s.")
@click.option("-o", "--output", type=_PATH, metavar="FILE", help="PNG to draw. Default: SCREEN-seen.png.")
@_model_flag
@_mmproj_flag
@_url_flag
@_server_key_flag
@_system_message_flag
@_max_tokens_flag
@click.option(
    "--max-pixels", type=click.IntRange(min=1), help="Pixels the screen keeps for the model. Default: the model's."
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@_ctx_size_flag
@_threads_flag
@_template_file_flag
def _see(
    screen: Path,
    text: str | None,
    say: Path | None,
    output: Path | None,
    model: str | None,
    mmproj: Path | None,
    url: str | None,
    api_key: str | None,
    system: str | None,
    max_tokens: int | None,
    max_pixels: int | None,
    as_json: bool,
    ctx_size: int | None,
    threads: int | None,
    chat_template_file: Path | None,
) -> None:
    """Show a model a screen, say what to do, and see what it thinks and where it taps."""
    from autoglm.cli import console, loading
    from autoglm.cli import see as seeing

    console.set_up_logging("warning")
    options = loading.ModelOptions(
        model=model,
        ctx_size=ctx_size,
        threads=threads,
        parallel=1,
        chat_template_file=chat_template_file,
        mmproj=mmproj,
        takes_media=True,
    )
    seeing.run_see(
        options,
        seeing.SeeOptions(
            screen=screen,
            text=text,
            say=say,
            output=output,
            url=url,
            api_key=api_key,
            system=system,
            max_tokens=max_tokens,
            max_pixels=max_pixels,
            as_json=as_json,
        ),
    )


@app.command("info")
@click.argument("file", type=_PATH, metavar="FILE", help="GGUF file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
def _info(file: Path, as_json: bool, tensors: bool) -> None:
    """Show what a GGUF file holds."""
    from autoglm.cli.info import show_info

    show_info(file, as_json=as_json, all_tensors=tensors)


@app.command("bench")
@click.option(
    "-m",
    "--model",
    default="smollm2-135m",
    metavar="FILE",
    help="GGUF file, or a name, which is fetched if it is not here.",
)
@click.option("-p", "--prompt-tokens", type=click.IntRange(min=1), default=512, help="Prompt length for prefill.")
@click.option("-n", "--decode-tokens", type=click.IntRange(min=1), default=64, help="Tokens to decode.")
@click.option("--batches", metavar="N,N,...", help="Sequences decoded at once. Default: 1,2,4,8,16.")
@click.option("-r", "--repeats", type=click.IntRange(min=1), default=3, help="Runs of each measurement.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@click.option("--roofline", is_flag=True, help="Every operation of a step, beside what this machine can do at most.")
@click.option(
    "--depth",
    type=click.IntRange(min=2),
    help="With --roofline: the context of its deep steps. Default: 8192, or what there is.",
)
@_threads_flag
@_cache_type_k_flag
@_cache_type_v_flag
def _bench(
    model: str,
    prompt_tokens: int,
    decode_tokens: int,
    batches: str | None,
    repeats: int,
    as_json: bool,
    roofline: bool,
    depth: int | None,
    threads: int | None,
    cache_type_k: str,
    cache_type_v: str,
) -> None:
    """Measure prefill, decode and batched decode on this machine, or each operation of a step."""
    from autoglm.cli import bench as benching
    from autoglm.cli import console, loading
    from autoglm.cli import roofline as rooflines

    console.set_up_logging("warning")
    options = loading.ModelOptions(model=model, threads=threads, cache_type_k=cache_type_k, cache_type_v=cache_type_v)
    if roofline:
        if batches is not None:
            raise ConfigError("--roofline looks at single steps and takes no --batches; leave one of them out")
        rooflines.run_roofline(
            options, rooflines.RooflineOptions(prompt_tokens, decode_tokens, depth, repeats, as_json=as_json)
        )
        return
    if depth is not None:
        raise ConfigError("--depth is about the steps of --roofline; give both, or leave --depth out")
    listed = ("1,2,4,8,16" if batches is None else batches).split(",")
    sizes = tuple(int(part) for part in listed if part.strip().isdigit())
    if len(sizes) != len(listed):
        raise ConfigError(f"--batches is {batches!r}, expected numbers with commas between, such as 1,4,16")
    benching.run_bench(
        options,
        benching.BenchOptions(
            prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, batches=sizes, repeats=repeats, as_json=as_json
        ),
    )


@app.command("pull")
@click.argument("name", required=False, metavar="NAME", help="A listed name, hf:OWNER/REPO[:FILE] or modelscope:...")
@click.option("--list", "list_names", is_flag=True, help="List the models that have a name.")
def _pull(name: str | None, list_names: bool) -> None:
    """Fetch a model by name and keep it in the cache folder."""
    from autoglm.cli import console
    from autoglm.cli import pull as pulling

    console.set_up_logging("info")
    if list_names:
        pulling.list_models()
        return
    if name is None:
        raise ConfigError("name the model to pull; autoglm pull --list shows the names")
    pulling.pull_model(name)


@app.command("pack")
@click.option(
    "--vision",
    type=_PATH,
    required=True,
    metavar="FILE",
    help="Image encoder: a PyTorch state dict (.pt, .bin) or safetensors.",
)
@click.option("--audio", type=_PATH, metavar="FILE", help="Audio encoder. Default: a model without.")
@click.option("--projectors", type=_PATH, metavar="FILE", help="Projectors and fusion, if in a file of their own.")
@click.option(
    "--width", type=click.IntRange(min=32), help="Make new, untrained projectors for a decoder of this width."
)
@click.option("--name", default="AutoGLM-Phone", help="Name of the model, written into the file.")
@click.option("-o", "--output", type=_PATH, metavar="FILE", help="Default: mmproj-NAME-Q8_0.gguf.")
def _pack(
    vision: Path, audio: Path | None, projectors: Path | None, width: int | None, name: str, output: Path | None
) -> None:
    """Build an mmproj GGUF from encoder weights in files of their own."""
    _need_extra("train")
    from autoglm.cli import console
    from autoglm.cli import pack as packing

    console.set_up_logging("info")
    packing.pack_encoders(packing.PackOptions(vision, audio, projectors, width, name, output))


@app.command("convert")
@click.argument(
    "folder", type=_PATH, metavar="HF_FOLDER", help="Checkpoint: config.json, *.safetensors, tokenizer.json."
)
@click.option("--out", type=_PATH, default=Path(), metavar="FOLDER", help="Where to write. Default: here.")
@click.option("--type", "file_type", default="q4_k_m", metavar="q4_k_m|q8_0|f16|f32", help="Weights of the text model.")
@click.option("--mmproj-type", default="q8_0", metavar="q8_0|f16|f32", help="Weights of the image tower.")
@click.option("--name", metavar="NAME", help="Name of the model and its files. Default: the folder's.")
@click.option(
    "-t", "--threads", type=click.IntRange(min=1, max=1024), help="Threads that quantize. Default: all cores."
)
def _convert(folder: Path, out: Path, file_type: str, mmproj_type: str, name: str | None, threads: int | None) -> None:
    """Convert a GLM-4.1V checkpoint (Glm4vForConditionalGeneration) to NAME-TYPE.gguf and mmproj-NAME-TYPE.gguf.

    Fetch it first: hf download OWNER/REPO --local-dir HF_FOLDER. An interrupted run goes on where it stopped when
    the same command is given again; at the end both files are read back and compared with the checkpoint.
    """
    from autoglm.cli import console
    from autoglm.cli import convert as converting

    console.set_up_logging("info")
    converting.convert_checkpoint(converting.ConvertOptions(folder, out, file_type, mmproj_type, name, threads))


@app.command("train")
@click.argument(
    "preset", required=False, metavar="[PRESET]", help="The model to train, such as nano; --list shows them."
)
@click.option("--stage", multiple=True, metavar="NAME", help="Only this stage; repeatable. Default: all.")
@click.option("--resume", is_flag=True, help="Go on with stages that were begun.")
@click.option("--run-dir", type=_PATH, metavar="FOLDER", help="Checkpoints, metrics and plots. Default: runs/PRESET.")
@click.option(
    "--minutes", type=click.FloatRange(min=0), help="Stop after this time with a checkpoint; --resume goes on."
)
@click.option("--smoke", is_flag=True, help="Walk through all stages with a tiny model, in minutes.")
@click.option("--list", "list_all", is_flag=True, help="List presets with their sizes, and the stages.")
def _train(
    preset: str | None,
    stage: tuple[str, ...],
    resume: bool,
    run_dir: Path | None,
    minutes: float | None,
    smoke: bool,
    list_all: bool,
) -> int:
    """Train, compress and export a model from nothing. Several GPUs: torchrun -m autoglm train ..."""
    _need_extra("train")
    from autoglm.cli import console
    from autoglm.cli import train as training

    console.set_up_logging("info")
    if list_all:
        training.list_presets()
        return 0
    return training.run_training(
        training.TrainOptions(preset=preset, stages=stage, resume=resume, run_dir=run_dir, minutes=minutes, smoke=smoke)
    )


@app.command("eval")
@click.argument(
    "models",
    nargs=-1,
    metavar="[NAME=]PATH|URL...",
    help="Text GGUF (its mmproj beside it), checkpoint, a finished stage's folder, or a server's URL.",
)
@click.option("--mmproj", type=_PATH, metavar="FILE", help="The GGUF's mmproj. Default: the mmproj-*.gguf beside it.")
@click.option("--api-key", metavar="KEY", envvar="AUTOGLM_API_KEY", show_envvar=True, help="Key of the servers.")
@click.option("-n", "--examples", type=click.IntRange(min=1), help="At most this many of each task. Default: all.")
@click.option("--task", multiple=True, metavar="NAME", help="Only this task; repeatable.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Which examples of the held-out world.")
@click.option("--blank", is_flag=True, help="Show grey screens: what is left was heard.")
@click.option("--compare", is_flag=True, help="Count the answers that equal the first model's, and list the others.")
@click.option("--card", is_flag=True, help="Write a click card beside the model: its taps against a float reference's.")
@click.option(
    "--reference",
    type=_PATH,
    metavar="FILE",
    help="With --card: the float text GGUF. Default: the model's own weights in F32.",
)
@click.option("--every-type", is_flag=True, help="With --card: measure the weights in every other type, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table for a model card.")
def _eval(
    models: tuple[str, ...],
    mmproj: Path | None,
    api_key: str | None,
    examples: int | None,
    task: tuple[str, ...],
    seed: int,
    blank: bool,
    compare: bool,
    card: bool,
    reference: Path | None,
    every_type: bool,
    as_json: bool,
    as_markdown: bool,
) -> None:
    """Measure models on the held-out set, as a table with 95 % intervals."""
    _need_extra("train")
    from autoglm.cli import console
    from autoglm.cli import evaluate as evaluating

    console.set_up_logging("info")
    evaluating.run_evaluation(
        evaluating.EvalOptions(
            models=models,
            mmproj=mmproj,
            api_key=api_key,
            examples=examples,
            tasks=task,
            seed=seed,
            blank=blank,
            compare=compare,
            card=card,
            reference=reference,
            every_type=every_type,
            as_json=as_json,
            as_markdown=as_markdown,
        )
    )


@app.group("data", no_args_is_help=True)
def data_app() -> None:
    """Look at the generated world models learn from."""


@data_app.command("preview")
@click.option("--out", "folder", type=_PATH, default=Path("preview"), metavar="FOLDER", help="Where to write.")
@click.option("--screens", type=click.IntRange(min=0, max=600), default=12, help="Screens on the contact sheet.")
@click.option("--sounds", type=click.IntRange(min=0, max=600), default=6, help="Spoken commands.")
@click.option("--split", default="train", metavar="train|test", help="test shows what training never sees.")
@click.option("--language", metavar="zh|en", help="Default: both.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Another number, other screens and sounds.")
def _data_preview(folder: Path, screens: int, sounds: int, split: str, language: str | None, seed: int) -> None:
    """Write a contact sheet of screens with their boxes, and a few spoken commands."""
    _need_extra("train")
    from autoglm.cli import console
    from autoglm.cli import data as previewing

    console.set_up_logging("info")
    previewing.preview(
        previewing.PreviewOptions(
            folder=folder, screens=screens, sounds=sounds, split=split, language=language, seed=seed
        )
    )


# What the extra brings that nothing else does; the first one missing is named.
_EXTRA_MODULES = {"train": ("torch", "safetensors", "matplotlib", "PIL", "resvg_py")}


def _need_extra(extra: str) -> None:
    missing = [name for name in _EXTRA_MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"this command needs the extra '{extra}' ({missing[0]} is not installed). "
            f"Mend: {sys.executable} -m pip install 'autoglm[{extra}]', or in the source folder "
            f"{sys.executable} -m pip install '.[{extra}]'"
        )


def _log_level(text: str) -> str:
    from autoglm.cli.console import LOG_LEVELS

    if text.lower() not in LOG_LEVELS:
        raise ConfigError(f"--log-level is {text!r}, expected one of {', '.join(LOG_LEVELS)}")
    return text.lower()


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; every failure is one line on standard error and the exit code of its class."""
    is_debugging = os.environ.get("AUTOGLM_DEBUG") == "1"
    try:
        result: Any = app.main(args=arguments, prog_name="autoglm", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away (autoglm info x | head); nothing is left to say to anybody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if is_debugging:
            raise
        return _report(error)
    finally:
        gc.enable()


def _report(error: Exception) -> int:
    if isinstance(error, AutoglmError):
        from autoglm.cli.console import printable

        # Names out of a model file may stand in the message; they neither break the line nor steer the terminal.
        print(f"ERROR: {printable(str(error), 2000)}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, click.ClickException):  # a wrong flag or argument
        message = error.format_message().rstrip(".")
        print(f"ERROR: {message}; see autoglm --help, or autoglm COMMAND --help", file=sys.stderr)
        return error.exit_code
    if isinstance(error, ImportError) and (error.name or "").endswith("_native"):
        print(
            f"ERROR: the native part of autoglm is not built for {sys.executable}; mend: sh run_autoglm_server.sh, "
            f"or {sys.executable} -m pip install . in the source folder",
            file=sys.stderr,
        )
        return 1
    if isinstance(error, MemoryError):
        print("ERROR: memory ran out; mend: close other programs, or take a smaller model or context", file=sys.stderr)
        return 1
    # The message of an unforeseen error may quote what a user wrote, so only its kind and place are shown.
    print(
        f"ERROR: autoglm has a bug here: {type(error).__name__} in {_place(error)}; please report this line "
        "with what AUTOGLM_DEBUG=1 prints for the same command",
        file=sys.stderr,
    )
    return 1


def _place(error: Exception) -> str:
    trace = error.__traceback__
    place = "an unknown place"
    while trace is not None:
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
