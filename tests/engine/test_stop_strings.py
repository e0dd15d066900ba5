"""Stop strings: nothing of one leaks, nothing else is lost, and token cuts do not matter."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoglm.engine.stop_strings import StopStrings


def reference(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Look at every prefix: the first that ends in a stop string is cut before it (the longest if several do)."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def stream(pieces: list[str], stop: tuple[str, ...]) -> tuple[list[str], str | None]:
    matcher, sent = StopStrings(stop), []
    for piece in pieces:
        sent.append(matcher.push(piece))
        if matcher.found is not None:
            return sent, matcher.found
    return [*sent, matcher.flush()], None


stops = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4).map(tuple)


@settings(max_examples=500)
@given(pieces=st.lists(st.text("abc", max_size=4), max_size=20), stop=stops)
@example(pieces=["xa", "b", "c"], stop=("abc", "b"))
@example(pieces=["aab", "aaab"], stop=("aaab",))
@example(pieces=["ababab", "c"], stop=("ababc",))
def test_streamed_equals_whole(pieces: list[str], stop: tuple[str, ...]) -> None:
    sent, found = stream(pieces, stop)
    text, expected = reference("".join(pieces), stop)
    assert ("".join(sent), found) == (text, expected)


@settings(max_examples=300)
@given(pieces=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=15), stop=stops)
def test_what_was_sent_never_ends_in_the_start_of_a_stop_string(pieces: list[str], stop: tuple[str, ...]) -> None:
    """After every push: whatever comes next, no sent character can turn out to belong to a stop string."""
    matcher, sent = StopStrings(stop), ""
    for i, piece in enumerate(pieces):
        sent += matcher.push(piece)
        if matcher.found is not None:
            return
        so_far = "".join(pieces[: i + 1])
        held = so_far[len(sent) :]
        starts = {s[:k] for s in stop for k in range(1, len(s))}
        longest = max((len(p) for p in starts if so_far.endswith(p)), default=0)
        assert len(held) == longest, "all of the possible stop string is kept, and no more than that"


def test_flush_gives_back_what_was_held() -> None:
    matcher = StopStrings(("</answer>",))
    assert matcher.push("done</ans") == "done"
    assert matcher.flush() == "</ans"


def test_without_stop_strings_text_passes() -> None:
    matcher = StopStrings(())
    assert matcher.push("anything") == "anything" and matcher.flush() == ""
