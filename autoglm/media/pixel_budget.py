"""How many pixels a request lets its pictures keep: `max_pixels`, its limits, and the rule that no setting is idle.

A smaller budget makes pictures smaller before they are encoded: fewer image tokens, less detail. Coordinates do not
change, they are 0 to 999 of the original picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from autoglm.errors import ConfigError, RequestError


class PixelBudget(Struct, frozen=True):
    """A model's range of `max_pixels` and what a server takes where a request names none.

    min_pixels  the least the model's processor can be held to
    max_pixels  the most it may be asked for: the model's own maximum, or less where the operator says so
    default     for requests that name none
    Raises ConfigError where these are out of order.
    """

    min_pixels: int
    max_pixels: int
    default: int

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.default <= self.max_pixels:
            raise ConfigError(
                f"max_pixels {self.default} must lie between {self.min_pixels} and {self.max_pixels}; "
                "outside of that it would have no effect"
            )

    def resolve(self, requested: int | None) -> int:
        """The budget to use. Raises RequestError for a request outside of the range, which could not be kept."""
        if requested is None:
            return self.default
        if not self.min_pixels <= requested <= self.max_pixels:
            raise RequestError(
                f"max_pixels must lie between {self.min_pixels} and {self.max_pixels} here, got {requested}",
                param="max_pixels",
                code="invalid_value",
            )
        return requested


def requested_max_pixels(
    max_pixels: object, mm_processor_kwargs: Mapping[str, Any] | None, *, num_pictures: int
) -> int | None:
    """What a request asks for in `max_pixels` or `mm_processor_kwargs.max_pixels`; None where it asks for nothing.

    Raises RequestError for a value that is no whole number, for two values that differ, for other processor settings,
    and for a budget in a request without pictures: a setting without effect is a mistake somewhere.
    """
    nested = dict(mm_processor_kwargs or {})
    asked = {"max_pixels": max_pixels, "mm_processor_kwargs.max_pixels": nested.pop("max_pixels", None)}
    if nested:
        name = next(iter(nested))[:40]
        raise _refusal(f"mm_processor_kwargs.{name}", "is not a setting of this server; it takes max_pixels")
    given = {param: value for param, value in asked.items() if value is not None}
    for param, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _refusal(param, "must be a whole number of pixels above 0")
        if num_pictures == 0:
            raise _refusal(param, "has no effect: the request has no picture")
    values = {int(value) for value in given.values() if isinstance(value, int)}
    if len(values) > 1:
        raise _refusal("mm_processor_kwargs.max_pixels", "differs from max_pixels; send one of them")
    return values.pop() if values else None


def _refusal(param: str, what: str) -> RequestError:
    return RequestError(f"{param}: {what}", param=param, code="invalid_value")
