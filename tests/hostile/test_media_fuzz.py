"""Damaged pictures and sounds sent to a served Nano: each is answered or refused with a 400, and memory stays bounded.

python -m tests.hostile.test_media_fuzz 5000     # the long version, with a report
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx
import psutil

from tests.cli.serving import ServerProcess, serving
from tests.hostile.media_bodies import media_bodies
from tests.media.mutations import picture_seeds, sound_seeds
from tests.media.parts import audio_url, image_url

CONCURRENCY = 4


def check(response: httpx.Response) -> str:
    """A success, or a refusal that names the part and quotes none of it."""
    about = f"{response.status_code} {response.text[:500]}"
    if response.status_code == 200:
        assert response.json()["choices"][0]["finish_reason"] in ("length", "stop"), about
        return "200"
    error = response.json()["error"]
    assert response.status_code == 400 and set(error) == {"message", "type", "param", "code"}, about
    assert str(error["param"]).startswith("messages[0].content[0]") and 0 < len(error["message"]) <= 300, about
    return f"400 {error['code']}"


@dataclass
class Outcome:
    """Replies by status and code; bytes of the process, the most while attacked and what it held between the halves."""

    replies: Counter[str]
    peak_bytes: int
    held_bytes: list[int]


async def attack(server: ServerProcess, count: int) -> Outcome:
    process = psutil.Process(server.process.pid)
    outcome = Outcome(Counter(), 0, [])
    bodies = iter(media_bodies(count))

    async def work(client: httpx.AsyncClient, bodies: Iterator[dict[str, Any]]) -> None:
        for body in bodies:
            outcome.replies[check(await client.post("/chat/completions", content=json.dumps(body).encode()))] += 1
            outcome.peak_bytes = max(outcome.peak_bytes, process.memory_info().rss)

    async with httpx.AsyncClient(
        base_url=server.url, timeout=60, headers={"content-type": "application/json"}
    ) as client:
        for part in [image_url(file) for file in picture_seeds()] + [audio_url(file) for file in sound_seeds()]:
            reply = await client.post("/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
            assert reply.status_code == 200, "an undamaged file is answered"
        for _ in range(2):
            half = islice(bodies, count // 2)
            await asyncio.gather(*(work(client, half) for _ in range(CONCURRENCY)))
            outcome.held_bytes.append(process.memory_info().rss)
        metrics = (await client.get(server.url.removesuffix("/v1") + "/metrics")).text
    assert re.search(r"^autoglm_kv_blocks_used 0", metrics, re.MULTILINE)
    assert not re.search(r'^autoglm_requests_total\{[^}]*status="5', metrics, re.MULTILINE)
    return outcome


def budget_bytes(server: ServerProcess) -> float:
    """What the server may come to, as its log said."""
    [total] = [line for line in server.lines if line.startswith("INFO: Memory: all together")]
    match = re.search(r"([\d.]+) GB ", total)
    assert match
    return float(match[1]) * 1e9


async def test_damaged_media_are_answered_or_refused() -> None:
    with serving("-m", "nano") as server:
        outcome = await attack(server, 400)
        assert server.process.poll() is None
        log = "\n".join(server.lines)
    assert outcome.peak_bytes < budget_bytes(server)
    assert outcome.held_bytes[1] - outcome.held_bytes[0] < 64 << 20
    assert sum(outcome.replies.values()) == 400
    # Both ways must have been gone often, and refused for more than one reason, or little was tried.
    assert outcome.replies["200"] > 60 and len(outcome.replies) >= 6, outcome
    assert "Traceback" not in log and "ERROR" not in log


def main(count: int) -> None:
    with serving("-m", "nano") as server:
        started_s = time.monotonic()
        outcome = asyncio.run(attack(server, count))
        print(f"{count} requests in {time.monotonic() - started_s:.0f} s")
        for name, number in outcome.replies.most_common():
            print(f"  {number:6,}  {name}")
        held = " and ".join(f"{size / 1e6:.0f}" for size in outcome.held_bytes)
        print(f"peak {outcome.peak_bytes / 1e6:.0f} of {budget_bytes(server) / 1e6:.0f} MB; after each half {held} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]))
