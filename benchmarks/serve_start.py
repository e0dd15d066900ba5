"""From the start of a server to the first token of its first answer, and the memory it takes: autoglm and llama.cpp.

    python benchmarks/serve_start.py [--quick] [--models smollm2,glm4,nano] [--threads N] [--repeats N]

`autoglm serve` and `llama-server` (llama_server.py) start in turn on the same file with the same threads, a context of
2,048 and one slot, and are asked for a chat completion from the moment they are spawned, every 10 ms until one is
taken. Two times are taken: the first content of the answer, and when the server listens at all.

    warm   model and program files are in the page cache
    cold   none of the model file is (counted with mincore), nor what could be dropped of both programs' files: Python,
           its packages and libraries as a start reads them, llama-server and its libraries. What other processes map,
           such as libc and this Python, stays; how much that was is in the results.

Before every start as much memory as a server takes is touched and given back, see page_cache.touch_memory. Peak memory
is VmHWM after a prompt of about 512 and an answer of 32 tokens, against the file's size, the KV cache and 15 %. Nano
(AutoGLM-Phone-Nano with its mmproj, self-check and all) has no peer: llama.cpp cannot read its mmproj.
"""

from __future__ import annotations

import argparse
import http.client
import importlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_server import find_llama_server, llama_server_version
from page_cache import drop, read, resident_bytes, touch_memory
from stream_client import content_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CONTEXT = 2048
PROMPT_TOKENS, ANSWER_TOKENS = 512, 32
MEMORY_FIELDS = ("VmHWM", "RssAnon", "RssFile", "RssShmem")
START_LIMIT_S = 300


@dataclass(frozen=True)
class Model:
    """A model to start with, as its child process (`--facts`) found it; nothing of autoglm is imported in this one.

    files          what is read of it
    letter         a token id that answers are made of: random weights would write nothing visible
    kv_bytes       of a KV cache of CONTEXT tokens in f16
    program_files  what a start of autoglm reads besides
    """

    name: str
    files: list[Path]
    letter: int
    kv_bytes: int
    program_files: list[Path]

    @property
    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


class Server:
    """A server being started on a free loopback port."""

    def __init__(self, command: list[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.port: int = sock.getsockname()[1]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        }
        # What pip or the first start writes: without compiled modules every start would compile them.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._log = tempfile.TemporaryFile()
        self.started_s = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port)],
            stdout=self._log,
            stderr=self._log,
            env=environment,
            cwd=HERE.parent,  # python -m looks there first
        )

    def first_token(self, body: dict[str, Any]) -> dict[str, float]:
        """Seconds from the start to when it listened, and to the first content of an answer."""
        times: dict[str, float] = {}
        while True:
            if self._process.poll() is not None or time.perf_counter() - self.started_s > START_LIMIT_S:
                self._log.seek(0)
                raise SystemExit(f"the server did not start; the end of its log:\n{self._log.read()[-2000:].decode()}")
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_LIMIT_S)
            try:
                connection.connect()
                times.setdefault("listening_s", time.perf_counter() - self.started_s)
                for chunk in self._ask(connection, body):
                    if content_of(chunk):
                        return times | {"first_token_s": time.perf_counter() - self.started_s}
            except (ConnectionError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            time.sleep(0.01)

    def answer(self, body: dict[str, Any]) -> int:
        """Read a whole answer; tokens of its prompt."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_LIMIT_S)
        chunks = list(self._ask(connection, {**body, "stream_options": {"include_usage": True}}))
        connection.close()
        usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
        if not usages:
            raise SystemExit(f"the server gave no answer to a prompt of {PROMPT_TOKENS} tokens")
        return int(usages[-1]["prompt_tokens"])

    @staticmethod
    def _ask(connection: http.client.HTTPConnection, body: dict[str, Any]) -> Any:
        """Chunks of a streamed chat completion; none while the server is still loading (503)."""
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}), headers)
        reply = connection.getresponse()
        if reply.status == 503:
            return
        if reply.status != 200:
            raise SystemExit(f"the server answered {reply.status}: {reply.read()[:300]!r}")
        for line in reply:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])

    def memory(self) -> dict[str, int]:
        """Bytes: its peak, and what it holds now in anonymous memory, mapped files and shared memory."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        values = {
            name: int(rest.split()[0]) << 10
            for name, _, rest in (line.partition(":") for line in lines)
            if rest and name in MEMORY_FIELDS
        }
        return values

    def mapped_files(self) -> set[Path]:
        lines = Path(f"/proc/{self._process.pid}/maps").read_text().splitlines()
        paths = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")}
        return {path for path in paths if path.is_file()}

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def chat(model: Model, text: str, max_tokens: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {str(model.letter): 100},
    }


