"""Whose turn it is on the page, and who still waits for an answer; there is no Gradio here."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qs

from .attack import Cancelled, Refused

T = TypeVar("T")


@dataclass(eq=False)
class Ticket:
    """A request that waits or runs.

    Attributes:
        user: The browser tab or client that sent it; an address, where the sender did not say.
        streams: Under which names its sender may listen for the answer.
        arrived: When it came, in seconds of the monotonic clock.
        running: Whether its turn has come.
        stopped: Whether its sender wants no answer any more.
    """

    user: str
    streams: tuple[str, ...]
    arrived: float
    running: bool = False
    stopped: bool = False


class Visitors:
    """Lets requests run in the order in which they came, few at once and one per user, for as long as somebody listens.

    Gradio's own queue does not know users, goes on with what runs when a browser leaves, and answers senders that never listen.
    Everything here happens on the server's event loop; only the work itself is done in threads.
    """

    RUNNING = 2  # requests at once
    WAITING = 3  # requests of a user that wait while another one of them runs
    GRACE = 3.0  # seconds from a request to the moment when its sender listens
    POLL = 0.05  # seconds

    def __init__(self) -> None:
        self._listening: Counter[str] = Counter()
        self._line: list[Ticket] = []

    def watch(self, app: Any) -> Any:
        """Wraps the server's application, to see who listens."""

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            stream = listened(scope)
            scope["arrived"] = time.monotonic()
            if stream is None:
                return await app(scope, receive, send)
            self._listening[stream] += 1
            try:
                await app(scope, receive, send)
            finally:
                self._listening[stream] -= 1
                if not self._listening[stream]:
                    del self._listening[stream]

        return watched

    async def serve(
        self, request: Any, event: str, work: Callable[[Callable[[], bool]], T], wait: Callable[[int], None]
    ) -> T:
        """Does the work of a request when its turn comes.

        Args:
            request: The `gr.Request`.
            event: Gradio's number of the request.
            work: What is done in a thread; it is given a function that tells whether to stop.
            wait: Told how many requests come first, whenever that has changed.

        Returns:
            What `work` returns.

        Raises:
            Refused: The user has too many requests here, or nobody listens for the answer.
            Cancelled: The page wants no answer any more.
        """
        session = str(request.session_hash)
        user = session if session != event else f"address {request.client.host}"
        ticket = Ticket(user, (session, event), request.request.scope["arrived"])
        if sum(other.user == user for other in self._line) > self.WAITING:
            raise Refused(
                f"One request of yours runs here and {self.WAITING} wait, which is the most; send more when one is answered."
            )
        self._line.append(ticket)
        try:
            await self._turn(ticket, wait)
            return await self._run(ticket, work)
        finally:
            self._line.remove(ticket)

    def stop(self, session: str | None) -> None:
        """Cancels what a browser tab has asked for."""
        for ticket in self._line:
            ticket.stopped |= ticket.user == session

    async def _turn(self, ticket: Ticket, wait: Callable[[int], None]) -> None:
        told = 0
        while (first := self._first(ticket)) > 0:
            self._check(ticket)
            if first != told:
                wait(told := first)
            await asyncio.sleep(self.POLL)
        ticket.running = True

    def _first(self, ticket: Ticket) -> int:
        """Returns how many requests have to be answered before one can run."""
        running = [other for other in self._line if other.running]
        mine = {other.user for other in running}
        before = self._line[: self._line.index(ticket)]
        own = sum(other.user == ticket.user for other in before)
        ready = [other for other in before if not other.running and other.user not in mine]
        return max(own, len({other.user for other in ready}) + len(running) - self.RUNNING + 1)

    async def _run(self, ticket: Ticket, work: Callable[[Callable[[], bool]], T]) -> T:
        over = threading.Event()
        done = asyncio.ensure_future(asyncio.to_thread(work, over.is_set))
        try:
            while not done.done():
                self._check(ticket)
                await asyncio.wait({done}, timeout=self.POLL)
            if ticket.stopped:
                raise Cancelled
            return done.result()
        finally:  # also when Gradio cancels this: a turn is over when its thread is
            over.set()
            await asyncio.gather(done, return_exceptions=True)

    def _check(self, ticket: Ticket) -> None:
        if ticket.stopped:
            raise Cancelled
        if time.monotonic() > ticket.arrived + self.GRACE and not any(s in self._listening for s in ticket.streams):
            raise Refused("Nobody listened for the answer, so the request was cancelled.")


def listened(scope: Any) -> str | None:
    """Returns under which name an HTTP request listens for answers: a session, or the number of a single request."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return None
    if scope["path"].endswith("/queue/data"):
        return next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])), None)
    found = re.search(r"/call/(?:v2/)?\w+/(\w+)/?$", scope["path"])
    return found[1] if found else None
