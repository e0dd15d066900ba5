"""autoglm convert: a published GLM-4.1V checkpoint -> the GGUF pair, resumable, read back and compared at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autoglm.cli.console import ProgressBars, logger, size
from autoglm.deploy.machine import usable_cores
from autoglm.errors import ConfigError
from autoglm.pack.convert import MMPROJ_TYPES, Converted, convert
from autoglm.pack.type_plan import FileType

_WORST_SHOWN = 5


@dataclass(frozen=True)
class ConvertOptions:
    """The flags of autoglm convert."""

    folder: Path
    out: Path = Path()
    type: str = "q4_k_m"
    mmproj_type: str = "q8_0"
    name: str | None = None
    threads: int | None = None


def convert_checkpoint(options: ConvertOptions) -> None:
    """Convert, then list what was written with the tensors that lost most. Raises as `pack.convert.convert` does."""
    with ProgressBars() as bars:
        try:
            files = convert(
                options.folder,
                options.out,
                file_type=_file_type("--type", options.type, tuple(FileType)),
                mmproj_type=_file_type("--mmproj-type", options.mmproj_type, MMPROJ_TYPES),
                name=options.name,
                num_threads=options.threads or usable_cores(),
                progress=bars.report,
            )
        except KeyboardInterrupt:
            logger.warning("Interrupted; the same command goes on from here")
            raise
    console = Console()
    for file in files:
        done = f"'{file.path}', {size(file.path.stat().st_size)}, {len(file.errors)} tensors read back"
        console.print(done, soft_wrap=True, markup=False, highlight=False)
        console.print(_worst(file), highlight=False)


def _file_type(flag: str, text: str, allowed: tuple[FileType, ...]) -> FileType:
    for kind in allowed:
        if kind.name == text.upper():
            return kind
    raise ConfigError(f"{flag} is {text!r}, expected one of {', '.join(kind.name.lower() for kind in allowed)}")


def _worst(file: Converted) -> Table:
    table = Table()
    table.add_column("largest relative error (RMS)")
    table.add_column("type")
    table.add_column("error", justify="right")
    worst = sorted(file.errors, key=lambda error: error.relative_rmse, reverse=True)
    for error in worst[:_WORST_SHOWN]:
        table.add_row(error.name, error.type.name, f"{error.relative_rmse:.2%}")
    return table
