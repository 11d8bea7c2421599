"""Negatives from an inference server: the requests, the use of its answers, and failures."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
from PIL import Image, ImageChops

from cwdpo_trainer.config.arguments import SamplingArguments
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.negatives import http_json
from cwdpo_trainer.negatives.policy import PolicyInTraining
from cwdpo_trainer.negatives.server import AnswerServer, chat_messages

# Renders content parts, as real chat templates do.
TEMPLATE = (
    "{% for message in messages %}{{ '<s> ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> ' }}{% endif %}"
)


class Stub(BaseHTTPRequestHandler):
    """Responds with `server.failures` first, as (status, body), then with `server.texts`."""

    def do_GET(self):
        self.reply(200, {"data": [{"id": model} for model in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if self.server.failures:
            self.reply(*self.server.failures.pop())
            return
        choices = [{"message": {"content": text}} for text in self.server.texts[: body["n"]]]
        self.reply(200, {"choices": choices})

    def reply(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def stub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.models, server.texts, server.failures, server.asked = ["served"], [], [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def chat(collator):
    processor = copy.deepcopy(collator.processor)
    processor.chat_template = TEMPLATE
    return PairCollator(processor)


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Replaces the pauses before further attempts: returns the list of those requested."""
    taken = []

    async def pause(seconds):
        taken.append(seconds)

    monkeypatch.setattr(http_json, "_pause", pause)
    return taken


def draw(stub, chat, rows, **settings):
    settings = SamplingArguments(server=stub.url, **settings)
    server = AnswerServer.open(settings.server, rows)
    policy = PolicyInTraining(None, chat, {row.id: row for row in rows}, settings, None, server)
    return policy.draw([row.id for row in rows], seed=5)


def test_wrong_answers_from_the_server_become_negatives(stub, chat, chat_rows):
    stub.texts = ["a red square", "the  blue square", "a above and a left and a right"]
    drawn = draw(stub, chat, chat_rows, samples=3, temperature=0.7, top_p=0.9, max_new_tokens=5)
    words = [[" ".join(chat.tokenizer.convert_ids_to_tokens(tokens)) for tokens in of_row] for of_row in drawn]
    cut = "a above and a left"  # max_new_tokens long, without an end-of-sequence token
    red, blue = "a red square </s>", "the blue square </s>"
    assert words == [[blue, cut], [red, blue, cut], [red, cut]]


def test_requests_hold_the_image_the_settings_and_a_seed_per_row(stub, chat, chat_rows):
    stub.texts = ["above"] * 2
    draw(stub, chat, chat_rows, samples=2, temperature=0.7, top_p=0.9, max_new_tokens=5)
    asked = sorted(stub.asked, key=lambda body: body["seed"])
    assert [body["seed"] for body in asked] == [5, 6, 7]
    for row, body in zip(chat_rows, asked, strict=True):
        settings = (body["model"], body["n"], body["temperature"], body["top_p"], body["max_tokens"])
        assert settings == ("served", 2, 0.7, 0.9, 5)
        ((image, text),) = [message["content"] for message in body["messages"]]
        assert text == {"type": "text", "text": "describe"}
        head, _, data = image["image_url"]["url"].partition(",")
        assert (image["type"], head) == ("image_url", "data:image/png;base64")
        with Image.open(BytesIO(base64.b64decode(data))) as found:
            assert ImageChops.difference(found, row.load_images()[0]).getbbox() is None


def test_busy_servers_are_asked_again(stub, chat, chat_rows, pauses):
    stub.texts = ["above", "below"]
    stub.failures = [(503, "busy"), (429, "slower")]
    assert len(draw(stub, chat, chat_rows[:1])[0]) == 2
    assert pauses == [1.0, 5.0]


@pytest.mark.parametrize(("status", "attempts"), [(400, 1), (500, 4)])
def test_failing_servers_are_reported(stub, chat, chat_rows, status, attempts):
    stub.failures = [(status, "too many images")] * 9
    with pytest.raises(
        InputError, match=rf"sampling.server: {stub.url}/v1/.*: expected an answer, got {status} .*images"
    ):
        draw(stub, chat, chat_rows[:1])
    assert len(stub.asked) == attempts


def test_unusable_servers_are_reported(chat, chat_rows, stub, pauses):
    with pytest.raises(InputError, match=r"http://127.0.0.1:1/v1/models: expected an answer, got ConnectError: "):
        AnswerServer.open("http://127.0.0.1:1", chat_rows)
    assert len(pauses) == 3
    stub.models = []
    with pytest.raises(InputError, match=r"expected at least 1 model, got 0"):
        AnswerServer.open(stub.url, chat_rows)


PARTS = [
    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
    {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
    {"type": "input_audio", "input_audio": {}},
    {"type": "text", "text": 3},
    {"type": "text"},
    {"type": ["text"]},
]


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_name_something_to_fetch_are_refused(chat_rows, stub, part):
    prompt = [{"role": "user", "content": [{"type": "image"}, part]}]
    row = dataclasses.replace(chat_rows[0], prompt=prompt)
    with pytest.raises(
        InputError, match=r"train.jsonl:1: prompt: expected parts of type text or image, as .*got one of"
    ):
        AnswerServer.open(stub.url, [row])


def test_nothing_but_text_and_images_is_sent(chat_rows):
    url = {"url": "http://169.254.169.254/"}
    content = [{"type": "image", "image_url": url, "url": "x"}, {"type": "text", "text": "describe", "image_url": url}]
    row = dataclasses.replace(chat_rows[0], prompt=[{"role": "user", "content": content}])
    ((image, text),) = [message["content"] for message in chat_messages(row)]
    assert text == {"type": "text", "text": "describe"}
    assert list(image) == ["type", "image_url"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")


def test_prompts_that_cannot_be_sent_are_refused(rows, chat_rows, stub):
    with pytest.raises(InputError, match=r"train.jsonl:1: prompt: expected a list of messages, as .*got text"):
        AnswerServer.open(stub.url, rows)
    text = [{"role": "user", "content": "<image> describe"}]
    mixed = [chat_rows[0], dataclasses.replace(chat_rows[1], prompt=text)]
    with pytest.raises(InputError, match=r"train.jsonl:2: prompt: expected one image part per image, .*got 0 for 1"):
        AnswerServer.open(stub.url, mixed)
    assert SamplingArguments(server="http://host:8000/v1/").server == "http://host:8000"
    with pytest.raises(ValueError, match=r"server: expected null or a URL such as http://host:port, got 'host:8000'"):
        SamplingArguments(server="host:8000")
