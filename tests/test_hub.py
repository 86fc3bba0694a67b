"""A configuration that is in no cache is had from the hub by one request: here a server of the test's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest
from huggingface_hub import constants

from invact.patchers import configurations
from invact.patchers.configurations import hub_config

BERT = {"model_type": "bert", "hidden_size": 16}
ANSWERS = {
    "/someone/bert/resolve/main/config.json": (200, json.dumps(BERT).encode()),
    "/someone/list/resolve/main/config.json": (200, b"[1, 2]"),
    "/someone/broken/resolve/main/config.json": (200, b"{"),
    "/someone/private/resolve/main/config.json": (401, b""),
    "/elsewhere": (200, json.dumps(BERT).encode()),
}


class Hub(NamedTuple):
    address: str
    seen: list[tuple[str, str | None]]
    """Of each request its path and the token that came with it."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Hub]:
    """What stands for the hub, with an empty cache and a token."""
    seen: list[tuple[str, str | None]] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            if "/moved/" in self.path:
                self.send_response(302)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                return
            status, body = ANSWERS.get(self.path, (404, b""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub(address, seen)
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_configuration_is_had_by_one_request_with_the_users_token(hub: Hub) -> None:
    assert hub_config("someone/bert", "config.json") == BERT
    assert [each for each in hub.seen if "someone" in each[0]] == [
        ("/someone/bert/resolve/main/config.json", "Bearer hf_of_the_test")
    ]


def test_the_token_is_not_sent_to_where_the_hub_sends_us_on(hub: Hub) -> None:
    assert hub_config("someone/moved", "config.json") == BERT
    sent = dict(hub.seen)
    assert sent["/someone/moved/resolve/main/config.json"] == "Bearer hf_of_the_test"
    assert sent["/elsewhere"] is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("someone/private", "the Hugging Face hub answered 401 Unauthorized"),
        ("someone/nothing", "the Hugging Face hub answered 404 Not Found"),
        ("someone/broken", "its configuration is not JSON"),
        ("someone/list", "its configuration is"),
        ("no name", "neither a directory nor a name that the hub allows"),
    ],
)
def test_what_can_not_be_had_is_told_with_its_reason(hub: Hub, name: str, reason: str) -> None:
    with pytest.raises(LookupError, match=reason):
        hub_config(name, "config.json")


def test_offline_nobody_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LookupError, match="HF_HUB_OFFLINE is set"):
        hub_config("someone/bert", "config.json")
    assert not any("someone" in path for path, _ in hub.seen)


def test_a_hub_that_does_not_answer_in_time_is_one_that_can_not_be_reached(hub: Hub, monkeypatch) -> None:
    monkeypatch.setattr(configurations, "TIMEOUT_SECONDS", 0.0)  # not even the connection is waited for
    with pytest.raises(LookupError, match="the Hugging Face hub cannot be reached"):
        hub_config("someone/bert", "config.json")
