"""autoglm serve end to end: a process on a free port, its log, real answers, a clean end on SIGTERM."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from autoglm import cli
from tests.cli.serving import ServerProcess, serving
from tests.tiny_models import TinyModel


@pytest.fixture(scope="module")
def server(tiny_glm4_mrope: TinyModel) -> Iterator[ServerProcess]:
    with serving("-m", str(tiny_glm4_mrope.path), "--alias", "autoglm-phone-9b,phone", "-t", "1") as running:
        yield running


def test_log_lines_in_order(server: ServerProcess) -> None:
    lines = server.lines
    assert lines[0] == "INFO: Starting autoglm-phone-9b server..."
    loading = [line for line in lines if line.startswith("INFO: Loading GLM backbone with ")]
    assert len(loading) == 1 and loading[0].endswith(" parameters")
    assert lines.index(loading[0]) == 1
    assert any(line.startswith("INFO: Memory: weights of the backbone ") for line in lines)
    assert lines[-1] == f"INFO: Server running on port {server.port}"
    assert all(line.startswith(("INFO: ", "WARNING: ")) for line in lines)


def test_every_alias_is_served(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=server.url, api_key="EMPTY") as client:
        assert [model.id for model in client.models.list()] == ["autoglm-phone-9b", "phone"]
        for name in ("autoglm-phone-9b", "phone"):
            reply = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "open the settings"}], max_tokens=8, temperature=0
            )
            assert reply.usage is not None and reply.usage.completion_tokens <= 8


def test_taken_port_names_a_free_one(server: ServerProcess, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--port", str(server.port)]) == 2
    assert f"port {server.port} on 127.0.0.1 is taken" in capfd.readouterr().err


def test_key_from_the_environment_is_demanded_and_never_logged(tiny_llama: TinyModel) -> None:
    with serving("-m", str(tiny_llama.path), "-t", "1", AUTOGLM_API_KEY="sesame-4711") as server:
        assert httpx.get(f"{server.url}/models").status_code == 401
        right = {"Authorization": "Bearer sesame-4711"}
        assert httpx.get(f"{server.url}/models", headers=right).status_code == 200
        assert server.stop() == 0
    log = "\n".join(server.lines)
    assert "sesame" not in log
    assert "leaked" not in log  # what nanobind writes of objects that are alive at the end


def test_open_network_without_a_key_is_warned_about(tiny_llama: TinyModel) -> None:
    with serving("-m", str(tiny_llama.path), "-t", "1", "--host", "0.0.0.0") as server:
        assert any(line.startswith("WARNING: 0.0.0.0 is open to the network") for line in server.lines)
        assert server.stop() == 0


def test_sigterm_lets_a_running_answer_finish(tiny_llama: TinyModel) -> None:
    with serving("-m", str(tiny_llama.path), "-t", "1", "-c", "2000") as server:
        body = {"prompt": "the phone", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
        replies: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: replies.append(httpx.post(f"{server.url}/completions", json=body, timeout=120))
        )
        asking.start()
        metrics = server.url.removesuffix("/v1") + "/metrics"
        deadline = time.monotonic() + 30
        while "autoglm_sequences_running 1.0" not in httpx.get(metrics).text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.stop() == 0
        asking.join(timeout=60)
    assert replies and replies[0].status_code == 200
    assert replies[0].json()["usage"]["completion_tokens"] == 1500


def test_default_model_answers(tmp_path: Path) -> None:
    """No flags at all: what the README's first command does. Nothing is fetched; every part is named as it loads."""
    cache = tmp_path / "cache"
    with serving(AUTOGLM_CACHE=str(cache)) as server:
        wanted = [
            r"Starting AutoGLM-Phone-Nano server\.\.\.",
            r"Loading GLM backbone with 3\.6M parameters",
            r"Loading vision encoder from .*mmproj-AutoGLM-Phone-Nano-Q8_0\.gguf",
            r"Loading audio encoder from .*mmproj-AutoGLM-Phone-Nano-Q8_0\.gguf",
            r"Initializing MMProj projector: mmproj-AutoGLM-Phone-Nano-Q8_0\.gguf",
            rf"Server running on port {server.port}",
        ]
        told = [line for line in server.lines if any(re.fullmatch(f"INFO: {text}", line) for text in wanted)]
        assert len(told) == len(wanted), server.lines
        assert all(re.fullmatch(f"INFO: {text}", line) for text, line in zip(wanted, told, strict=True)), told
        assert server.lines[:2] == told[:2] and server.lines[-1] == told[-1] and not cache.exists()
        with openai.OpenAI(base_url=server.url, api_key="EMPTY") as client:
            pieces = [
                chunk.choices[0].delta.content or ""
                for chunk in client.chat.completions.create(
                    model="nano",
                    messages=[{"role": "user", "content": "Who are you?"}],
                    max_tokens=96,
                    temperature=0,
                    stream=True,
                )
                if chunk.choices
            ]
        assert len(pieces) > 5 and "AutoGLM-Phone-Nano" in "".join(pieces)
        assert server.stop() == 0


def test_smollm2_by_name(smollm2_path: Path) -> None:
    with serving("-m", "smollm2-135m") as server, openai.OpenAI(base_url=server.url, api_key="EMPTY") as client:
        completion = client.completions.create(
            model="SmolLM2-135M-Instruct", prompt="The capital of France is", max_tokens=4, temperature=0
        )
        assert "Paris" in completion.choices[0].text
