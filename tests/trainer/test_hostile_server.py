"""A sampling server that is broken or hostile: one error each, in bounded time and memory."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import tracemalloc

import pytest

from cwdpo_trainer.config.arguments import SamplingArguments
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.negatives import http_json, server
from cwdpo_trainer.negatives.http_json import Call, exchange

DEADLINE = 0.6  # seconds; the drips below would take longer
LARGEST = 100_000  # bytes of a reply


class RawServer:
    """Answers each request with the bytes that `reply` yields, whatever they are. `taken` are the requests."""

    def __init__(self) -> None:
        self.reply, self.taken = list, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads = [threading.Thread(target=self.serve)]
        self.threads[0].start()

    def serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            if self.reply is None:
                connection.close()
                return
            self.threads.append(threading.Thread(target=self.answer, args=(connection,)))
            self.threads[-1].start()

    def answer(self, connection: socket.socket) -> None:
        with connection:
            request = connection.recv(65536)
            head, _, body = request.partition(b"\r\n\r\n")
            length = next((int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")), 0)
            while len(body) < length:
                body += connection.recv(65536)
            self.taken.append((head, body))
            try:
                for part in self.reply():
                    connection.sendall(part)
            except OSError:
                pass  # the client has had enough

    def close(self) -> None:
        self.reply = None
        socket.create_connection(self.listener.getsockname()).close()
        for thread in self.threads:
            thread.join()
        self.listener.close()


@pytest.fixture(scope="module")
def raw():
    started = RawServer()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    for name, value in {"DEADLINE": 60.0, "PAUSES": (0.0, 0.0, 0.0), "LONGEST_PAUSE": 0.01}.items():
        monkeypatch.setattr(http_json, name, value)


def http(body: bytes | str, status: str = "200 OK", *headers: str) -> list[bytes]:
    data = body if isinstance(body, bytes) else body.encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", "Connection: close", *headers]
    return ["\r\n".join([*lines, "", ""]).encode() + data]


def choices(*contents: object, **extra: object) -> list[bytes]:
    return http(json.dumps({"choices": [{"message": {"content": text, **extra}} for text in contents]}))


def drip(data: bytes, head: bytes = b""):
    yield head
    for index in range(len(data)):
        yield data[index : index + 1]
        time.sleep(0.05)


def endless(head: bytes, part: bytes):
    yield head
    started = time.monotonic()
    while time.monotonic() - started < 20:
        yield part


GOOD = '{"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}]}'
BOMB = gzip.compress(bytes(20_000_000), compresslevel=1)
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
LATE, LARGE = f"an answer within {DEADLINE:g} seconds", f"an answer of at most {LARGEST} bytes, got more"
ONCE, AGAIN = 1, 4  # attempts
# The reply, what the error says, and the attempts.
HOSTILE = {
    "nothing": (list, "RemoteProtocolError", AGAIN),
    "a truncated head": (lambda: [OK + b"Content-Le"], "RemoteProtocolError", AGAIN),
    "a truncated body": (lambda: [http(GOOD)[0][:-9]], "RemoteProtocolError", AGAIN),
    "a truncated chunk": (lambda: [CHUNKED, b"50\r\n{"], "RemoteProtocolError", AGAIN),
    "a chunk without a size": (lambda: [CHUNKED, b"zz\r\n{}\r\n"], "RemoteProtocolError", AGAIN),
    "a wrong length": (lambda: [OK + b"Content-Length: -5\r\n\r\n{}"], "RemoteProtocolError", AGAIN),
    "two lengths": (lambda: [OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"], "RemoteProtocolError", AGAIN),
    "a length that is too short": (lambda: [OK + b"Content-Length: 9\r\n\r\n" + GOOD.encode()], "valid JSON", ONCE),
    "another protocol": (lambda: [b"SSH-2.0-OpenSSH_9.2\r\n"], "RemoteProtocolError", AGAIN),
    "a wrong status line": (lambda: [b"HTTP/1.1 abc\r\n\r\n"], "RemoteProtocolError", AGAIN),
    "HTTP of the future": (lambda: [b"HTTP/7.0 200 OK\r\n\r\n{}"], "an object with no keys", ONCE),
    "binary": (lambda: [bytes(range(256)) * 9], "RemoteProtocolError", AGAIN),
    "endless headers": (lambda: endless(OK, b"a: b\r\n" * 9000), "RemoteProtocolError", AGAIN),
    "one endless header": (lambda: endless(OK + b"a: ", b"x" * 60_000), "RemoteProtocolError", AGAIN),
    "endless interim answers": (lambda: endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"), LATE, ONCE),
    "a byte at a time": (lambda: drip(http(GOOD)[0]), LATE, ONCE),
    "a body a byte at a time": (lambda: drip(b"1\r\n{\r\n" * 9, CHUNKED), LATE, ONCE),
    "silence": (lambda: time.sleep(2 * DEADLINE) or [], LATE, ONCE),
    "an endless body": (lambda: endless(OK + b"\r\n", b" " * 60_000), LARGE, ONCE),
    "an endless chunked body": (lambda: endless(CHUNKED, b"ea60\r\n" + b" " * 60_000 + b"\r\n"), LARGE, ONCE),
    "a large body": (lambda: http(" " * 10_000_000), LARGE, ONCE),
    "a gzip bomb": (lambda: http(BOMB, "200 OK", "Content-Encoding: gzip"),
                    "an answer that is not compressed, got the encoding gzip", ONCE),
    "a claim to be gzip": (lambda: http(GOOD, "200 OK", "Content-Encoding: GZIP"), "the encoding gzip", ONCE),
    "an endless error": (lambda: endless(b"HTTP/1.1 400 no\r\n\r\n", b"too many" * 9000), "got 400 too many", ONCE),
    "a redirect": (lambda: http("", "302 Found", "Location: http://elsewhere/v1"),
                   "302, a redirect to http://elsewhere/v1 (redirects are not followed)", ONCE),
    "a redirect to a file": (lambda: http("", "307 x", "Location: file:///etc/passwd"), "redirect to file:///", ONCE),
    "a redirect to nowhere": (lambda: http("", "301 x", "Location: http://["), "301, a redirect to http://[", ONCE),
    "a redirect to itself": (lambda: http("", "308 x", "Location: /v1/chat/completions"), "308, a redirect to", ONCE),
    "no content": (lambda: [b"HTTP/1.1 204 None\r\n\r\n"], "an answer, got 204", ONCE),
    "partial content": (lambda: http(GOOD, "206 Partial"), "an answer, got 206", ONCE),
    "refusal": (lambda: http("bad key", "401 Unauthorized"), "an answer, got 401 bad key", ONCE),
    "an internal error": (lambda: http("oops", "500 no"), "an answer, got 500 oops (4 attempts)", AGAIN),
    "a busy server": (lambda: http("", "429 Slow", "Retry-After: 1000000000000"), "got 429 (4 attempts)", AGAIN),
    "a pause that is no number": (lambda: http("", "503 no", "Retry-After: nan"), "got 503 (4 attempts)", AGAIN),
    "a pause until a wrong date": (lambda: http("", "503 no", "Retry-After: Mon, 99 Foo"), "got 503", AGAIN),
    "a terminal's escapes": (lambda: http("\x1b[2J\x00\u202e", "400 no"), "got 400 \\x1b[2J\\x00\\u202e", ONCE),
    "an empty body": (lambda: http(""), "valid JSON", ONCE),
    "HTML": (lambda: http("<html>"), "valid JSON, got JSONDecodeError", ONCE),
    "Latin 1": (lambda: http('{"choices": "é"}'.encode("latin-1")), "UnicodeDecodeError", ONCE),
    "UTF-16": (lambda: http(GOOD.encode("utf-16")), "UnicodeDecodeError", ONCE),
    "deep JSON": (lambda: http("[" * 50_000), "brackets that are nested too deeply", ONCE),
    "deep JSON that is valid": (lambda: http('{"a":' * 15_000 + "1" + "}" * 15_000), "nested too deeply", ONCE),
    "a number of 90,000 digits": (lambda: http("9" * 90_000), "valid JSON", ONCE),
    "NaN": (lambda: http('{"choices": [{"message": {"content": NaN}}]}'), "NaN is not JSON", ONCE),
    "a key twice": (lambda: http('{"choices": [], "choices": [1]}'), "once in an object, got 'choices' more", ONCE),
    "a key twice inside": (lambda: http('{"choices": [{"message": {"content": "a", "content": "b"}}]}'),
                           "each key once in an object, got 'content' more than once", ONCE),
    "Infinity": (lambda: http("-Infinity"), "-Infinity is not JSON", ONCE),
    "null": (lambda: http("null"), "a list of answers, `choices`, got null", ONCE),
    "a list": (lambda: http("[1, 2]"), "a list of answers, `choices`, got a list of 2", ONCE),
    "text": (lambda: http('"choices"'), "a list of answers, `choices`, got text", ONCE),
    "no choices": (lambda: http('{"error": {"message": "no"}}'), "got an object with error", ONCE),
    "null for choices": (lambda: http('{"choices": null}'), "got an object with choices", ONCE),
    "choices by name": (lambda: http('{"choices": {"0": 1}}'), "got an object with choices", ONCE),
    "one choice": (lambda: choices("a"), "2 choices, as sampling.samples asks for, got 1", ONCE),
    "1000 choices": (lambda: choices(*"a" * 1000), "2 choices, as sampling.samples asks for, got 1000", ONCE),
    "a failed answer": (
        lambda: http('{"choices": [{"finish_reason": "error", "message": {"content": null}}, {}]}'),
        "finished answers (finish_reason stop or length or eos_token or stop_sequence), got", ONCE,
    ),
    "choices of null": (lambda: http('{"choices": [null, null]}'), "choices with an object `message`, got null", ONCE),
    "no message": (lambda: http('{"choices": [{"text": "a"}, {}]}'), "`message`, got an object with text", ONCE),
    "a message of text": (lambda: http('{"choices": [{"message": "a"}, {}]}'), "got an object with message", ONCE),
    "parts as content": (lambda: choices([{"type": "text"}], "b"), "with content a list of 1", ONCE),
    "a number as content": (lambda: choices("a", 7), "with content a number", ONCE),
    "true as content": (lambda: choices("a", True), "with content true or false", ONCE),
    "a call of a tool": (lambda: choices("a", None, tool_calls=[{}]), "with content null", ONCE),
    "reasoning without an answer": (lambda: choices(None, "b", reasoning_content="so"), "turn off tools and rea", ONCE),
    "a lone surrogate": (lambda: http(GOOD.replace("b", "b\\ud800")), "a lone surrogate in 'b\\ud800'", ONCE),
    "a long answer": (lambda: choices("a", "b" * 2000), "answers of at most 1280 characters", ONCE),
    "an escape in a key": (lambda: http('{"\\u001b[2J\\n": 1}'), "got an object with \\x1b[2J", ONCE),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_is_one_error(raw, name, monkeypatch):
    reply, problem, attempts = HOSTILE[name]
    if problem == LATE:
        monkeypatch.setattr(http_json, "DEADLINE", DEADLINE)
    raw.reply, raw.taken = reply, []
    url = f"{raw.url}/v1/chat/completions"
    started = time.monotonic()
    with pytest.raises(InputError) as error:
        exchange(server.WHERE, [Call(url, LARGEST, dict)], lambda call, value: server._answers(call, value, 2, 1280))
    assert time.monotonic() - started < 10
    message = str(error.value)
    assert message.startswith(f"sampling.server: {url}: expected ")
    assert problem in message
    assert message.isprintable()
    assert len(message) < 600
    assert len(raw.taken) == attempts


def test_good_replies_are_read(raw):
    call = Call(f"{raw.url}/v1/chat/completions", LARGEST, dict)
    for reply in (
        http(GOOD), http(b"\xef\xbb\xbf" + GOOD.encode()), [OK + b"\r\n" + GOOD.encode()],
        [b"HTTP/1.1 100 Continue\r\n\r\n", *http(GOOD)], http(GOOD, "200 OK", "Content-Encoding: identity"),
        [CHUNKED, b"%x\r\n" % len(GOOD), GOOD.encode(), b"\r\n0\r\n\r\n"], [part[::-1][::-1] for part in http(GOOD)],
    ):  # fmt: skip
        raw.reply = lambda reply=reply: reply
        assert exchange(server.WHERE, [call], lambda call, value: server._answers(call, value, 2, 9)) == [["a", "b"]]
    raw.reply = lambda: choices(None, "")  # SGLang's empty answers
    assert exchange(server.WHERE, [call], lambda call, value: server._answers(call, value, 2, 9)) == [["", ""]]


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("null", "a list of models, `data`, got null"),
        ('{"data": {}}', "a list of models, `data`, got an object with data"),
        ('{"data": []}', "at least 1 model, got 0"),
        ('{"data": [3]}', "a model with a name, `id`, got a number"),
        ('{"data": [{"id": null}]}', "a model with a name, `id`, got an object with id"),
        ('{"data": [{"id": ""}]}', "a model with a name, `id`, got an object with id"),
    ],
)
def test_a_wrong_list_of_models_is_one_error(raw, reply, problem):
    raw.reply = lambda: http(reply)
    with pytest.raises(InputError) as error:
        server.AnswerServer.open(raw.url, [])
    assert str(error.value) == f"sampling.server: {raw.url}/v1/models: expected " + (
        problem if problem.startswith(("at", "a model")) else f"a JSON object with {problem}"
    )


def test_a_failure_ends_all_requests(raw):
    """The first error ends the others, and memory stays bounded."""
    raw.reply, raw.taken = lambda: endless(OK + b"\r\n", b" " * 60_000), []
    tracemalloc.start()
    with pytest.raises(InputError, match="of at most 100000 bytes"):
        exchange(server.WHERE, [Call(raw.url, LARGEST, dict)] * 200, lambda call, value: value)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
    assert len(raw.taken) < 40


def test_an_exception_of_a_body_is_raised(raw):
    def body():
        raise InputError("rows.jsonl:3", "images", "readable image files", "a.png")

    with pytest.raises(InputError, match=r"rows.jsonl:3: images: expected readable image files, got a.png"):
        exchange(server.WHERE, [Call(raw.url, LARGEST, body)], lambda call, value: value)


def test_a_pause_is_as_long_as_the_server_asks_within_a_limit(monkeypatch):
    monkeypatch.setattr(http_json, "LONGEST_PAUSE", 60.0)
    wanted = {"7": 7.0, "9" * 400: 60.0, "-5": 0.0, "": 0.0, "nan": 0.0, "inf": 0.0, "1e3": 0.0, "²": 0.0}
    wanted |= {"Wed, 21 Oct 2015 07:28:00 GMT": 0.0, "Wed, 21 Oct 2199 07:28:00 GMT": 60.0, "Wed, 21 Oct": 0.0}
    assert {text: http_json._wanted_pause(text) for text in wanted} == wanted


def test_this_machine_is_asked_without_a_proxy(raw, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://me:secret@127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    raw.reply = lambda: http("7")
    assert exchange(server.WHERE, [Call(raw.url, LARGEST)], lambda call, value: value) == [7]
    with pytest.raises(InputError) as error:  # the proxy is not there
        exchange(server.WHERE, [Call("http://example.invalid/", LARGEST)], lambda call, value: value)
    assert "ConnectError" in str(error.value)
    assert "secret" not in str(error.value)
    for proxy in ("socks9://me:secret@x", "http://me:secret@x:port", "socks5://me:secret@x"):
        monkeypatch.setenv("ALL_PROXY", proxy)
        with pytest.raises(InputError) as error:
            exchange(server.WHERE, [Call("http://example.invalid/", LARGEST)], lambda call, value: value)
        assert "environment: expected proxies and certificates that can be used" in str(error.value)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://me:secret@host:8000", "without a user name, a password or a query, got 'http://***@host:8000'"),
        ("http://host:8000/?key=secret", "without a user name, a password or a query, got 'http://host:8000/?***'"),
        ("http://host:port", "got 'http://host:port'"),
        ("http://host:99999", "got 'http://host:99999'"),
        ("http://[::1", "got 'http://[::1'"),
        ("http://", "got 'http://'"),
        ("file:///etc/passwd", "got 'file:///etc/passwd'"),
        ("http://a b", "got 'http://a b'"),
        ("http://a\nb", r"got 'http://a\nb'"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_showing_secrets(url, shown):
    with pytest.raises(InputError) as error:
        SamplingArguments(server=url)
    assert str(error.value).startswith("config: server: expected null or a URL such as http://host:port")
    assert str(error.value).endswith(shown)
    assert SamplingArguments(server="http://[::1]:8000/v1").server == "http://[::1]:8000"
