"""The autoglm command as a person meets it: help, wrong flags, missing files, tables, exit codes."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from autoglm import __version__, cli
from autoglm.cli import http_server, self_check
from autoglm.cli import serve as serving
from autoglm.cli.console import parameter_count, printable, size
from autoglm.cli.loading import ModelOptions, parse_size, served_names
from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.errors import ConfigError
from autoglm.server.settings import ServerSettings
from tests.tiny_models import TinyModel


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    out, err = capfd.readouterr()
    return code, out, err


def only_error(err: str) -> str:
    """The one line of a refusal."""
    assert err.startswith("ERROR: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize("command", [[], ["serve"], ["chat"], ["see"], ["info"], ["bench"], ["pull"], ["convert"]])
def test_help_says_what_each_flag_does(capfd: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, err = run(capfd, *command, "--help")
    assert code == 0 and err == "" and out.startswith("Usage: autoglm")


def test_serve_has_llama_servers_names(capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capfd, "serve", "--help")
    for flag in (
        "-m, --model --mmproj --host --port -c, --ctx-size -t, --threads -np, --parallel --alias --api-key "
        "--chat-template-file -ctk, --cache-type-k -ctv, --cache-type-v --kv-blocks --kv-memory "
        "--actions --max-batched-tokens --queue --draft-max --no-prefix-cache --no-prebuild --log-level AUTOGLM_API_KEY"
    ).split():
        assert flag in out


@pytest.mark.parametrize("flags, expected", [([], False), (["--actions"], True)])
def test_serve_actions_reaches_the_server(monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: bool) -> None:
    seen: list[ServerSettings] = []
    for module, names in (
        (serving, ("find_model", "load_model", "describe")),
        (self_check, ("check_taps",)),
        (http_server, ("EngineDriver", "run_server")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, MagicMock())
    monkeypatch.setattr(http_server, "create_app", lambda *_, settings, **__: seen.append(settings))
    assert cli.main(["serve", "--port", "0", *flags]) == 0
    assert [settings.actions for settings in seen] == [expected]


def test_version_names_the_kernels(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "--version")
    assert code == 0
    assert out.startswith(f"autoglm {__version__} (") and out.strip().endswith(" kernels)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wrong"], "No such option"),
        (["serv"], "serve"),
        (["serve", "--port", "x"], "--port"),
        (["serve", "--port", "70000"], "--port"),
        (["serve", "-np", "0"], "--parallel"),
        (["serve", "-ctk", "q4_0"], "i16 or q8_0"),
        (["serve", "-m", "none.gguf"], "'none.gguf' not found"),
        (["serve", "-m", "no-such-name"], "'no-such-name' not found"),
        (["serve", "--alias", " , "], "--alias"),
        (["serve", "--api-key", " "], "--api-key"),
        (["serve", "--log-level", "loud"], "--log-level"),
        (["serve", "--host", "192.0.2.1"], "not an address of this machine"),
        (["bench", "--batches", "1,x"], "--batches"),
        (["bench", "--roofline", "--batches", "1,4"], "--batches"),
        (["bench", "--depth", "4096"], "--roofline"),
        (["pull"], "name the model"),
        (["pull", "gpt-9"], "no model is called 'gpt-9'"),
        (["chat", "--url", "http://127.0.0.1:1/v1", "-m", "x.gguf"], "give one of them"),
    ],
)
def test_wrong_command_lines_are_one_line_and_exit_2(
    capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capfd, *arguments)
    error = "\n".join(line for line in err.splitlines() if not line.startswith("INFO")) + "\n"
    assert code == 2 and out == ""
    assert message in only_error(error)


def test_missing_projector(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capfd, "serve", "--mmproj", "mmproj-AutoGLM-Phone-9B-F16.gguf")
    assert code == 2
    line = only_error(err)
    assert line.startswith("ERROR: Cannot load multimodal projector, file 'mmproj-AutoGLM-Phone-9B-F16.gguf' not found")
    assert "vision encoder" in line and "autoglm pull" in line


def test_taken_port_is_said_before_loading(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, _, err = run(capfd, "serve", "--port", str(port))
    assert code == 2 and f"port {port}" in only_error(err)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model", b"GGUF\x03\0\0\0" + b"\xff" * 16])
def test_damaged_files_exit_3(capfd: pytest.CaptureFixture[str], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    code, out, err = run(capfd, "info", str(path))
    assert code == 3 and out == "" and str(path) in only_error(err)


def test_serving_a_damaged_file_exits_3(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF")
    code, _, err = run(capfd, "serve", "--port", "0", "-m", str(path))
    assert code == 3 and "INFO: Starting bad server..." in err and err.splitlines()[-1].startswith("ERROR: ")


def test_info_table_and_json_tell_the_same(capfd: pytest.CaptureFixture[str], tiny_glm4_mrope: TinyModel) -> None:
    path = str(tiny_glm4_mrope.path)
    code, out, _ = run(capfd, "info", path, "--json", "--tensors")
    facts = json.loads(out)
    assert code == 0 and facts["problem"] is None
    assert facts["architecture"] == "glm4" and facts["model"]["mrope_section"]
    assert len(facts["tensors"]) == facts["num_tensors"]
    assert sum(group["count"] for group in facts["groups"]) == facts["num_tensors"]
    assert sum(group["bytes"] for group in facts["groups"]) == facts["weights_bytes"]
    assert facts["memory"]["total_bytes"] <= facts["memory"]["available_bytes"]
    code, out, _ = run(capfd, "info", path)
    assert code == 0
    for shown in ("M-RoPE", "blk.*.attn_q.weight", "tokenizer", "memory, weights", "[out, in]"):
        assert shown in out


def test_info_tells_of_an_mmproj(capfd: pytest.CaptureFixture[str]) -> None:
    path = str(SHIPPED_MODELS["nano"].mmproj)
    code, out, _ = run(capfd, "info", path, "--json")
    facts = json.loads(out)
    projector = facts["projector"]
    assert code == 0 and facts["problem"] is None and facts["model"] is None
    assert (projector["type"], projector["text_size"], projector["fusion"]) == ("gcmf", 256, "gcmf")
    assert projector["vision"]["hidden_size"] == 192 and projector["audio"]["num_layers"] == 4
    assert projector["pictures"]["1080x2400"] == {"width": 224, "height": 480, "rows": 15, "columns": 7, "tokens": 105}
    code, out, _ = run(capfd, "info", path)
    assert code == 0 and "not served" not in out
    for shown in ("tokens per picture", "3 layers of width 192", "audio encoder", "25 a second", "gated"):
        assert shown in out


def test_info_of_what_cannot_be_served_says_why(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "mmproj-x.gguf", "clip")
    writer.add_name("evil \x1b[31m[bold]name")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, out, _ = run(capfd, "info", str(tmp_path / "mmproj-x.gguf"))
    assert code == 0 and "not served by this build" in out
    assert "\x1b" not in out and "[bold]name" in out, "text from a file neither steers the terminal nor is markup"


def test_text_of_a_file_cannot_break_the_error_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "evil\x1b[2J\nINFO: fine")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, _, err = run(capfd, "serve", "--port", "0", "-m", str(tmp_path / "x.gguf"))
    assert code == 3 and "\x1b" not in err
    assert err.splitlines()[-1].startswith("ERROR: ")


def test_bench_measures_everything(capfd: pytest.CaptureFixture[str], tiny_llama: TinyModel) -> None:
    arguments = ["bench", "-m", str(tiny_llama.path), "-p", "64", "-n", "8", "-r", "2", "--batches", "1,4", "-t", "1"]
    code, out, _ = run(capfd, *arguments, "--json")
    results = json.loads(out.splitlines()[-1])
    assert code == 0
    for spread in (results["prefill_tokens_per_s"], *results["decode_tokens_per_s"].values()):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert set(results["decode_tokens_per_s"]) == {"1", "4"}
    assert results["first_token_ms"]["16"]["median"] > 0
    code, out, _ = run(capfd, *arguments)
    assert code == 0 and "decode, 4 at once" in out


def test_bench_needs_room(capfd: pytest.CaptureFixture[str], tiny_llama: TinyModel) -> None:
    code, _, err = run(capfd, "bench", "-m", str(tiny_llama.path), "-p", "100000")
    assert code == 2 and "needs a context of 100001 tokens" in only_error(err)


def test_unforeseen_failures_are_one_line_without_the_users_words(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("a secret prompt")

    monkeypatch.setattr("autoglm.cli.info.show_info", explode)
    code, _, err = run(capfd, "info", "x.gguf")
    assert code == 1
    assert "RuntimeError" in only_error(err) and "AUTOGLM_DEBUG=1" in err and "secret" not in err
    monkeypatch.setenv("AUTOGLM_DEBUG", "1")
    with pytest.raises(RuntimeError):
        cli.main(["info", "x.gguf"])


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoglm.cli.info.show_info", interrupt)
    assert cli.main(["info", "x.gguf"]) == 130


def test_a_closed_pipe_is_quiet(tiny_llama: TinyModel) -> None:
    root = Path(__file__).resolve().parents[2]
    command = f"'{sys.executable}' -m autoglm info '{tiny_llama.path}' --json | head -c 10"
    result = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert result.stderr == ""


def test_starting_is_light() -> None:
    """--help must not wait for the engine or the web framework to load."""
    root = Path(__file__).resolve().parents[2]
    code = "import sys, autoglm.cli; print([m for m in ('numpy', 'fastapi', 'tokenizers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.stdout.strip() == "[]", result.stderr


def test_serve_loads_before_it_reads_the_http_side() -> None:
    """Modules that are read while native threads read weights, and those that only few servers need at all."""
    root = Path(__file__).resolve().parents[2]
    late = ("starlette", "uvicorn")
    rare = ("httpx", "rich", "PIL", "soundfile", "soxr", "llguidance", "filelock", "platformdirs", "psutil")
    rare += ("prometheus_client", "numpy.random", "pydantic", "pydantic_core")
    code = (
        f"import sys; from autoglm.cli import console, loading, serve; print([m for m in {late + rare} "
        f"if m in sys.modules]); from autoglm.cli import http_server; print([m for m in {rare} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"], result.stderr


def test_a_start_that_is_refused_leaves_garbage_collection_on() -> None:
    assert cli.main(["serve", "-m", "none.gguf"]) == 2
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("model", "alias", "names"),
    [
        (None, None, ("AutoGLM-Phone-Nano", ("nano",))),
        ("smollm2-135m", None, ("SmolLM2-135M-Instruct", ("smollm2-135m",))),
        ("/x/AutoGLM-Phone-9B-Q4_K_M.gguf", None, ("AutoGLM-Phone-9B", ("AutoGLM-Phone-9B-Q4_K_M",))),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", None, ("SmolLM2-135M-Instruct", ("SmolLM2-135M-Instruct.Q4_1",))),
        ("model-BF16.gguf", None, ("model", ("model-BF16",))),
        ("model.gguf", None, ("model", ())),
        ("Q8_0.gguf", None, ("Q8_0", ())),
        ("x.gguf", "autoglm-phone-9b, phone", ("autoglm-phone-9b", ("phone",))),
        ("hf:owner/AutoGLM-GGUF", None, ("AutoGLM-GGUF", ())),
    ],
)
def test_served_names(model: str | None, alias: str | None, names: tuple[str, tuple[str, ...]]) -> None:
    assert served_names(ModelOptions(model=model, alias=alias)) == names


def test_counts_and_sizes_read_as_people_write_them() -> None:
    assert [parameter_count(n) for n in (9_400_279_040, 134_515_008, 1_711_376_384, 999_999_999, 32_000_000_000)] == [
        "9B", "135M", "1.7B", "1B", "32B",
    ]  # fmt: skip
    assert [size(n) for n in (98_362_432, 6_170_000_000, 12, 1500)] == ["98.4 MB", "6.17 GB", "12 B", "1.5 kB"]
    assert [parse_size(text, "--x") for text in ("512M", "2G", "1.5GiB", "100", "1 kB")] == [
        512 << 20, 2 << 30, 3 << 29, 100, 1024,
    ]  # fmt: skip
    for text in ("", "G", "-1G", "1e9", "2X"):
        with pytest.raises(ConfigError, match="--x"):
            parse_size(text, "--x")
    assert printable("a\x1b[2J\u202eb\n") == "a\ufffd[2J\ufffdb\ufffd"
