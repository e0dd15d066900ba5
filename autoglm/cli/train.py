"""autoglm train: every stage from nothing to the exported files, each resumable; one process or torchrun's many."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autoglm.cli.console import CountBar, size
from autoglm.errors import ConfigError, FormatError
from autoglm.train.checkpoint import read_done
from autoglm.train.distributed import current_world, join_world, leave_world, pick_device, wait_for_all
from autoglm.train.export import MODEL_NAME, export_pair, export_text
from autoglm.train.fusion_report import make_fusion_report
from autoglm.train.inference import load_phone
from autoglm.train.model import PRESETS
from autoglm.train.model_card import write_card
from autoglm.train.report import EXPORT_FOLDER, REPORT_FOLDER, make_report
from autoglm.train.run_context import SMOKE, TRAINABLE, RunContext
from autoglm.train.sizes import parameter_counts
from autoglm.train.stages import STAGES
from autoglm.train.trainer import Outcome, train
from autoglm.train.world.assets import missing_assets, require_assets
from autoglm.train.world.labels import LANGUAGES
from autoglm.train.world.speech import missing_engines, voices
from autoglm.train.world.split import SPLITS

logger = logging.getLogger("autoglm.cli")
EXPORTED = "qat"  # the stage whose weights are shipped
REPORT = "report"  # not trained: the last step of the road, after the export
_RUN_FILE = "run.json"


@dataclass(frozen=True)
class TrainOptions:
    """The flags of autoglm train; None = the default."""

    preset: str | None = None
    stages: tuple[str, ...] = ()
    resume: bool = False
    run_dir: Path | None = None
    minutes: float | None = None
    smoke: bool = False


def run_training(options: TrainOptions) -> int:
    """Train what is asked for; returns the exit code, 128 + signal if a signal stopped it.

    Raises ConfigError for flags that fit no preset, stage or run folder, and what train raises.
    """
    preset = _preset(options)
    names = _chosen_stages(options.stages)
    _check_world(preset)
    join_world()
    try:
        with _run_folder(options, preset) as run_dir:
            return _train_stages(names, preset, run_dir, options)
    finally:
        leave_world()


def list_presets() -> None:
    """Print the presets with their exact parameter counts, and the stages in their order."""
    console = Console()
    # No frame: the counts of phone-9b fill 80 columns without one.
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("preset")
    parts = ("all", "text", "vision", "audio", "fusion")
    for part in parts:
        table.add_column(part, justify="right", no_wrap=True)
    for name, config in PRESETS.items():
        counts = parameter_counts(config)
        table.add_row(name, *(f"{counts[part]:,}" for part in parts))
    console.print(table, highlight=False)
    console.print("\nTrain: autoglm train nano, autoglm train --smoke", highlight=False)
    console.print(f"Stages, in this order: {', '.join([*STAGES, REPORT])}", highlight=False)


def _train_stages(names: Sequence[str], preset: str, run_dir: Path, options: TrainOptions) -> int:
    is_first = current_world().rank == 0
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    context = RunContext(preset=preset, run_dir=run_dir, device=pick_device())
    if is_first:
        logger.info(f"Training preset {preset} in '{run_dir}' on {_machine(context)}: {', '.join(names) or REPORT}")
    for number, name in enumerate(names, start=1):
        place = f"[{number}/{len(names)}] {name}"
        if read_done(run_dir / name) is not None:
            if is_first:
                logger.info(f"{place}: finished before")
            continue
        minutes = None if deadline is None else max(0.0, (deadline - time.monotonic()) / 60)
        outcome = train(STAGES[name](context), run_dir, resume=options.resume, minutes=minutes)
        if is_first:
            logger.info(f"{place}: {_said(outcome)}")
        if not outcome.is_finished:
            if is_first:
                logger.info(f"Stopped. Go on with: {_command(options, preset)}")
            return 0 if outcome.signal is None else 128 + outcome.signal
    if is_first:
        is_exported = _export(run_dir)
        # Asked for by name it measures anew what is finished; at a run's end only what has changed since the last one.
        if REPORT in options.stages or (is_exported and not options.stages):
            _report(context, reuse=options.resume or not options.stages)
        Console().print(_summary(names, run_dir))
    return 0


def _export(run_dir: Path) -> bool:
    """Write the GGUF pair, and the text file for tools that insist on every tensor, once the last stage is done."""
    if EXPORTED not in STAGES or read_done(run_dir / EXPORTED) is None:
        return False
    folder = run_dir / EXPORT_FOLDER
    folder.mkdir(exist_ok=True)
    phone = load_phone(run_dir / EXPORTED)
    state, config, tokenizer = phone.model.state_dict(), phone.model.config, phone.tokenizer.gguf_metadata()
    pair = export_pair(state, config, tokenizer, folder)
    compatible = folder / f"{MODEL_NAME}-compatible-Q4_K_M.gguf"
    export_text(compatible, state, config, tokenizer, compatible=True)
    logger.info(f"Exported '{pair.text}' and '{pair.mmproj}', {size(pair.nbytes)} together; also '{compatible.name}'")
    return True


def _report(context: RunContext, *, reuse: bool) -> None:
    """Ask every finished stage the held-out set, compare the fusions, write the model card."""
    with CountBar("asking the held-out set") as bar:
        report = make_report(context, reuse=reuse, progress=bar.report)
    for name, reason in report.missing.items():
        logger.warning(f"report: no column {name}, {reason}")
    with CountBar("asking both fusions") as bar:
        make_fusion_report(context, reuse=reuse, progress=bar.report)
    logger.info(f"Measured in '{context.run_dir / REPORT_FOLDER}', model card '{write_card(context)}'")


def _preset(options: TrainOptions) -> str:
    if options.smoke:
        if options.preset not in (None, SMOKE):
            raise ConfigError(f"--smoke trains its own tiny model; leave the preset {options.preset!r} out")
        return SMOKE
    if options.preset is None:
        raise ConfigError(f"name the preset to train: autoglm train {TRAINABLE[0]}; autoglm train --list shows them")
    if options.preset not in TRAINABLE:
        raise ConfigError(f"preset {options.preset!r} cannot be trained here, expected {' or '.join(TRAINABLE)}")
    return options.preset


def _check_world(preset: str) -> None:
    """Everything the stages draw and say must be here before the first one starts. Raises ConfigError.

    A smoke run takes what there is: stand-ins for fonts and icons, one speech engine.
    """
    if preset != SMOKE:
        require_assets()
    for language in LANGUAGES:
        for split in SPLITS:
            voices(language, split)
    lacking = [*missing_assets(), *missing_engines()]
    if lacking and current_world().rank == 0:
        logger.warning(
            f"Not installed here, so the model sees or hears less: {', '.join(lacking)}. "
            "Mend: sh scripts/install_train_assets.sh"
        )


def _chosen_stages(wanted: Sequence[str]) -> list[str]:
    """The stages to train in the order they build on each other; all without a wish. The report is none of them."""
    known = [*STAGES, REPORT]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"--stage {unknown[0]!r} is no stage; the stages are {', '.join(known)}")
    return [name for name in STAGES if not wanted or name in wanted]


@contextlib.contextmanager
def _run_folder(options: TrainOptions, preset: str) -> Iterator[Path]:
    """The run's folder, marked with its preset; a smoke run without --run-dir gets one that vanishes."""
    if options.smoke and options.run_dir is None and current_world().size == 1:
        with tempfile.TemporaryDirectory(prefix="autoglm-smoke-") as folder:
            yield Path(folder)
        logger.info("Its files are removed again; --run-dir FOLDER keeps them")
        return
    run_dir = options.run_dir or Path("runs") / preset
    marker = run_dir / _RUN_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if marker.exists():
            found = json.loads(marker.read_text(encoding="utf-8"))["preset"]
            if found != preset:
                raise ConfigError(
                    f"--run-dir '{run_dir}' holds a run of preset '{found}', this is '{preset}'. "
                    "Mend: give this run another folder"
                )
        wait_for_all()
        if current_world().rank == 0:
            marker.write_text(json.dumps({"preset": preset}) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--run-dir '{run_dir}' is no folder to write to: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise FormatError(f"'{marker}' is damaged. Mend: remove it; finished stages are not touched") from None
    yield run_dir


def _machine(context: RunContext) -> str:
    processes = current_world().size
    device = "the GPU" if context.device.type == "cuda" else "the CPU"
    return device if processes == 1 else f"{processes} processes, each on {device}"


def _said(outcome: Outcome) -> str:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in outcome.metrics.items())
    state = "finished" if outcome.is_finished else "stopped"
    return f"{state} at step {outcome.step} after {outcome.seconds / 60:.1f} min" + (f" ({metrics})" if metrics else "")


def _command(options: TrainOptions, preset: str) -> str:
    parts = ["autoglm train", "--smoke" if options.smoke else preset]
    parts += [f"--stage {name}" for name in options.stages]
    parts += ["" if options.run_dir is None else f"--run-dir '{options.run_dir}'", "--resume"]
    return " ".join(part for part in parts if part)


def _summary(names: Sequence[str], run_dir: Path) -> Table:
    table = Table(title=f"Trained in {run_dir}", title_justify="left")
    for column in ("stage", "steps", "minutes", "metrics"):
        table.add_column(column, justify="right" if column in ("steps", "minutes") else "left", overflow="fold")
    for name in names:
        done = read_done(run_dir / name)
        if done is not None:
            metrics = "  ".join(f"{key} {value:.4g}" for key, value in done.metrics.items())
            table.add_row(name, str(done.step), f"{done.seconds / 60:.1f}", metrics)
    return table
