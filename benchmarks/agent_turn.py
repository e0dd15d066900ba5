"""The fourth turn of a phone agent on autoglm's server beside llama.cpp's: time from sending it to its first token.

    python benchmarks/agent_turn.py [--quick] [--threads N] [--repeats N]

A session is a system prompt and four turns, each with a new 540x1200 screenshot (817 tokens on both); the first three
are really played, answers of 64 tokens included, so that each server's own cache holds what it can of the fourth, which
is timed. Two forms: `kept` sends all four screenshots in the fourth turn, `stripped` is Open-AutoGLM's client, which
takes the screenshot out of every earlier turn. Both servers (peer_servers.py) run throughout, one working at a time;
a repeat plays every form on both, with pictures of its own, in turns of order. Medians over the repeats.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from compare_llamacpp import draw_pair, save_figure
from peer_servers import SCREEN_SIZE, Answer, Server, about, ask, autoglm_command, llama_command, run_options
from served import screen

FORMS = ("kept", "stripped")
TURNS = 4
ANSWER_TOKENS = 64
CTX_SIZE = 8192
TARGET_RATIO = 5.0


class Session:
    """One agent's conversation with one server."""

    def __init__(self, server: Server, trace: dict[str, Any], form: str) -> None:
        self._server, self._trace, self._strips = server, trace, form == "stripped"
        self._history: list[dict[str, Any]] = [{"role": "system", "content": trace["system"]}]

    def turn(self, number: int, picture: dict[str, Any]) -> Answer:
        """Send the history and the next screen, and add both and the answer to the history."""
        info = json.dumps({"current_app": self._trace["steps"][number]["app"]})
        text = f"** Screen Info **\n\n{info}" if number else f"{self._trace['task']}\n\n{info}"
        content: list[dict[str, Any]] = [picture, {"type": "text", "text": text}]
        answer = ask(self._server.port, [*self._history, {"role": "user", "content": content}], ANSWER_TOKENS)
        kept: Any = text if self._strips else content
        self._history += [{"role": "user", "content": kept}, {"role": "assistant", "content": answer.content}]
        return answer


def play(server: Server, trace: dict[str, Any], form: str, first_screen: int) -> dict[str, float]:
    """A whole session; what the last turn took and what the server tells of it."""
    session = Session(server, trace, form)
    for number in range(TURNS):
        answer = session.turn(number, screen(first_screen + number, SCREEN_SIZE))
    figures = {
        "ttft_s": answer.ttft_s,
        "prompt_tokens": answer.prompt_tokens,
        "prefilled_tokens": answer.prompt_tokens - answer.cached_tokens,
    }
    for name in ("encode_ms", "prefill_ms", "prompt_ms"):  # llama.cpp's prompt_ms holds both of ours
        if name in answer.timings:
            figures[name] = answer.timings[name]
    print(f"{server.name} {form}: {json.dumps(figures)}", file=sys.stderr)
    return figures


def measure(ours_command: list[str], theirs_command: list[str], repeats: int) -> dict[str, Any]:
    """All repeats, and the medians."""
    trace = json.loads((Path(__file__).parent / "agent_trace_steps.json").read_text())
    samples: dict[str, dict[str, list[dict[str, float]]]] = {form: {} for form in FORMS}
    with (
        Server("autoglm", ours_command) as ours,
        Server("llama.cpp", theirs_command) as theirs,
    ):
        for server in (ours, theirs):  # page faults, clocks, the system prompt
            Session(server, trace, "kept").turn(0, screen(0, SCREEN_SIZE))
        for repeat in range(repeats):
            for form in FORMS:
                first_screen = 1 + TURNS * (len(FORMS) * repeat + FORMS.index(form))
                for server in (ours, theirs) if repeat % 2 == 0 else (theirs, ours):
                    samples[form].setdefault(server.name, []).append(play(server, trace, form, first_screen))
    results: dict[str, Any] = {}
    for form, servers in samples.items():
        sizes = {turn["prompt_tokens"] for turns in servers.values() for turn in turns}
        if len(sizes) != 1:
            raise SystemExit(f"the same turn became prompts of {sorted(sizes)} tokens; nothing is compared")
        ttft_s = {name: statistics.median(turn["ttft_s"] for turn in turns) for name, turns in servers.items()}
        results[form] = {
            "median_ttft_s": ttft_s,
            "ratio": ttft_s["llama.cpp"] / ttft_s["autoglm"],
            "samples": servers,
        }
    return results


def table(results: dict[str, Any]) -> str:
    rows = [f"{'screenshots of earlier turns':<30}{'llama.cpp':>18}{'autoglm':>18}{'ratio':>8}{'target':>8}"]
    for form, result in results["forms"].items():
        cells = []
        for name in ("llama.cpp", "autoglm"):
            times = [turn["ttft_s"] for turn in result["samples"][name]]
            cells.append(f"{result['median_ttft_s'][name]:.2f} ± {(max(times) - min(times)) / 2:.2f} s")
        target = f"{TARGET_RATIO:.1f}" if form == "kept" else ""
        rows.append(f"{form:<30}{cells[0]:>18}{cells[1]:>18}{result['ratio']:>8.2f}{target:>8}")
    return "\n".join([*rows, "(time to first token of the fourth turn, median ± half the range)"])


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(FORMS), figsize=(2.8 * len(FORMS), 3.6))
    for axis, (form, result) in zip(axes, results["forms"].items(), strict=True):
        values = [result["median_ttft_s"][name] for name in ("llama.cpp", "autoglm")]
        draw_pair(axis, values, f"4th turn, screenshots {form}\n{result['ratio']:.2f} times as fast")
    axes[0].set_ylabel("seconds to the first token")
    save_figure(figure, results, path)


def main() -> None:
    arguments = run_options(__doc__, repeats=3).parse_args()
    commands = [autoglm_command(CTX_SIZE, arguments.threads), llama_command(CTX_SIZE, arguments.threads, 1)]
    results = {**about(arguments.threads, commands), "target_ratio": TARGET_RATIO}
    results["forms"] = measure(*commands, 1 if arguments.quick else arguments.repeats)
    print(table(results))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "agent_turn.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, arguments.output / "agent_turn.png")
    print(f"written: {arguments.output}/agent_turn.json and .png")


if __name__ == "__main__":
    main()
