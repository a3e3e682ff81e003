"""Who still waits for an answer of the page of `capt-peft app`; there is no Gradio here."""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs


class Visitors:
    """Who waits for an answer: a request runs while somebody listens, and only the last one of each visitor does.

    Gradio itself forgets those that wait in its queue when a browser leaves, but neither those that run nor those of a client
    that never listened, and 30 of these would hold the page for a minute.
    """

    GRACE = 3.0  # seconds from a request to the moment when its sender listens

    def __init__(self) -> None:
        self._listening: Counter[str] = Counter()
        self._left: deque[str] = deque(maxlen=1000)
        self._latest: dict[str, object] = {}
        self._lock = threading.Lock()

    def watch(self, app: Any) -> Any:
        """Wraps the server's application, to see who listens."""

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            session = listener(scope)
            scope["arrived"] = time.monotonic()
            if session is None:
                return await app(scope, receive, send)
            with self._lock:
                self._listening[session] += 1
            try:
                await app(scope, receive, send)
            finally:
                with self._lock:
                    self._listening[session] -= 1
                    if not self._listening[session]:
                        del self._listening[session]
                        self._left.append(session)

        return watched

    @contextmanager
    def request(self, request: Any) -> Iterator[Callable[[], bool]]:
        """Gives a function that tells whether this `gr.Request` is cancelled: its sender left, or has sent another one."""
        me = object()
        session, arrived = str(request.session_hash or id(me)), request.request.scope.get("arrived", math.inf)
        with self._lock:
            self._latest[session] = me

        def cancelled() -> bool:
            with self._lock:
                replaced = self._latest.get(session) is not me
                return replaced or (self._is_gone(session) and time.monotonic() > arrived + self.GRACE)

        try:
            yield cancelled
        finally:
            with self._lock:
                if self._latest.get(session) is me:
                    del self._latest[session]

    def _is_gone(self, session: str) -> bool:
        # who listens under the number of a request, and not of a session, has that as its session, unless it gave one
        known = session in self._left or re.fullmatch("[0-9a-f]{32}", session) is not None
        return known and session not in self._listening


def listener(scope: Any) -> str | None:
    """Returns for whose answers an HTTP request waits: a session, or the number of a single request."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return None
    if scope["path"].endswith("/queue/data"):
        return next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])), None)
    found = re.search(r"/call/(?:v2/)?\w+/(\w+)/?$", scope["path"])
    return found[1] if found else None
