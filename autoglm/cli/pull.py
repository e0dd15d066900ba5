"""autoglm pull: fetch a model by name, or list the names and what is here already."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from autoglm.cli.console import ProgressBars, size
from autoglm.deploy import pull


def list_models() -> None:
    """Print the table of models that have a name."""
    table = Table(title="Models by name", title_justify="left")
    for column in ("name", "what it is", "license", "size", "here"):
        table.add_column(column)
    for name, model in pull.NAMED_MODELS.items():
        label = f"{name} (default)" if name == pull.DEFAULT_MODEL else name
        here = "yes" if pull.is_cached(model) else "no"
        table.add_row(label, model.about, model.license, size(model.file_bytes), here)
    console = Console()
    console.print(table)
    console.print("Also: hf:OWNER/REPO[:FILE] and modelscope:OWNER/REPO[:FILE], any repository with GGUF files.")
    console.print(f"Kept in {pull.cache_dir()} (AUTOGLM_CACHE names another folder).", highlight=False, soft_wrap=True)


def pull_model(name: str) -> None:
    """Fetch a model and print where it is and how to serve it."""
    with ProgressBars() as bars:
        model = pull.pull(name, progress=bars.report)
    print(model.path)
    if model.mmproj is not None:
        print(model.mmproj)
    command = f"autoglm serve -m '{model.path}'"
    Console(stderr=True).print(f"Serve it with: {command}", highlight=False, soft_wrap=True, markup=False)
