from __future__ import annotations

import threading

import pytest

from pipeline.weights.stream import Stream


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a stream knows that it has failed: threads that wait for it go on no earlier."""
    event = threading.Event()
    whole = Stream._fail

    def fail(stream: Stream, error: BaseException) -> None:
        whole(stream, error)
        event.set()

    monkeypatch.setattr(Stream, "_fail", fail)
    return event
