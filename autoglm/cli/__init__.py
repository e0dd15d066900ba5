"""The autoglm command: its subcommands and flags, exit codes, errors as one line."""

from __future__ import annotations

import copy
import gc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from autoglm import __version__
from autoglm.config import EngineConfig
from autoglm.deploy.preflight import DEFAULT_HOST, DEFAULT_PORT
from autoglm.errors import AutoglmError, ConfigError

app = typer.Typer(
    name="autoglm",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

# Flags that serve, chat and bench share; names and short forms are llama-server's.
Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="FILE",
        help="GGUF file, or a name (autoglm pull --list). Default: nano, which is here.",
    ),
]
Mmproj = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Multimodal projector. Default: the model's own mmproj-*.gguf beside it."),
]
Url = Annotated[
    str | None, typer.Option(metavar="URL", help="Talk to a running server instead, e.g. http://127.0.0.1:8000/v1.")
]
ServerKey = Annotated[
    str | None, typer.Option(metavar="KEY", envvar="AUTOGLM_API_KEY", show_envvar=True, help="Key of that server.")
]
SystemMessage = Annotated[str | None, typer.Option(metavar="TEXT", help="System message to begin with.")]
MaxTokens = Annotated[int | None, typer.Option("-n", "--max-tokens", min=1, help="Longest answer.")]
CtxSize = Annotated[
    int | None,
    typer.Option("-c", "--ctx-size", min=0, help="Tokens one conversation may hold. Default, or 0: the model's own."),
]
Threads = Annotated[
    int | None, typer.Option("-t", "--threads", min=-1, help="Threads to compute with. Default: all cores.")
]
Parallel = Annotated[int, typer.Option("-np", "--parallel", min=1, help="Requests that run at once.")]
BatchedTokens = Annotated[
    int | None,
    typer.Option(
        "-b",
        "--max-batched-tokens",
        min=1,
        help="Tokens one step may process. Default: 512, less where memory is short.",
    ),
]
CacheTypeK = Annotated[
    str, typer.Option("-ctk", "--cache-type-k", metavar="f32|f16|i16|q8_0", help="How keys are cached.")
]
CacheTypeV = Annotated[
    str, typer.Option("-ctv", "--cache-type-v", metavar="f32|f16|i16|q8_0", help="How values are cached.")
]
KvBlocks = Annotated[
    int | None, typer.Option(min=1, help="KV pool in blocks of 16 tokens. Default: fitted to the memory.")
]
KvMemory = Annotated[str | None, typer.Option(metavar="SIZE", help="KV pool as a size: 512M, 2G.")]
TemplateFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Jinja chat template to use instead of the one in the file.")
]
LogLevel = Annotated[str, typer.Option(metavar="debug|info|warning|error", help="What is logged.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and the kernels in use.")] = False,
) -> None:
    """Phone agents on the CPU you have, over the OpenAI API: text, pictures and speech in, thoughts and actions out."""
    if version:
        from autoglm.kernels import Runtime

        print(f"autoglm {__version__} ({Runtime(1).isa} kernels)")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command("serve")
