"""JSON over HTTP with a server that may be busy, slow, broken or hostile: every failure is one `InputError`.

- A request has a deadline with all its attempts, however the server spends the time.
- A reply has a largest size, and is refused if it is compressed: a small one could unpack to any size.
- Redirects are not followed. They could lead to another host, which would get the images.
- Only what may succeed when tried again is tried again: a lost connection, a busy server, an internal error.
- An address of this machine is never asked through a proxy. For others the environment decides (HTTP_PROXY,
  HTTPS_PROXY, ALL_PROXY, NO_PROXY), because a proxy may be the only way to them.

The requests run in an event loop of a thread of their own, so that this works inside of another loop too (notebooks).
"""

from __future__ import annotations

import contextlib
import email.utils
import ipaddress
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
import anyio.from_thread
import anyio.to_thread
import httpx2

from cwdpo_trainer.errors import InputError, describe, shorten
from cwdpo_trainer.files import RepeatedKey, unique_keys

DEADLINE = 600.0  # seconds for a request, with all its attempts
CONNECT = 30.0  # seconds to connect, in each attempt
PAUSES = (1.0, 5.0, 20.0)  # seconds before each further attempt
LONGEST_PAUSE = 60.0  # seconds, if the server asks for a pause
REQUESTS = 16  # at a time, so that the server can batch them
SHOWN_BYTES = 500  # of a reply that reports a failure
HEADERS = {"Accept": "application/json", "Accept-Encoding": "identity"}

Value = TypeVar("Value")


@dataclass(frozen=True)
class Call:
    """A request to `url`: a POST of the JSON that `body` returns, or a GET if it is None. The reply has at most
    `largest` bytes."""

    url: str
    largest: int
    body: Callable[[], Any] | None = None


class _Failure(Exception):
    """An attempt that failed: what was expected and what came. `pause`: seconds after which another may succeed, or
    None if none can."""

    def __init__(self, expected: str, got: str, pause: float | None = None) -> None:
        super().__init__(expected, got)
        self.expected, self.got, self.pause = expected, got, pause


def exchange(where: str, calls: Sequence[Call], read: Callable[[Call, Any], Value]) -> list[Value]:
    """What `read` makes of the reply to each of `calls`, a JSON value. At most `REQUESTS` are asked at a time.

    Raises `InputError(where, ...)` about the first call that fails, and whatever `read` and the bodies raise.
    """
    with anyio.from_thread.start_blocking_portal() as portal:
        return portal.call(_exchange, where, calls, read)


async def _exchange(where: str, calls: Sequence[Call], read: Callable[[Call, Any], Value]) -> list[Value]:
    values: dict[int, Value] = {}
    errors: list[Exception] = []
    limiter = anyio.CapacityLimiter(REQUESTS)

    async def run(index: int, call: Call) -> None:
        try:
            async with limiter:
                values[index] = read(call, await _ask(client, where, call))
        except Exception as error:  # one error for the caller, instead of a group of them
            errors.append(error)
            group.cancel_scope.cancel()

    async with _client(where, calls) as client, anyio.create_task_group() as group:
        for index, call in enumerate(calls):
            group.start_soon(run, index, call)
    if errors:
        raise errors[0]
    return [values[index] for index in range(len(calls))]


@contextlib.asynccontextmanager
async def _client(where: str, calls: Sequence[Call]) -> AsyncIterator[httpx2.AsyncClient]:
    use_environment = not all(_is_this_machine(call.url) for call in calls)
    try:
        client = httpx2.AsyncClient(
            headers=HEADERS,
            timeout=httpx2.Timeout(None, connect=CONNECT),
            limits=httpx2.Limits(max_connections=REQUESTS),
            follow_redirects=False,
            trust_env=use_environment,
        )
    except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:  # its text may have a password
        expected = "proxies and certificates that can be used (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE)"
        raise InputError(where, "environment", expected, f"a {type(error).__name__} from them") from None
    async with client:
        yield client


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


async def _ask(client: httpx2.AsyncClient, where: str, call: Call) -> Any:
    """The JSON value of the reply, after as many attempts as it takes."""
    content = None if call.body is None else json.dumps(await anyio.to_thread.run_sync(call.body)).encode()
    failure = _Failure("an answer", "none")
    try:
        with anyio.fail_after(DEADLINE):
            for attempt in range(1, len(PAUSES) + 2):
                try:
                    return await _attempt(client, call, content)
                except _Failure as error:
                    failure = error
                if failure.pause is None or attempt > len(PAUSES):
                    break
                await _pause(max(PAUSES[attempt - 1], failure.pause))
    except TimeoutError:
        last = "" if failure.pause is None else f"; before: {failure.got}"
        raise InputError(where, call.url, f"an answer within {DEADLINE:g} seconds", f"none{last}") from None
    tried = f" ({attempt} attempts)" if attempt > 1 else ""
    raise InputError(where, call.url, failure.expected, failure.got + tried)


async def _pause(seconds: float) -> None:
    await anyio.sleep(seconds)


async def _attempt(client: httpx2.AsyncClient, call: Call, content: bytes | None) -> Any:
    try:
        request = client.build_request(
            "GET" if content is None else "POST", call.url, content=content,
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        response = await client.send(request, stream=True)
        try:
            await _check_status(response)
            return _parse(await _read(response, call.largest))
        finally:
            await response.aclose()
    except httpx2.TransportError as error:  # no connection, or one that broke
        raise _Failure("an answer", describe(error), pause=0.0) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
        raise _Failure("an answer", describe(error)) from error


async def _check_status(response: httpx2.Response) -> None:
    """Raise `_Failure` unless the server answered the request."""
    status = response.status_code
    if status == 200:
        return
    if response.has_redirect_location:
        target = shorten(response.headers["Location"], 100)
        raise _Failure("an answer", f"{status}, a redirect to {target} (redirects are not followed)")
    text = (await _start(response)).decode(errors="replace")
    pause = _wanted_pause(response.headers.get("Retry-After", "")) if status in (408, 429) or status >= 500 else None
    raise _Failure("an answer", shorten(f"{status} {text}"), pause)


async def _start(response: httpx2.Response) -> bytes:
    """The first bytes of a reply."""
    data = b""
    async for chunk in response.aiter_raw(SHOWN_BYTES):
        data += chunk
        if len(data) >= SHOWN_BYTES:
            break
    return data[:SHOWN_BYTES]


def _wanted_pause(text: str) -> float:
    """Seconds that the header Retry-After asks for (a number of seconds, or a date), at most `LONGEST_PAUSE`."""
    if text.isascii() and text.isdigit():
        seconds = float(text[:10])
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            seconds = 0.0
    return min(max(seconds, 0.0), LONGEST_PAUSE)


async def _read(response: httpx2.Response, largest: int) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise _Failure("an answer that is not compressed", f"the encoding {shorten(encoding, 40)}")
    parts, size = [], 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > largest:
            raise _Failure(f"an answer of at most {largest} bytes", "more")
        parts.append(chunk)
    return b"".join(parts)


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_refuse, object_pairs_hook=unique_keys)
    except RepeatedKey as error:
        raise _Failure(error.EXPECTED, str(error)) from error
    except RecursionError:
        problem = "brackets that are nested too deeply"
    except ValueError as error:  # no JSON, no UTF-8, or a number with thousands of digits
        problem = f"{describe(error)} in {shorten(repr(data[:80]), 100)}"
    raise _Failure("valid JSON", problem)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
