"""What a reader of a generation is told, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from fxlm.server.bridge import Delta, Generation, drained, merged


def delta(text: str, **more: Any) -> Delta:
    return Delta(prompt=0, index=0, text=text, token_ids=[len(text)], **more)


@pytest.fixture
def generation() -> Generation:
    made = Generation(bridge=cast(Any, None), jobs=[], record=cast(Any, SimpleNamespace()))
    made.runs = [cast(Any, SimpleNamespace(unfinished={0}))]
    return made


def test_a_reader_of_the_whole_is_told_once(generation: Generation) -> None:
    generation.whole = True
    generation.tell(delta("a"))
    generation.tell(delta("bc"))
    assert generation.news.empty()
    generation.runs[0].unfinished.clear()
    generation.tell(delta("", finish_reason="stop", stop_reason=7))
    (found,) = merged(list(drained(generation.news)))
    assert (found.text, found.token_ids) == ("abc", [1, 2, 0])
    assert (found.finish_reason, found.stop_reason) == ("stop", 7)


def test_a_reader_of_a_stream_is_told_at_once(generation: Generation) -> None:
    generation.tell(delta("a"))
    assert generation.news.qsize() == 1


def test_a_failure_comes_at_once_after_what_came_before(generation: Generation) -> None:
    generation.whole = True
    generation.tell(delta("a"))
    generation.tell(ValueError("lost"))
    news = merged(list(drained(generation.news)))
    assert next(news).text == "a"
    with pytest.raises(ValueError, match="lost"):
        next(news)
