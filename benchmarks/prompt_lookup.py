"""Decode with prompt lookup and without: tokens a second, and how many drafts were what the model then chose.

    python benchmarks/prompt_lookup.py [--work agent,nano,chat] [--repeats N] [--threads N]

    agent  the 20 recorded answers of agent_trace_steps.json on the 9B's layer shapes (8 layers, random weights), which
           computes them and is then told what to say. Its own vocabulary is made up, so texts are cut into tokens by
           SmolLM2's: what is copied, and in how many tokens, is as in a real one of some 50,000
    nano   typed instructions of the held-out world with their screens, answered by the shipped pair itself
    chat   SmolLM2-135M on questions, and on texts to rewrite or correct, greedy and sampled

Every prompt is asked both ways, in turns, on one loaded model; both answers must be the same. Times are of decode
alone, from the first token to the last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from served import RecordedRunner, about_the_run, load, load_text, write_results

from autoglm.chat.tokenizer import Tokenizer
from autoglm.cli.loading import LoadedModel
from autoglm.cli.served import png
from autoglm.engine.sampling import SamplingParams
from autoglm.engine.sequence import Sequence
from autoglm.formats.gguf import GGUFFile
from autoglm.media.limits import MediaLimits
from autoglm.media.pictures import decode_picture
from autoglm.train.evaluate import evaluation_examples

NUM_SCREENS = 40
MAX_ROWS = 16
HARBOUR = (
    "Anna walked to the harbour at six. The boats were still tied up, and the fishermen were mending their nets. She "
    "bought two herrings and a loaf of bread, and sat on the wall to eat."
)
CHATS = {
    "questions": [
        "What is the capital of France?",
        "Explain how a bicycle stays upright.",
        "Give me a recipe for pancakes.",
        "What is the difference between a virus and a bacterium?",
        "Write an email to my landlord about the broken heater.",
        "Write a Python function that reverses a string.",
    ],
    "texts to work on": [
        f"Rewrite this text in the past perfect: {HARBOUR}",
        f"Repeat this text word for word: {HARBOUR}",
        "Correct the mistakes: She go to school every days and learn many thing about math and physic.",
        f"Summarize this text: {HARBOUR}",
    ],
}


@dataclass
class Ask:
    """One prompt; `says` is what a recorded model answers."""

    kind: str
    loaded: LoadedModel
    prompt: list[int]
    params: SamplingParams
    picture: bytes | None = None
    says: list[int] = field(default_factory=list)

    def sequence(self, name: str) -> Sequence:
        """In a part of the prefix cache of its own, so that each way finds there what it wrote itself."""
        ids, media = self.prompt, None
        if self.picture is not None:
            assert self.loaded.multimodal is not None
            picture = decode_picture(self.picture, limits=MediaLimits(), param="screen")
            ids, media = self.loaded.multimodal.plan(ids, [picture], [])
        return Sequence(name, ids, self.params, cache_salt=name.encode(), media=media)


@dataclass
class Tally:
    """Of one kind of work, one way."""

    num_tokens: int = 0
    decode_s: float = 0.0
    num_drafted: int = 0
    num_accepted: int = 0

    def figures(self) -> dict[str, float]:
        return {
            "tokens": self.num_tokens,
            "tokens_per_s": round(self.num_tokens / self.decode_s, 2),
            "tokens_per_step": round(self.num_tokens / (self.num_tokens - self.num_accepted), 3),
            "drafted": self.num_drafted,
            "accepted": self.num_accepted,
        }


def agent_asks(threads: int) -> Iterator[Ask]:
    trace = json.loads((Path(__file__).parent / "agent_trace_steps.json").read_text())
    words = load_text("smollm2-135m", threads).tokenizer
    loaded = load_text("glm4", threads)
    history = f"{trace['system']}\n{trace['task']}\n"
    for step in trace["steps"]:
        history += f"** Screen Info **\n\n{json.dumps({'current_app': step['app']})}\n"
        answer = f"<think>{step['thought']}</think><answer>{step['action']}"
        says = words.encode(answer)
        params = SamplingParams(max_tokens=len(says), temperature=0, ignore_eos=True)
        yield Ask("agent", loaded, words.encode(history), params, says=says)
        history += f"{answer}</answer>\n"


def nano_asks(threads: int) -> Iterator[Ask]:
    loaded = load("nano", threads)
    params = SamplingParams(max_tokens=96, temperature=0, banned_token_ids=loaded.tokenizer.unused_token_ids)
    for example in evaluation_examples("typed_action", NUM_SCREENS):
        assert example.screen is not None
        content = [{"type": "image"}, {"type": "text", "text": example.typed}]
        ids = loaded.template.render_tokens(loaded.tokenizer, [{"role": "user", "content": content}])
        yield Ask("nano", loaded, ids, params, picture=png(example.screen.image))


def chat_asks(threads: int) -> Iterator[Ask]:
    loaded = load_text("smollm2-135m", threads)
    ways = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.7, "top_p": 0.9, "seed": 1}}
    for kind, texts in CHATS.items():
        for text in texts:
            ids = loaded.template.render_tokens(loaded.tokenizer, [{"role": "user", "content": text}])
            for way, params in ways.items():
                yield Ask(f"{kind}, {way}", loaded, ids, SamplingParams(max_tokens=128, **params))


def tokenizer_of(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file)


def answer(ask: Ask, name: str, tally: Tally) -> list[int]:
    """The answer's tokens; what they took is added to the tally."""
    engine, token_ids = ask.loaded.engine, []
    engine.add(ask.sequence(name))
    while engine.has_work():
        for output in engine.step():
            token_ids += output.token_ids
            if output.finish_reason is not None:
                tally.num_tokens += len(token_ids) - 1
                tally.decode_s += output.timings["decode_ms"] / 1e3
                tally.num_drafted += int(output.timings["draft_n"])
                tally.num_accepted += int(output.timings["draft_n_accepted"])
    return token_ids


