"""autoglm pack: encoder weights in files of their own -> one mmproj GGUF."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autoglm.cli.console import parameter_count, size
from autoglm.train.encoder_files import assemble, read_weights
from autoglm.train.export import MMPROJ_PARTS, export_mmproj

_NAMES = ("image encoder", "image projector", "audio encoder", "audio projector", "fusion")


@dataclass(frozen=True)
class PackOptions:
    """The flags of autoglm pack."""

    vision: Path
    audio: Path | None = None
    projectors: Path | None = None
    width: int | None = None
    name: str = "AutoGLM-Phone"
    output: Path | None = None


def pack_encoders(options: PackOptions) -> None:
    """Write the mmproj and list what it holds. Raises FormatError for a damaged file, ConfigError for missing parts."""
    state, config = assemble(
        read_weights(options.vision),
        None if options.audio is None else read_weights(options.audio),
        None if options.projectors is None else read_weights(options.projectors),
        width=options.width,
    )
    output = options.output or Path(f"mmproj-{options.name}-Q8_0.gguf")
    export_mmproj(output, state, config, name=options.name)
    table = Table(title=f"'{output}', {size(output.stat().st_size)}", title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    for part, prefix in zip(_NAMES, MMPROJ_PARTS, strict=True):
        count = sum(value.numel() for name, value in state.items() if name.startswith(prefix))
        table.add_row(part, parameter_count(count) if count else "none")
    console = Console()
    console.print(table, highlight=False)
    if options.width is not None:
        console.print("Projectors and fusion are new and untrained: pictures and sounds mean nothing to a decoder yet.")
