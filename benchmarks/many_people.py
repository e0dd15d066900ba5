"""Sixteen people at once on autoglm's server beside llama.cpp's: time to first token, and tokens per second in all.

    python benchmarks/many_people.py [--quick] [--threads N] [--repeats N] [--arrivals-s S] [--people N] [--slots N N]

Everybody sends one streamed chat: a system prompt all share, an earlier question and answer of their own, and then
every other one a new 540x1200 screenshot (817 tokens on both servers) with a question, the rest some 200 tokens of
text. Every answer has 64 tokens. All ask at the same moment, or with --arrivals-s at the times of a Poisson process
with that mean gap, seeded, the same for all servers.

A round starts each server in turn, so that it has machine and memory to itself, lets it answer everybody's first
question once, all at a time and one token each (so every slot has the system prompt), and then measures one crowd.
llama.cpp runs with a slot for each person and with four (--slots); the one with the lower median p95 stands for it in
times to first token, the one with more tokens per second in that. Rounds have pictures and words of their own.
"""

from __future__ import annotations

import concurrent.futures
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from compare_llamacpp import draw_pair, save_figure
from peer_servers import SCREEN_SIZE, Answer, Server, about, ask, autoglm_command, llama_command, positive, run_options
from served import screen

SYSTEM_CHARACTERS = 760  # 450 tokens: the random vocabulary is poorer than GLM's
ANSWER_TOKENS = 64
CTX_SIZE = 2048
TARGET_RATIO = 3.0

Messages = list[dict[str, Any]]


def crowd(seed: int, num_people: int) -> list[Messages]:
    """What each of them sends."""
    rng = np.random.default_rng(seed)
    trace = json.loads((Path(__file__).parent / "agent_trace_steps.json").read_text())
    vocabulary = sorted(set(trace["system"].split()))

    def words(count: int) -> str:
        return " ".join(rng.choice(vocabulary, count).tolist())

    found = []
    for person in range(num_people):
        last: Any = words(70)
        if person % 2 == 0:
            picture = screen(seed * num_people + person, SCREEN_SIZE)
            last = [picture, {"type": "text", "text": words(10)}]
        found.append(
            [
                {"role": "system", "content": trace["system"][:SYSTEM_CHARACTERS]},
                {"role": "user", "content": words(20)},
                {"role": "assistant", "content": words(20)},
                {"role": "user", "content": last},
            ]
        )
    return found


def arrivals_s(seed: int, num_people: int, mean_gap_s: float) -> list[float]:
    """Seconds after the start at which each of them asks; the first at 0."""
    gaps_s = np.random.default_rng(seed).exponential(mean_gap_s, num_people)
    return [0.0, *np.cumsum(gaps_s[:-1]).tolist()]


def ask_all(server: Server, requests: list[Messages], at_s: list[float], max_tokens: int) -> list[Answer]:
    """Every request at its time, from a thread of its own."""
    begin_s = time.perf_counter()

    def one(messages: Messages, delay_s: float) -> Answer:
        time.sleep(max(0.0, begin_s + delay_s - time.perf_counter()))
        return ask(server.port, messages, max_tokens)

    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(one, requests, at_s))


def play(name: str, command: list[str], seed: int, num_people: int, mean_gap_s: float) -> dict[str, Any]:
    """One crowd on a server started for it."""
    requests = crowd(seed, num_people)
    with Server(name, command) as server:
        ask_all(server, [messages[:2] for messages in requests], [0.0] * num_people, 1)
        answers = ask_all(server, requests, arrivals_s(seed, num_people, mean_gap_s), ANSWER_TOKENS)
    ttft_s = [answer.ttft_s for answer in answers]
    gaps_s = [gap for answer in answers for gap in answer.gaps_s]
    wall_s = max(answer.token_times_s[-1] for answer in answers) - min(answer.asked_s for answer in answers)
    figures = {
        "ttft_p50_s": float(np.percentile(ttft_s, 50)),
        "ttft_p95_s": float(np.percentile(ttft_s, 95)),
        "tokens_per_s": len(answers) * ANSWER_TOKENS / wall_s,
        "gap_median_s": statistics.median(gaps_s),
        "gap_p99_s": float(np.percentile(gaps_s, 99)),
        "gap_worst_s": max(gaps_s),
        "ttft_s": [round(value, 3) for value in ttft_s],
        "prompt_tokens": [answer.prompt_tokens for answer in answers],
        "prefilled_tokens": sum(answer.prompt_tokens - answer.cached_tokens for answer in answers),
    }
    told = {key: round(value, 2) for key, value in figures.items() if isinstance(value, float)}
    print(f"{name}: {json.dumps(told)}, {figures['prefilled_tokens']} tokens prefilled", file=sys.stderr)
    return figures


