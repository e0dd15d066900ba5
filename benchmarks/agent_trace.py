"""A phone agent's 20 turns with and without building the next turn's prefix in the pauses: time to first token.

    python benchmarks/agent_trace.py [--models nano,glm4v] [--pause S] [--threads N]

The requests are those of Open-AutoGLM's client: the whole history each turn, one full-resolution PNG in the last turn,
none in the earlier ones, the answers as think and answer tags; then a pause (it sleeps a second or more and takes the
next screenshot). Two sessions, one on a server that prebuilds and one on a server that does not, share a loaded model
and take turns by five steps, so that a noisy minute hits both; each has screens and a cache salt of its own. The
answers are recorded ones (served.py), the work behind them is real. The first turn of a session has nothing to build
and is not counted. Before the tables both sessions must have got the same answers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from served import RecordedRunner, about_the_run, load, screen, served, write_results
from stream_client import content_of, stream

from autoglm.server.driver import EngineDriver

STEPS_IN_TURN = 5
# glm4v sees 403 tokens of each screen, which keeps a turn of this slow machine to seconds.
FIELDS: dict[str, dict[str, Any]] = {"nano": {}, "glm4v": {"max_pixels": 680_000}}


class Session:
    """One client: its history, and what each of its turns took."""

    def __init__(self, name: str, port: int, trace: dict[str, Any], fields: dict[str, Any]) -> None:
        self.name, self.port, self.trace = name, port, trace
        self.fields = {**fields, "temperature": 0, "top_p": 0.85, "frequency_penalty": 0.2, "cache_salt": name}
        self.history = [{"role": "system", "content": trace["system"]}]
        self.turns: list[dict[str, float]] = []

    def step(self, recorded: RecordedRunner, tokenizer: Any, first_screen: int) -> None:
        number = len(self.turns)
        step = self.trace["steps"][number]
        info = json.dumps({"current_app": step["app"]})
        text = f"** Screen Info **\n\n{info}" if number else f"{self.trace['task']}\n\n{info}"
        words = {"type": "text", "text": text}
        answer = f"<think>{step['thought']}</think><answer>{step['action']}"
        recorded.say([*tokenizer.encode(answer), min(tokenizer.eos_token_ids)])
        turn = {"role": "user", "content": [screen(first_screen + number), words]}
        body = {"messages": [*self.history, turn], "max_tokens": 200, **self.fields}
        started_s, first_s, content, timings = time.perf_counter(), None, "", {}
        for at_s, chunk in stream(self.port, body):
            content += content_of(chunk)
            first_s = at_s if first_s is None and content else first_s
            timings = chunk.get("timings", timings)
        if content != answer or first_s is None:
            raise SystemExit(f"turn {number} of {self.name} did not give the recorded answer; nothing was measured")
        thought, action = content.split("do(action=", 1) if "do(action=" in content else ("", content)
        resent = f"<think>{thought.strip()}</think><answer>do(action={action}</answer>"
        self.history += [{"role": "user", "content": [words]}, {"role": "assistant", "content": resent}]
        self.turns.append(
            {
                "ttft_ms": round((first_s - started_s) * 1e3, 1),
                "prefilled_tokens": timings["prompt_tokens"] - timings["cached_tokens"],
                "encode_ms": timings["encode_ms"],
                "prefill_ms": timings["prefill_ms"],
                "prompt_tokens": timings["prompt_tokens"],
            }
        )


def summary(turns: list[dict[str, float]]) -> dict[str, float]:
    """Of all turns but the first."""
    ttft = sorted(turn["ttft_ms"] for turn in turns[1:])
    return {
        "ttft_ms_median": round(statistics.median(ttft), 1),
        "ttft_ms_p95": round(ttft[min(len(ttft) - 1, round(0.95 * (len(ttft) - 1)))], 1),
        "prefill_ms_median": round(statistics.median(turn["prefill_ms"] for turn in turns[1:]), 1),
        "prefilled_tokens_median": statistics.median(turn["prefilled_tokens"] for turn in turns[1:]),
        "prefilled_tokens_total": sum(turn["prefilled_tokens"] for turn in turns[1:]),
    }


def play(name: str, trace: dict[str, Any], pause_s: float, threads: int) -> dict[str, Any]:
    """Both sessions on one model."""
    loaded = load(name, threads)
    recorded = RecordedRunner(loaded.engine.runner)
    loaded.engine.runner = recorded
    driver = EngineDriver(loaded.engine)
    with served(loaded, driver, prebuild=True) as on, served(loaded, driver, prebuild=False) as off:
        sessions = [Session("on", on, trace, FIELDS[name]), Session("off", off, trace, FIELDS[name])]
        for _ in range(0, len(trace["steps"]), STEPS_IN_TURN):
            for session in sessions:
                for _ in range(STEPS_IN_TURN):
                    session.step(recorded, loaded.tokenizer, 1000 if session.name == "on" else 2000)
                    print(name, session.name, session.turns[-1], flush=True)
                    time.sleep(pause_s)
            sessions.reverse()
        stats = loaded.engine.stats()
    result: dict[str, Any] = {session.name: {**summary(session.turns), "turns": session.turns} for session in sessions}
    result["prebuilt_tokens"] = stats.num_prebuilt_tokens_total
    result["prebuilt_tokens_used"] = stats.num_prebuilt_hit_tokens_total
    result["fields"] = FIELDS[name]
    return result


def plot(results: dict[str, Any], path: Path) -> None:
    """Time to first token of every turn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 3.6), squeeze=False)
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        for mode, colour in (("off", "#b0432e"), ("on", "#2e6fb0")):
            times = [turn["ttft_ms"] for turn in result[mode]["turns"]]
            axis.plot(range(1, len(times) + 1), times, marker="o", markersize=3, color=colour, label=f"prebuild {mode}")
        axis.set(title=name, xlabel="turn", ylabel="time to first token, ms", ylim=(0, None))
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="nano,glm4v")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between an answer and the next request")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    trace = json.loads((Path(__file__).parent / "agent_trace_steps.json").read_text())
    about = about_the_run(options.threads)
    models = {name: play(name, trace, options.pause, options.threads) for name in options.models.split(",")}
    results = {**about, "pause_s": options.pause, "models": models}
    plot(models, Path(__file__).parent / "results" / "agent_trace.png")
    write_results("agent_trace", results)


if __name__ == "__main__":
    main()
