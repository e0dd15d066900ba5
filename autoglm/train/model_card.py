"""MODEL_CARD.md of a run: what the model is, learned from, reached and missed, all read from configs and reports.

No number of this file's text is written by hand: sizes come from the files and configs, shares from report.json and
fusion.json, steps and minutes from the stages' markers, licences from the tables of the world.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path

from autoglm.formats.gguf import GGUFFile
from autoglm.train.checkpoint import read_done
from autoglm.train.checkpoint_gguf import read_pair
from autoglm.train.dataset import SNR_RANGE
from autoglm.train.evaluate import ROWS
from autoglm.train.export import MODEL_NAME, Exported
from autoglm.train.fusion_report import CONDITIONS, FUSION_FILE, PLOT_FILE, FusionReport, read_fusion
from autoglm.train.fusion_report import STAGES as FUSION_STAGES
from autoglm.train.model import PhoneConfig
from autoglm.train.report import (
    EXPORT_FOLDER,
    REPORT_FILE,
    REPORT_FOLDER,
    Report,
    read_report,
    render_table,
    sha256_of,
    shipped_pair,
    write_text,
)
from autoglm.train.run_context import SMOKE, RunContext
from autoglm.train.sizes import parameter_counts
from autoglm.train.stages import STAGES
from autoglm.train.targets import NOT_MEASURED, Target, compared, find_targets
from autoglm.train.world import assets, voices
from autoglm.train.world.labels import LABELS, LANGUAGES, Language
from autoglm.train.world.phrases import COMMANDS, QUESTIONS, phrasings
from autoglm.train.world.speech import missing_engines
from autoglm.train.world.split import SPLITS, Split

CARD_FILE = "MODEL_CARD.md"
_LANGUAGE_NAMES: dict[Language, str] = {"zh": "Chinese", "en": "English"}
# What was gained or lost from one column to another.
_STEPS = (
    ("what distilling brought", "student", "distilled"),
    ("what pruning cost after healing", "distilled", "pruned"),
    ("what rounding alone costs", "pruned", "PTQ"),
    ("what training on the grids gives back", "PTQ", "QAT"),
)


def write_card(context: RunContext) -> Path:
    """Render the card from the run's folder; it lies with the report, and with the exported pair where there is one.

    Returns the path of the latter or else the former. Raises FormatError when a report is missing or damaged.
    """
    folder = context.run_dir / REPORT_FOLDER
    text = render_card(context, read_report(folder / REPORT_FILE), read_fusion(folder / FUSION_FILE))
    write_text(folder / CARD_FILE, text)
    if shipped_pair(context.run_dir) is None:
        return folder / CARD_FILE
    card = context.run_dir / EXPORT_FOLDER / CARD_FILE
    write_text(card, text)
    if (folder / PLOT_FILE).exists():
        shutil.copyfile(folder / PLOT_FILE, card.with_name(PLOT_FILE))
    return card


def render_card(context: RunContext, report: Report, fusion: FusionReport) -> str:
    """The whole card as Markdown."""
    pair = shipped_pair(context.run_dir)
    targets = find_targets(report, fusion, None if pair is None else pair.nbytes)
    shipped = None if pair is None else read_pair(pair.text, pair.mmproj).config
    parts = [
        _head(context, pair),
        _files(pair),
        _architecture(context, shipped),
        _road(context),
        _data(),
        _quality(report),
        _targets(targets),
        _fusion(fusion, context.run_dir / REPORT_FOLDER / PLOT_FILE),
        _limits(targets),
        _licences(),
        _repeat(context, report),
    ]
    return "\n".join(parts)


def _head(context: RunContext, pair: Exported | None) -> str:
    front = ["---"]
    if pair is not None:
        with GGUFFile.open(pair.text) as file:
            front.append(f"license: {file.get('general.license', str)}")
    front += ["language:", *(f"- {language}" for language in LANGUAGES), "---", ""]
    lines = [
        f"# {MODEL_NAME}",
        "",
        "A small multimodal model for phones: it reads text, looks at a phone screen, listens to a spoken command, and "
        "answers with a thought and an AutoGLM action.",
    ]
    if context.preset == SMOKE:
        lines += ["", "**This is a smoke run: a few steps with a tiny model, to see that every stage works.**"]
    return "\n".join([*front, *lines, ""])


def _files(pair: Exported | None) -> str:
    lines = ["## Files", ""]
    if pair is None:
        return "\n".join([*lines, "Not exported yet: the last stage is not finished.", ""])
    rows = [[path.name, f"{path.stat().st_size:,}", f"`{sha256_of(path)}`"] for path in (pair.text, pair.mmproj)]
    rows.append(["together", f"{pair.nbytes:,}", ""])
    return "\n".join([*lines, _table(["file", "bytes", "SHA-256"], rows), ""])


def _architecture(context: RunContext, shipped: PhoneConfig | None) -> str:
    models = {"teacher": context.teacher, "student": context.student}
    if shipped is not None:
        models["shipped"] = shipped
    counts = {name: parameter_counts(config) for name, config in models.items()}
    rows = [[part, *(f"{counts[name][part]:,}" for name in models)] for part in counts["student"]]
    lines = ["## Architecture", "", _table(["parameters", *models], rows), ""]
    ratio = counts["teacher"]["all"] / counts["student"]["all"]
    lines += [f"Encoders are counted with their projectors. The teacher is {ratio:.2f} times the student.", ""]
    lines += [f"- {line}" for line in _sizes(shipped or context.student)]
    return "\n".join([*lines, ""])


def _sizes(config: PhoneConfig) -> list[str]:
    text, vision, audio, fusion = config.text, config.vision, config.audio, config.fusion
    pruned = ", ".join(map(str, text.pruned_ffn)) or "none"
    rows, columns = vision.position_grid
    patch = "convolutional stem" if vision.stem_channels else "linear patches"
    lines = [
        f"decoder: `glm4`, {text.num_layers} layers, width {text.hidden_size}, {text.num_heads} heads on "
        f"{text.num_kv_heads} key-value heads of {text.head_dim}, feed-forward {text.ffn_size}, vocabulary "
        f"{text.vocab_size}, context {text.context_length}, attention `{text.attention_mode}`; layers without "
        f"feed-forward part: {pruned}",
        f"eyes: ViT with a {patch}, {vision.num_layers} layers, width {vision.hidden_size}, {vision.num_heads} heads, "
        f"patches of {vision.patch_size}, {vision.merge_size}x{vision.merge_size} merged, up to {vision.max_pixels:,} "
        f"pixels, positions for {rows} x {columns} patches",
    ]
    if audio is not None:
        lines.append(
            f"ears: Conformer, {audio.num_layers} layers, width {audio.hidden_size}, {audio.num_heads} heads, "
            f"convolutions of {audio.kernel_size}, {audio.num_mels} log-mel bins, up to {audio.max_seconds} s"
        )
    lines.append(f"fusion: `{fusion.mode}`, {fusion.num_heads} heads; projectors {fusion.projector_size} wide inside")
    return lines


def _road(context: RunContext) -> str:
    rows = []
    for name, stage in STAGES.items():
        done = read_done(context.run_dir / name)
        what = (inspect.getdoc(stage) or "").splitlines()[:1]
        steps, minutes = ("not finished", "") if done is None else (f"{done.step:,}", f"{done.seconds / 60:.1f}")
        rows.append([name, *(what or [""]), steps, minutes])
    return "\n".join(["## How it was made", "", _table(["stage", "what", "steps", "minutes"], rows), ""])


def _data() -> str:
    lines = [
        "## What it learned from",
        "",
        f"A generated world and no data set: drawn phone screens with {len(LABELS)} known things "
        f"({' and '.join(_LANGUAGE_NAMES[language] for language in LANGUAGES)}), commands spoken by synthesizers, and "
        "text about itself. The held-out set has its own seeds and, as below, its own voices, fonts, icons and "
        "phrasings.",
        "",
    ]
    rows = [[title, *(cell(split) for split in SPLITS)] for title, cell in _DATA_ROWS]
    lines += [_table(["", *SPLITS], rows), ""]
    for language, engines in voices.HELD_OUT_ENGINES.items():
        lines.append(f"{_LANGUAGE_NAMES[language]} engines heard only in the test: {', '.join(engines)}.")
    lacking = [*assets.missing_assets(), *missing_engines()]
    if lacking:
        lines += ["", f"Not installed where this card was written, so neither drawn nor heard: {', '.join(lacking)}."]
    return "\n".join([*lines, ""])


def _voices(split: Split) -> str:
    return ", ".join(f"{len(voices.VOICES[language, split])} {_LANGUAGE_NAMES[language]}" for language in LANGUAGES)


def _fonts(split: Split) -> str:
    return ", ".join(dict.fromkeys(face.name for language in LANGUAGES for face in assets.FACES[language, split]))


def _phrasings(split: Split) -> str:
    intents = (*COMMANDS, *QUESTIONS)
    counts = {lang: sum(len(phrasings(lang, intent, split)) for intent in intents) for lang in LANGUAGES}
    return ", ".join(f"{count} {_LANGUAGE_NAMES[language]}" for language, count in counts.items())


def _noise(split: Split) -> str:
    low, high = SNR_RANGE[split]
    return f"{low:.0f} to {high:.0f} dB under the voice, or none"


_DATA_ROWS = (
    ("voices", _voices),
    ("fonts", _fonts),
    ("icon sets", lambda split: ", ".join(assets.SETS_OF[split])),
    ("phrasings", _phrasings),
    ("noise", _noise),
)


def _quality(report: Report) -> str:
    lines = ["## Measured quality", ""]
    asked = ", ".join(f"{count} {task}" for task, count in report.counts.items())
    lines += [
        f"Per cent right with 95 % intervals (Wilson). Every column was asked the same held-out examples ({asked}; "
        f"seed {report.seed}) and heard the same sounds. PTQ is the pruned model merely rounded to the files' grids; "
        "QAT is read back from the files above.",
        "",
        render_table(report),
    ]
    goals = {name: title for name, title, _, _, _, goal in ROWS if goal is not None}
    rows = []
    for what, before, after in _STEPS:
        if before in report.columns and after in report.columns:
            first, second = report.rates[before], report.rates[after]
            rows += [
                [f"{what} ({before} to {after})", title, compared(second[name], first[name])]
                for name, title in goals.items()
                if name in first and name in second
            ]
    return "\n".join([*lines, _table(["step", "row", "difference (95 % interval)"], rows), ""])


def _targets(targets: Sequence[Target]) -> str:
    said = {True: "met", False: "**missed**", None: NOT_MEASURED}
    rows = [[target.title, target.asked, target.measured, said[target.is_met]] for target in targets]
    return "\n".join(["## What was asked of it", "", _table(["target", "asked", "measured", ""], rows), ""])


def _fusion(fusion: FusionReport, plot: Path) -> str:
    lines = ["## Fusion", ""]
    lines += [f"Left out: {name} ({reason})." for name, reason in fusion.missing.items()]
    if fusion.parameters:
        sizes = " and ".join(f"{name} {count:,}" for name, count in fusion.parameters.items())
        asked = ", ".join(f"{count} {task}" for task, count in fusion.counts.items())
        lines += [f"Equal short runs (parameters: {sizes}), asked {asked} a condition:", ""]
    rows = []
    for condition, (title, _, _) in CONDITIONS.items():
        found = fusion.rates.get(condition, {})
        for name, row_title, *_ in ROWS:
            rates = [found.get(stage, {}).get(name) for stage in FUSION_STAGES]
            if any(rate is not None for rate in rates):
                cells = ["–" if rate is None else f"{rate}" for rate in rates]
                rows.append([title, row_title, *cells, compared(*rates)])
    lines += [_table(["condition", "row", *FUSION_STAGES, "difference"], rows), ""]
    if plot.exists():
        lines += [
            f"![The audio weight over the signal-to-noise ratio]({PLOT_FILE})",
            "",
            "Mean over held-out spoken commands with a screen; the band is one standard deviation.",
            "",
        ]
    columns = {name: {point.snr_db: point for point in points} for name, points in fusion.weights.items()}
    ratios = sorted({snr for points in columns.values() for snr in points})
    weights = [
        [f"{snr:.0f} dB", *(f"{points[snr].mean:.3f} ± {points[snr].spread:.3f}" if snr in points else "–"
                            for points in columns.values())]
        for snr in ratios
    ]  # fmt: skip
    return "\n".join([*lines, _table(["audio weight at", *columns], weights), ""])


def _limits(targets: Sequence[Target]) -> str:
    missed = [target for target in targets if target.is_met is False]
    unknown = [target for target in targets if target.is_met is None]
    lines = ["## Limits", ""]
    lines += [f"- Missed: {target.title}. Asked {target.asked}, measured {target.measured}." for target in missed]
    lines += [f"- Not measured: {target.title}." for target in unknown]
    if not missed and not unknown:
        lines.append("- Every target above is met.")
    lines += [
        f"- It knows {len(LABELS)} names of things. Everything it saw was drawn and everything it heard was "
        "synthesized; on real screens and real people it has not been measured.",
        "- One turn with at most one picture and one sound is all it was trained on.",
    ]
    return "\n".join([*lines, ""])


def _licences() -> str:
    lines = ["## Licences", "", "Fonts and icons that screens were drawn with; none is in the files:", ""]
    lines += [assets.licence_table(), "", "Engines that spoke; none is in the files:", ""]
    return "\n".join([*lines, voices.licence_table(), ""])


def _repeat(context: RunContext, report: Report) -> str:
    train = "autoglm train --smoke" if context.preset == SMOKE else f"autoglm train {context.preset}"
    evaluate = f"autoglm eval {MODEL_NAME}-Q4_K_M.gguf --seed {report.seed}"
    commands = [f"sh {assets.INSTALLER}", train, evaluate, f"{evaluate} --card --every-type"]
    return "\n".join(["## Repeat it", "", "```sh", *commands, "```", ""])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a line that says so where there are no rows."""
    if not rows:
        return f"({NOT_MEASURED})"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