def commands(model: Model, threads: int) -> dict[str, list[str]]:
    """How each engine is started, with the same flags."""
    flags = ["-m", str(model.files[0]), "-c", str(CONTEXT), "-t", str(threads), "-np", "1"]
    found = {"autoglm": [sys.executable, "-m", "autoglm", "serve", *flags]}
    if model.name != "nano":
        found["llama.cpp"] = [str(find_llama_server()), *flags]
    return found


def measure(model: Model, threads: int, repeats: int) -> dict[str, Any]:
    """All starts of one model, the engines in turn, cold and warm."""
    programs = {engine: {Path(command[0]).resolve()} for engine, command in commands(model, threads).items()}
    programs["autoglm"] |= set(model.program_files)
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {
        cache: {e: [] for e in programs} for cache in ("warm", "cold")
    }
    long_prompt = "a b " * (PROMPT_TOKENS // 2 - 16)
    for number in range(repeats + 1):  # the first round is not counted: it tells which files are read
        for cache, engines in samples.items():
            for engine, command in commands(model, threads).items():
                files = sorted(set().union(*programs.values()))
                touch_memory(2 * model.file_bytes + (1 << 30))
                if cache == "cold":
                    drop([*model.files, *files])
                else:
                    read([*model.files, *files])
                resident = {"model": resident_bytes(model.files), "programs": resident_bytes(files)}
                if cache == "cold" and resident["model"]:
                    raise SystemExit(
                        f"{resident['model']} bytes of {model.files[0]} stay in the page cache; who maps it?"
                    )
                server = Server(command)
                try:
                    sample: dict[str, Any] = server.first_token(chat(model, "Hi", 1))
                    sample["prompt_tokens"] = server.answer(chat(model, long_prompt, ANSWER_TOKENS))
                    sample |= {"memory": server.memory(), "resident_before": resident}
                    programs[engine] |= server.mapped_files() - set(model.files)
                finally:
                    server.stop()
                if number:
                    engines[engine].append(sample)
                print(f"{model.name:8} {cache} {engine:10} {sample['first_token_s']:.3f} s", file=sys.stderr)
    return {
        "file_bytes": model.file_bytes,
        "kv_bytes": model.kv_bytes,
        "program_bytes": sum(path.stat().st_size for path in set().union(*programs.values())),
        "samples": samples,
        "median_first_token_s": {
            cache: {
                engine: statistics.median(one["first_token_s"] for one in found) for engine, found in engines.items()
            }
            for cache, engines in samples.items()
        },
        # Of all starts the largest: a limit is kept or it is not.
        "peak_bytes": {
            engine: max(one["memory"]["VmHWM"] for engines in samples.values() for one in engines[engine])
            for engine in programs
        },
        "peak_limit_bytes": round((model.file_bytes + model.kv_bytes) * 1.15),
    }


def print_facts(name: str) -> None:
    """For a child process: the Model of that name as one line of JSON, its file fetched or written first."""
    import platformdirs

    importlib.import_module("autoglm.cli.http_server")  # all that a start reads
    from autoglm.chat.tokenizer import Tokenizer
    from autoglm.config import EngineConfig
    from autoglm.deploy.pull import pull
    from autoglm.engine.fit import kv_token_bytes
    from autoglm.formats.gguf import GGUFFile
    from autoglm.model.loader import read_model_config

    if name == "glm4":
        from glm4_file import write_glm4_file

        path = Path(platformdirs.user_cache_dir("autoglm")) / "benchmarks" / "glm4-9b-shapes-8-layers-Q4_K_M.gguf"
        if not path.exists():
            write_glm4_file(path)
    else:
        path = pull({"smollm2": "smollm2-135m", "nano": "nano"}[name]).path
    files = [path, *path.parent.glob("mmproj-*.gguf")] if name == "nano" else [path]
    with GGUFFile.open(path) as gguf:
        letter = Tokenizer.from_gguf(gguf).encode(" a")[-1]
        kv_bytes = CONTEXT * kv_token_bytes(read_model_config(gguf), EngineConfig())
    modules = [(getattr(m, "__cached__", None), getattr(m, "__file__", None)) for m in list(sys.modules.values())]
    read_files = {next((p for p in pair if p and Path(p).is_file()), None) for pair in modules}
    facts = {"files": [str(p) for p in files], "letter": letter, "kv_bytes": kv_bytes}
    print(json.dumps(facts | {"program_files": sorted(p for p in read_files if p)}))


def find_model(name: str) -> Model:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, str(HERE / "serve_start.py"), "--facts", name]
    said = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE.parent, check=True
    ).stdout
    facts = json.loads(said.splitlines()[-1])
    program_files = [Path(path) for path in facts["program_files"]]
    return Model(name, [Path(path) for path in facts["files"]], facts["letter"], facts["kv_bytes"], program_files)


