"""Whose turn it is: what the page's server is asked, on an event loop, without a server."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from capt_peft.commands.app.attack import Cancelled, Refused
from capt_peft.commands.app.visitors import Visitors, listened


class Server:
    """Requests of users, whose work ends when the test says so."""

    def __init__(self):
        self.visitors, self.started, self.ends, self.told = Visitors(), [], {}, {}

    def send(self, name, session, arrived=None):
        """Sends a request of this name, which nobody listens to after its grace."""
        self.ends[name] = threading.Event()
        scope = {"arrived": time.monotonic() if arrived is None else arrived}
        request = SimpleNamespace(
            session_hash=session or name, client=SimpleNamespace(host="1.2.3.4"), request=SimpleNamespace(scope=scope)
        )

        def work(over):
            self.started.append(name)
            while not self.ends[name].wait(0.01):
                if over():
                    raise Cancelled
            return name

        def wait(first):
            self.told[name] = first

        return asyncio.create_task(self.visitors.serve(request, name, work, wait))

    async def end(self, name, task):
        self.ends[name].set()
        assert await asyncio.wait_for(task, 5) == name
        await asyncio.sleep(3 * Visitors.POLL)


def on_a_loop(test):
    """Runs a test on an event loop."""

    def run():
        asyncio.run(asyncio.wait_for(test(Server()), 30))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@on_a_loop
async def test_two_users_run_at_once_and_each_user_one_request(server):
    tasks = {}
    for name, session in (("a1", "a"), ("a2", "a"), ("b1", "b"), ("c1", "c")):
        tasks[name] = server.send(name, session)
        await asyncio.sleep(0.05)
    assert server.started == ["a1", "b1"] and server.told == {"a2": 1, "c1": 1}
    await server.end("b1", tasks["b1"])
    assert server.started == ["a1", "b1", "c1"]
    await server.end("a1", tasks["a1"])
    assert server.started == ["a1", "b1", "c1", "a2"]
    await server.end("a2", tasks["a2"])
    await server.end("c1", tasks["c1"])
    assert server.visitors._line == []


@on_a_loop
async def test_a_user_who_sends_too_many_is_told_and_another_is_not(server):
    tasks = [server.send(f"a{i}", "a") for i in range(4)]
    await asyncio.sleep(0.05)
    with pytest.raises(Refused, match="One request of yours runs here and 3 wait"):
        await server.send("a4", "a")
    await server.end("b0", server.send("b0", "b"))
    server.visitors.stop("a")
    assert all(isinstance(error, Cancelled) for error in await asyncio.gather(*tasks, return_exceptions=True))


@on_a_loop
async def test_senders_without_a_session_are_known_by_their_address(server):
    tasks = [server.send(f"number{i}", None) for i in range(4)]
    await asyncio.sleep(0.05)
    with pytest.raises(Refused, match="which is the most"):
        await server.send("number4", None)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert server.visitors._line == [] and server.started == ["number0"]


@on_a_loop
async def test_what_nobody_listens_to_is_cancelled_whether_it_runs_or_waits(server):
    old = time.monotonic() - Visitors.GRACE + 0.3
    tasks = [server.send(f"a{i}", "a", old) for i in range(2)]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in tasks)
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert ["Nobody listened" in str(error) for error in errors] == [True, True]
    assert server.started == ["a0"]


@on_a_loop
async def test_who_listens_for_a_session_or_a_single_request_is_not_forgotten(server):
    async def streaming(scope, receive, send):
        await hanging.wait()

    hanging, streams = asyncio.Event(), []
    watched = server.visitors.watch(streaming)
    for path, query in (("/gradio_api/queue/data", b"session_hash=a"), ("/gradio_api/call/attack/b0", b"")):
        scope = {"type": "http", "method": "GET", "path": path, "query_string": query}
        streams.append(asyncio.create_task(watched(scope, None, None)))
    await asyncio.sleep(0)
    tasks = {name: server.send(name, session, time.monotonic() - 60) for name, session in (("a0", "a"), ("b0", "b"))}
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in tasks.values())
    await server.end("a0", tasks["a0"])
    hanging.set()  # both streams end, and with them the wish for an answer
    with pytest.raises(Refused, match="Nobody listened"):
        await tasks["b0"]


@on_a_loop
async def test_a_turn_that_gradio_cancels_ends_when_its_thread_does(server):
    task = server.send("a", "a")
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.started == ["a"] and server.visitors._line == []


def test_other_requests_are_not_listeners():
    scope = {"type": "http", "method": "GET", "path": "/gradio_api/info", "query_string": b""}
    assert listened(scope) is None and listened({"type": "lifespan"}) is None
    assert listened({**scope, "method": "POST", "path": "/gradio_api/call/attack"}) is None
