"""The models that lie in this package, with nothing to fetch: AutoGLM-Phone-Nano, as training exported it."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from autoglm.errors import ConfigError

_FOLDER = Path(__file__).parents[1] / "nano"


class ShippedModel(Struct, frozen=True):
    """A GGUF pair in the package's folder `nano`, beside its model card."""

    served_name: str
    about: str
    license: str

    @property
    def path(self) -> Path:
        return _FOLDER / f"{self.served_name}-Q4_K_M.gguf"

    @property
    def mmproj(self) -> Path:
        return _FOLDER / f"mmproj-{self.served_name}-Q8_0.gguf"

    @property
    def is_here(self) -> bool:
        return self.path.is_file() and self.mmproj.is_file()

    @property
    def file_bytes(self) -> int:
        """Bytes of both files, 0 where they are missing."""
        return self.path.stat().st_size + self.mmproj.stat().st_size if self.is_here else 0

    def check(self) -> None:
        """Raises ConfigError if this installation lacks a file of the pair."""
        if not self.is_here:
            raise ConfigError(
                f"{self.served_name} is part of this package, and '{_FOLDER}' does not hold its two files; "
                "mend: install autoglm again"
            )


SHIPPED_MODELS = {
    "nano": ShippedModel(
        served_name="AutoGLM-Phone-Nano",
        about="phone agent trained by us, Chinese and English: text, screens and speech in, actions out",
        license="Apache-2.0",
    )
}