def table(results: dict[str, Any]) -> str:
    rows = [f"{'model':<9}{'cache':<6}{'autoglm':>16}{'llama.cpp':>16}{'ratio':>8}   seconds to the first token"]
    for name, result in results["models"].items():
        for cache, medians in result["median_first_token_s"].items():
            cells = []
            for engine in ("autoglm", "llama.cpp"):
                values = [one["first_token_s"] for one in result["samples"][cache].get(engine, [])]
                cells.append(f"{medians[engine]:.2f} ± {(max(values) - min(values)) / 2:.2f}" if values else "")
            ratio = f"{medians['llama.cpp'] / medians['autoglm']:.2f}" if "llama.cpp" in medians else ""
            rows.append(f"{name:<9}{cache:<6}{cells[0]:>16}{cells[1]:>16}{ratio:>8}")
    rows.append("peak memory, MB (limit: file + KV cache + 15 %)")
    for name, result in results["models"].items():
        peaks = "  ".join(f"{engine} {peak / 1e6:.0f}" for engine, peak in result["peak_bytes"].items())
        rows.append(f"{name:<9}{peaks}  limit {result['peak_limit_bytes'] / 1e6:.0f}")
    return "\n".join(rows)


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = [(name, cache) for name, result in results["models"].items() for cache in result["median_first_token_s"]]
    figure, axes = pyplot.subplots(1, len(pairs), figsize=(2.1 * len(pairs), 3.6), squeeze=False)
    for axis, (name, cache) in zip(axes[0], pairs, strict=True):
        medians = results["models"][name]["median_first_token_s"][cache]
        engines = [engine for engine in ("llama.cpp", "autoglm") if engine in medians]
        colors = {"llama.cpp": "#9aa5b1", "autoglm": "#1f7a8c"}
        values = [medians[engine] for engine in engines]
        drawn = axis.bar(engines, values, color=[colors[engine] for engine in engines], width=0.65)
        axis.bar_label(drawn, fmt="%.2f", padding=2)
        axis.set_title(f"{name}\n{cache} cache", fontsize=10)
        axis.set_ylim(0, max(values) * 1.18)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds to the first token")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.text(
        0.5, 0.02, f"{results['cpu']}, {results['threads']} threads, {results['date']}", ha="center", fontsize=9
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="one repeat: a smoke test, not a result")
    parser.add_argument("--models", default="smollm2,glm4,nano")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.facts:
        print_facts(options.facts)
        return
    names = options.models.split(",")
    RESULTS.mkdir(exist_ok=True)
    peer = llama_server_version(find_llama_server()) if names != ["nano"] else ""
    repeats = 1 if options.quick else options.repeats
    models = {name: measure(find_model(name), options.threads, repeats) for name in names}
    # Only now: what this process maps could not be dropped from the page cache.
    from served import about_the_run, write_results

    results = {**about_the_run(options.threads), "llama_server": peer, "context": CONTEXT, "models": models}
    print(table(results))
    plot(results, RESULTS / "serve_start.png")
    write_results("serve_start", results)


if __name__ == "__main__":
    main()