def measure(commands: dict[str, list[str]], rounds: int, num_people: int, mean_gap_s: float) -> dict[str, Any]:
    """All rounds, the servers in turn and in turns of order, and the medians."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name in list(commands) if number % 2 == 0 else reversed(commands):
            samples[name].append(play(name, commands[name], number + 1, num_people, mean_gap_s))
        if len({tuple(plays[-1]["prompt_tokens"]) for plays in samples.values()}) != 1:
            raise SystemExit("the servers made the same chats into prompts of different lengths; nothing is compared")
    medians = {
        name: {key: statistics.median(p[key] for p in plays) for key, v in plays[0].items() if isinstance(v, float)}
        for name, plays in samples.items()
    }
    peers = [name for name in commands if name != "autoglm"]
    first = min(peers, key=lambda name: medians[name]["ttft_p95_s"])
    speed = max(peers, key=lambda name: medians[name]["tokens_per_s"])
    return {
        "samples": samples,
        "medians": medians,
        "best_llama_cpp": {"ttft_p95_s": first, "tokens_per_s": speed},
        "ratio": {
            "ttft_p95_s": medians[first]["ttft_p95_s"] / medians["autoglm"]["ttft_p95_s"],
            "tokens_per_s": medians["autoglm"]["tokens_per_s"] / medians[speed]["tokens_per_s"],
        },
        "target_ratio": TARGET_RATIO,
    }


def table(results: dict[str, Any]) -> str:
    columns = ("ttft_p50_s", "ttft_p95_s", "tokens_per_s", "gap_median_s", "gap_p99_s", "gap_worst_s")
    rows = [f"{'':<22}" + "".join(f"{column:>14}" for column in columns)]
    for name, medians in results["medians"].items():
        rows.append(f"{name:<22}" + "".join(f"{medians[column]:>14.2f}" for column in columns))
    for figure, ratio in results["ratio"].items():
        rows.append(f"{figure}: {ratio:.2f} times {results['best_llama_cpp'][figure]}'s (target {TARGET_RATIO:.1f})")
    return "\n".join([*rows, "(medians of the rounds; gaps are between two tokens of one answer)"])


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(5.6, 3.6))
    titles = {"ttft_p95_s": "p95 of time to first token", "tokens_per_s": "tokens of all answers"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        names = (results["best_llama_cpp"][key], "autoglm")
        values = [results["medians"][name][key] for name in names]
        draw_pair(axis, values, f"{results['people']} people, {title}\n{results['ratio'][key]:.2f} times")
        axis.set_ylabel("seconds" if key.endswith("p95_s") else "tokens per second")
    save_figure(figure, results, path)


def main() -> None:
    parser = run_options(__doc__, repeats=2)
    parser.add_argument("--people", type=positive, default=16)
    parser.add_argument("--slots", type=positive, nargs="+", default=[16, 4], help="llama.cpp's, one server each")
    parser.add_argument("--arrivals-s", type=float, default=0.0, help="mean seconds between two of them; 0: together")
    arguments = parser.parse_args()
    commands = {"autoglm": autoglm_command(CTX_SIZE, arguments.threads)}
    for number in arguments.slots:
        commands[f"llama.cpp, {number} slots"] = llama_command(CTX_SIZE, arguments.threads, number)
    results = about(arguments.threads, list(commands.values()))
    results |= {"people": arguments.people, "arrivals_s": arguments.arrivals_s}
    rounds = 1 if arguments.quick else arguments.repeats
    results |= measure(commands, rounds, arguments.people, arguments.arrivals_s)
    print(table(results))
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "many_people_poisson" if arguments.arrivals_s else "many_people"
    (arguments.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, arguments.output / f"{name}.png")
    print(f"written: {arguments.output}/{name}.json and .png")


if __name__ == "__main__":
    main()
