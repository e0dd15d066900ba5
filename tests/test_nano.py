"""The model that ships: small enough, described truthfully, and the same model on our engine as in training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import httpx
import pytest
import torch

from autoglm.cli import main
from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.train.evaluate import evaluate, evaluation_examples, split_reply
from autoglm.train.inference import LoadedPhone, load_phone, replier
from autoglm.train.world.assets import missing_assets
from autoglm.train.world.identity import is_identity_answer
from tests.server.conftest import on_socket
from tests.server.test_native_model import native_app

NANO = SHIPPED_MODELS["nano"]
CARD = NANO.path.with_name("MODEL_CARD.md")


@pytest.fixture(scope="module")
def phone() -> LoadedPhone:
    torch.set_num_threads(2)
    return load_phone(NANO.path, mmproj=NANO.mmproj)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app, _ = native_app(NANO.path, ctx_size=1024, num_kv_blocks=256, max_num_seqs=8)
    with on_socket(app) as address:
        yield address


def test_the_pair_is_small_and_the_card_is_about_it() -> None:
    assert NANO.is_here and 0 < NANO.file_bytes <= 25_000_000
    card = CARD.read_text(encoding="utf-8")
    for path in (NANO.path, NANO.mmproj):
        assert f"{path.name} | {path.stat().st_size:,} | `{hashlib.sha256(path.read_bytes()).hexdigest()}`" in card
    for title in ("Architecture", "What it learned from", "Measured quality", "Limits", "Licences"):
        assert f"## {title}\n" in card
    assert "not finished" not in card and "Left out" not in card
    for link in ("audio_weight.png",):
        assert f"({link})" in card and CARD.with_name(link).is_file()


def test_it_says_who_it_is_over_the_api(url: str) -> None:
    """Every held-out phrasing of the card's table, asked as a client asks, with the thought apart."""
    examples = evaluation_examples("identity", 40)
    with httpx.Client(base_url=url, timeout=60) as client:
        for example in examples:
            body = {"messages": [{"role": "user", "content": example.typed}], "temperature": 0, "max_tokens": 96}
            reply = client.post("/v1/chat/completions", json=body | {"return_reasoning": True}).json()
            message = reply["choices"][0]["message"]
            assert reply["choices"][0]["finish_reason"] == "stop"
            assert is_identity_answer(example.language, message["content"]), (example.typed, message)


def test_the_engine_writes_what_pytorch_writes(url: str, phone: LoadedPhone) -> None:
    examples = evaluation_examples("identity", 20, seed=5)
    generate = replier(phone)
    with httpx.Client(base_url=url, timeout=60) as client:
        for example, expected in zip(examples, generate(examples), strict=True):
            body = {"messages": [{"role": "user", "content": example.typed}], "temperature": 0, "max_tokens": 96}
            message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
            assert split_reply(message["content"])[1] == split_reply(expected)[1]


def test_autoglm_eval_knows_it_by_name(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "nano", "--task", "identity", "-n", "8", "--json"]) == 0
    rates = json.loads(capfd.readouterr().out.splitlines()[-1])["nano"]
    assert rates["identity_zh"]["right"] == rates["identity_zh"]["total"] == 4


@pytest.mark.skipif(bool(missing_assets()), reason="screens drawn with stand-in fonts are not those it was measured on")
def test_it_touches_what_it_is_told_to(phone: LoadedPhone) -> None:
    """A small part of the card's table, a good way below it: a model whose eyes are wired wrongly finds nothing."""
    report = json.loads(NANO.path.with_name("report.json").read_text(encoding="utf-8"))
    measured = report["columns"]["QAT"]["rates"]["typed_tap"]
    rates = evaluate(replier(phone), counts={"typed_action": 96})
    assert rates["typed_tap"].share >= measured["right"] / measured["total"] - 0.2
