"""docs/api.md and the README keep up with the code: every field, flag, route and metric is named there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autoglm import cli
from autoglm.server import app, metrics, schemas
from autoglm.server.thinking import EFFORTS

ROOT = Path(__file__).resolve().parent.parent
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "body",
    [schemas.ChatRequest, schemas.CompletionRequest, schemas.TokenizeRequest, schemas.DetokenizeRequest],
)
def test_every_request_field_is_documented(body: type[schemas.Body]) -> None:
    missing = [name for name in body.__struct_fields__ if not re.search(rf"[`.{{ ]{re.escape(name)}\b", API)]
    assert not missing


def test_what_is_refused_is_documented() -> None:
    for name in (*schemas.UNSERVED_CHAT, *schemas.UNSERVED_COMPLETION):
        assert f"`{name}`" in API, name


def test_routes_are_documented() -> None:
    for route in (*app.POST_ROUTES, *(route.partition("/{")[0] for route in app.GET_ROUTES)):
        assert route in API, route


def test_thinking_spellings_are_documented() -> None:
    for name in (*EFFORTS, "enable_thinking", "thinking_budget", "budget_tokens", "return_reasoning"):
        assert name in API, name


def test_metrics_are_documented() -> None:
    for name, _ in metrics.ENGINE_GAUGES.values():
        assert f"`autoglm_{name}`" in API, name
    for name, _ in metrics.ENGINE_COUNTERS.values():
        assert f"`autoglm_{name}_total`" in API, name


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_flags_in_the_readme_exist(name: str) -> None:
    """A flag the README shows for one of our commands is a flag of that command."""
    commands = cli.app.commands.values()
    known = {"--version"} | {flag for command in commands for option in command.params for flag in option.opts}
    text = (ROOT / name).read_text(encoding="utf-8")
    assert set(re.findall(r"--[a-z][a-z-]+", text.partition("<!-- tree -->")[0])) <= known
