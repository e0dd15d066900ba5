"""max_pixels: taken where it does something, refused where it could not."""

from __future__ import annotations

from typing import Any

import pytest

from autoglm.errors import ConfigError, RequestError
from autoglm.media.pixel_budget import PixelBudget, requested_max_pixels

BUDGET = PixelBudget(min_pixels=100, max_pixels=1000, default=500)


@pytest.mark.parametrize(("requested", "used"), [(None, 500), (100, 100), (1000, 1000), (700, 700)])
def test_a_request_moves_the_budget_inside_its_range(requested: int | None, used: int) -> None:
    assert BUDGET.resolve(requested) == used


@pytest.mark.parametrize("requested", [99, 1001])
def test_a_budget_that_could_not_be_kept_is_an_error(requested: int) -> None:
    with pytest.raises(RequestError, match="between 100 and 1000") as caught:
        BUDGET.resolve(requested)
    assert caught.value.param == "max_pixels"


@pytest.mark.parametrize(("least", "most", "default"), [(100, 1000, 99), (100, 1000, 1001), (0, 10, 5)])
def test_a_server_default_without_effect_is_a_wrong_setting(least: int, most: int, default: int) -> None:
    with pytest.raises(ConfigError, match="no effect"):
        PixelBudget(least, most, default)


@pytest.mark.parametrize(
    ("top", "nested", "asked"),
    [(None, None, None), (300, None, 300), (None, {"max_pixels": 300}, 300), (300, {"max_pixels": 300}, 300)],
)
def test_both_places_are_read(top: int | None, nested: dict[str, Any] | None, asked: int | None) -> None:
    assert requested_max_pixels(top, nested, num_pictures=1) == asked
    if asked is None:
        assert requested_max_pixels(top, nested, num_pictures=0) is None


@pytest.mark.parametrize(
    ("top", "nested", "num_pictures", "param"),
    [
        (300, None, 0, "max_pixels"),
        (None, {"max_pixels": 300}, 0, "mm_processor_kwargs.max_pixels"),
        (300, {"max_pixels": 301}, 1, "mm_processor_kwargs.max_pixels"),
        (None, {"min_pixels": 300}, 1, "mm_processor_kwargs.min_pixels"),
        (True, None, 1, "max_pixels"),
        ("300", None, 1, "max_pixels"),
        (0, None, 1, "max_pixels"),
        (3.0, None, 1, "max_pixels"),
    ],
)
def test_settings_without_effect_or_sense_are_named(top: object, nested: Any, num_pictures: int, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        requested_max_pixels(top, nested, num_pictures=num_pictures)
    assert caught.value.param == param