def measure(asks: list[Ask], repeats: int) -> dict[str, Any]:
    """Tokens a second both ways by kind, and what steps of 1 to MAX_ROWS rows took."""
    engine = asks[0].loaded.engine
    recorded = RecordedRunner(engine.runner)
    engine.runner = recorded
    most = engine.drafter.max_tokens
    tallies = {ask.kind: {"off": Tally(), "on": Tally()} for ask in asks}
    for repeat in range(-1, repeats):  # the first round warms up, and what steps cost is learned in it
        for number, ask in enumerate(asks):
            answers = {}
            for way in ("off", "on") if (number + repeat) % 2 else ("on", "off"):
                engine.drafter.max_tokens = most if way == "on" else 0
                recorded.say(ask.says)
                tally = tallies[ask.kind][way] if repeat >= 0 else Tally()
                answers[way] = answer(ask, f"{way} {repeat}", tally)
            if answers["on"] != answers["off"] or (ask.says and answers["on"] != ask.says):
                raise SystemExit(f"{ask.kind}: the answers differ; nothing was measured")
        print(f"round {repeat + 2} of {repeats + 1}", flush=True)
    work: dict[str, Any] = {}
    for kind, tally in tallies.items():
        figures = {way: one.figures() for way, one in tally.items()}
        work[kind] = {**figures, "gain": round(figures["on"]["tokens_per_s"] / figures["off"]["tokens_per_s"], 3)}
        print(kind, work[kind], flush=True)
    costs = engine.speed.decode_costs(1, MAX_ROWS - 1)
    return {"work": work, "step_ms_by_rows": [round(cost * 1e3, 3) for cost in costs]}


WORK = {"agent": agent_asks, "nano": nano_asks, "chat": chat_asks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=",".join(WORK))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    results = about_the_run(options.threads)
    for name in options.work.split(","):
        results[name] = measure(list(WORK[name](options.threads)), options.repeats)
    write_results("prompt_lookup", results)


if __name__ == "__main__":
    main()