def _serve(
    model: Model = None,
    mmproj: Mmproj = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = DEFAULT_HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = DEFAULT_PORT,
    alias: Annotated[
        str | None, typer.Option("-a", "--alias", metavar="NAME[,NAME]", help="What clients may call the model.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", envvar="AUTOGLM_API_KEY", show_envvar=True, help="Key clients must send. Default: any."
        ),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Web page origin that may use the server; repeatable.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Further name clients reach the server by; repeatable.")
    ] = None,
    actions: Annotated[
        bool, typer.Option("--actions", help="Answer in AutoGLM actions where a request names no format and no tools.")
    ] = False,
    allow_remote_media: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST[:PORT]", help="Host that picture and sound addresses may name; repeatable."),
    ] = None,
    media_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder that file: addresses may name files in.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Pixels a picture keeps where a request names none. Default: the model's.")
    ] = None,
    ctx_size: CtxSize = None,
    threads: Threads = None,
    parallel: Parallel = EngineConfig.max_num_seqs,
    max_batched_tokens: BatchedTokens = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get 429.")] = EngineConfig.max_waiting,
    chat_template_file: TemplateFile = None,
    cache_type_k: CacheTypeK = EngineConfig.cache_type_k,
    cache_type_v: CacheTypeV = EngineConfig.cache_type_v,
    kv_blocks: KvBlocks = None,
    kv_memory: KvMemory = None,
    draft_max: Annotated[
        int,
        typer.Option(min=0, help="Most tokens a step drafts by prompt lookup, fewer where they do not pay; 0: none."),
    ] = EngineConfig.draft_max,
    no_prefix_cache: Annotated[bool, typer.Option("--no-prefix-cache", help="Compute every prompt anew.")] = False,
    skip_self_check: Annotated[
        bool, typer.Option("--skip-self-check", help="Serve even a model that misses the known tap of its click card.")
    ] = False,
    no_prebuild: Annotated[
        bool, typer.Option("--no-prebuild", help="Leave a phone agent's known next turn alone while idle.")
    ] = False,
    log_level: LogLevel = "info",
) -> None:
    """Serve a model over the OpenAI API."""
    # What a start makes stays: looking through it for garbage took a fifth of the time modules took to read.
    gc.disable()
    # NumPy multiplies small matrices here; its library's own threads, begun as it is read, only spin beside ours.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from autoglm.cli import start_files

    start_files.ask()
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
            allow_remote_media=tuple(allow_remote_media or ()),
            media_path=media_path,
            max_pixels=max_pixels,
            allowed_origins=tuple(allowed_origin or ()),
            allowed_hosts=tuple(allowed_host or ()),
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
def _chat(
    model: Model = None,
    mmproj: Mmproj = None,
    url: Url = None,
    api_key: ServerKey = None,
    system: SystemMessage = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 = always the likeliest token.")] = None,
    max_tokens: MaxTokens = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Let the model think first, or not.")
    ] = None,
    ctx_size: CtxSize = None,
    threads: Threads = None,
    chat_template_file: TemplateFile = None,
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
def _see(
    screen: Annotated[Path, typer.Argument(metavar="SCREEN", help="Screenshot: PNG, JPEG, WebP or GIF.")],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What to do, in words.")] = None,
    say: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to do, spoken: wav, mp3, flac or ogg, up to 60 s.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="PNG to draw. Default: SCREEN-seen.png.")
    ] = None,
    model: Model = None,
    mmproj: Mmproj = None,
    url: Url = None,
    api_key: ServerKey = None,
    system: SystemMessage = None,
    max_tokens: MaxTokens = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Pixels the screen keeps for the model. Default: the model's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    ctx_size: CtxSize = None,
    threads: Threads = None,
    chat_template_file: TemplateFile = None,
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
def _info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Show what a GGUF file holds."""
    from autoglm.cli.info import show_info

    show_info(file, as_json=as_json, all_tensors=tensors)


@app.command("bench")
def _bench(
    model: Annotated[
        str,
        typer.Option("-m", "--model", metavar="FILE", help="GGUF file, or a name, which is fetched if it is not here."),
    ] = "smollm2-135m",
    prompt_tokens: Annotated[
        int, typer.Option("-p", "--prompt-tokens", min=1, help="Prompt length for prefill.")
    ] = 512,
    decode_tokens: Annotated[int, typer.Option("-n", "--decode-tokens", min=1, help="Tokens to decode.")] = 64,
    batches: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Sequences decoded at once. Default: 1,2,4,8,16.")
    ] = None,
    repeats: Annotated[int, typer.Option("-r", "--repeats", min=1, help="Runs of each measurement.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Every operation of a step, beside what this machine can do at most.")
    ] = False,
    depth: Annotated[
        int | None,
        typer.Option(min=2, help="With --roofline: the context of its deep steps. Default: 8192, or what there is."),
    ] = None,
    threads: Threads = None,
    cache_type_k: CacheTypeK = EngineConfig.cache_type_k,
    cache_type_v: CacheTypeV = EngineConfig.cache_type_v,
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
def _pull(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A listed name, hf:OWNER/REPO[:FILE] or modelscope:...")
    ] = None,
    list_names: Annotated[bool, typer.Option("--list", help="List the models that have a name.")] = False,
) -> None:
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
def _pack(
    vision: Annotated[
        Path, typer.Option(metavar="FILE", help="Image encoder: a PyTorch state dict (.pt, .bin) or safetensors.")
    ],
    audio: Annotated[Path | None, typer.Option(metavar="FILE", help="Audio encoder. Default: a model without.")] = None,
    projectors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Projectors and fusion, if in a file of their own.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=32, help="Make new, untrained projectors for a decoder of this width.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the model, written into the file.")] = "AutoGLM-Phone",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Default: mmproj-NAME-Q8_0.gguf.")
    ] = None,
) -> None:
    """Build an mmproj GGUF from encoder weights in files of their own."""
    _need_extra("train")
    from autoglm.cli import console
    from autoglm.cli import pack as packing

    console.set_up_logging("info")
    packing.pack_encoders(packing.PackOptions(vision, audio, projectors, width, name, output))


@app.command("convert")
def _convert(
    folder: Annotated[
        Path, typer.Argument(metavar="HF_FOLDER", help="Checkpoint: config.json, *.safetensors, tokenizer.json.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where to write. Default: here.")] = Path(),
    file_type: Annotated[
        str, typer.Option("--type", metavar="q4_k_m|q8_0|f16|f32", help="Weights of the text model.")
    ] = "q4_k_m",
    mmproj_type: Annotated[
        str, typer.Option("--mmproj-type", metavar="q8_0|f16|f32", help="Weights of the image tower.")
    ] = "q8_0",
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model and its files. Default: the folder's.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, max=1024, help="Threads that quantize. Default: all cores.")
    ] = None,
) -> None:
    """Convert a GLM-4.1V checkpoint (Glm4vForConditionalGeneration) to NAME-TYPE.gguf and mmproj-NAME-TYPE.gguf.

    Fetch it first: hf download OWNER/REPO --local-dir HF_FOLDER. An interrupted run goes on where it stopped when
    the same command is given again; at the end both files are read back and compared with the checkpoint.
    """
    from autoglm.cli import console
    from autoglm.cli import convert as converting

    console.set_up_logging("info")
    converting.convert_checkpoint(converting.ConvertOptions(folder, out, file_type, mmproj_type, name, threads))


@app.command("train")
def _train(
    preset: Annotated[
        str | None, typer.Argument(metavar="[PRESET]", help="The model to train, such as nano; --list shows them.")
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option("--stage", metavar="NAME", help="Only this stage; repeatable. Default: all.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with stages that were begun.")] = False,
    run_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Checkpoints, metrics and plots. Default: runs/PRESET.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after this time with a checkpoint; --resume goes on.")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Walk through all stages with a tiny model, in minutes.")
    ] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List presets with their sizes, and the stages.")] = False,
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
        training.TrainOptions(
            preset=preset, stages=tuple(stage or ()), resume=resume, run_dir=run_dir, minutes=minutes, smoke=smoke
        )
    )


@app.command("eval")
def _eval(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]PATH|URL...",
            help="Text GGUF (its mmproj beside it), checkpoint, a finished stage's folder, or a server's URL.",
        ),
    ] = None,
    mmproj: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The GGUF's mmproj. Default: the mmproj-*.gguf beside it.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="AUTOGLM_API_KEY", show_envvar=True, help="Key of the servers.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option("-n", "--examples", min=1, help="At most this many of each task. Default: all.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME", help="Only this task; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which examples of the held-out world.")] = 0,
    blank: Annotated[bool, typer.Option("--blank", help="Show grey screens: what is left was heard.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Count the answers that equal the first model's, and list the others.")
    ] = False,
    card: Annotated[
        bool, typer.Option("--card", help="Write a click card beside the model: its taps against a float reference's.")
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --card: the float text GGUF. Default: the model's own weights in F32."),
    ] = None,
    every_type: Annotated[
        bool, typer.Option("--every-type", help="With --card: measure the weights in every other type, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table for a model card.")] = False,
) -> None:
    """Measure models on the held-out set, as a table with 95 % intervals."""
    _need_extra("train")
    from autoglm.cli import console
    from autoglm.cli import evaluate as evaluating

    console.set_up_logging("info")
    evaluating.run_evaluation(
        evaluating.EvalOptions(
            models=tuple(models or ()),
            mmproj=mmproj,
            api_key=api_key,
            examples=examples,
            tasks=tuple(task or ()),
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


data_app = typer.Typer(no_args_is_help=True, help="Look at the generated world models learn from.")
app.add_typer(data_app, name="data")


@data_app.command("preview")
def _data_preview(
    folder: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where to write.")] = Path("preview"),
    screens: Annotated[int, typer.Option(min=0, max=600, help="Screens on the contact sheet.")] = 12,
    sounds: Annotated[int, typer.Option(min=0, max=600, help="Spoken commands.")] = 6,
    split: Annotated[str, typer.Option(metavar="train|test", help="test shows what training never sees.")] = "train",
    language: Annotated[str | None, typer.Option(metavar="zh|en", help="Default: both.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another number, other screens and sounds.")] = 0,
) -> None:
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


def _command(arguments: list[str]) -> Any:
    """What typer makes of the app; if a subcommand comes first of that one alone, since to describe all takes 10 ms."""
    asked = [command for command in app.registered_commands if command.name in arguments[:1]]
    if not asked:
        return typer.main.get_command(app)
    one = copy.copy(app)
    one.registered_commands, one.registered_groups = asked, []
    return typer.main.get_command(one)


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; every failure is one line on standard error and the exit code of its class."""
    is_debugging = os.environ.get("AUTOGLM_DEBUG") == "1"
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        result: Any = _command(arguments).main(args=arguments, prog_name="autoglm", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
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
    if isinstance(error, typer.exceptions.TyperException):  # a wrong flag or argument
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
