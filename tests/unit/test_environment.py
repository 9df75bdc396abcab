"""Proxies, certificates and the hub's variables in the environment: their effect on clients, and the messages."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from progrpo.environment import on_the_way, on_the_way_to_the_hub, proxy_for
from progrpo.policies.hub import reason_of
from progrpo.rewards.base import Refusal
from progrpo.rewards.hub import fetching
from progrpo.rewards.remote import RemoteReward
from progrpo.rewards.settings import RewardTerm
from progrpo.rewards.vlm import VLMJudge
from progrpo.types import Prompt

NOBODY = "127.0.0.1:9"  # the port of `discard`, where nothing listens
PICTURES = np.zeros((2, 4, 4, 3), np.uint8)
PROMPTS = [Prompt("a"), Prompt("b")]
LOWER = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir")
VARIABLES = (
    *LOWER,
    *map(str.upper, LOWER),
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
)


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


class Handler(BaseHTTPRequestHandler):
    """A reward server, and one of OpenAI's kind, on one port."""

    def do_GET(self) -> None:
        self.answer({"protocol": 1, "reward": "half"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = [{"id": item["id"], "value": 0.5} for item in asked.get("items", [])]
        self.answer({"scores": scores, "choices": [{"message": {"content": '{"score": 5}'}}]})

    def answer(self, what: Any) -> None:
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def remote(url: str) -> RemoteReward:
    reward = RemoteReward.make(RewardTerm("half", url=url, timeout=0.2))
    reward._patience = 0.0  # of a server that is down: nobody starts one meanwhile
    return reward


def judge(url: str) -> VLMJudge:
    return VLMJudge.make(RewardTerm("vlm", url=f"{url}/v1", model="judge", timeout=0.2))


CLIENTS: dict[str, Any] = {"server": remote, "vlm": judge}
IN_THE_WAY = {
    "http": {"http_proxy": f"http://{NOBODY}"},
    "HTTP": {"HTTP_PROXY": f"http://{NOBODY}", "HTTPS_PROXY": f"http://{NOBODY}"},
    "all": {"ALL_PROXY": f"http://{NOBODY}"},
    "socks": {"ALL_PROXY": f"socks5://{NOBODY}"},
    "no proxy at all": {"http_proxy": "http://[", "https_proxy": "foo://x"},
    "certificates": {"SSL_CERT_FILE": "/no/such/file", "SSL_CERT_DIR": "/no/such/folder"},
}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "127.0.0.2"])
@pytest.mark.parametrize("variables", IN_THE_WAY)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_on_this_machine_is_asked_whatever_the_environment_says(client, variables, host, port, monkeypatch):
    for name, value in IN_THE_WAY[variables].items():
        monkeypatch.setenv(name, value)
    server = ThreadingHTTPServer((host, 0), Handler) if host == "127.0.0.2" else None
    if server is not None:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    reward = CLIENTS[client](f"http://{host}:{port if server is None else server.server_port}")
    assert [s.value for s in reward.score(PICTURES, PROMPTS)] == [0.5, 0.5]
    reward.close()
    if server is not None:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("variables", "url", "proxy"),
    [
        ({"http_proxy": "http://p:1"}, "http://box:8000", "http://p:1"),
        ({"http_proxy": "p:1"}, "http://box:8000", "http://p:1"),
        ({"http_proxy": "http://p:1", "HTTPS_PROXY": "http://q:2"}, "https://box", "http://q:2"),
        ({"ALL_PROXY": "socks5://p:1"}, "https://box", "socks5://p:1"),
        ({"http_proxy": "http://p:1", "ALL_PROXY": "socks5://q:2"}, "http://box", "http://p:1"),
        ({"https_proxy": "http://p:1"}, "http://box", None),
        ({"http_proxy": "http://p:1", "no_proxy": "a, box"}, "http://box", None),
        ({"http_proxy": "http://p:1", "NO_PROXY": ".cluster.local"}, "http://box.cluster.local", None),
        ({"http_proxy": "http://p:1", "NO_PROXY": "*"}, "http://box", None),
        ({"http_proxy": "http://p:1", "NO_PROXY": "a,10.0.0.0/8"}, "http://10.1.2.3:80", None),
        ({"http_proxy": "http://p:1", "NO_PROXY": "a/b,10.0.0.0/8"}, "http://11.1.2.3:80", "http://p:1"),
        ({"ALL_PROXY": "http://p:1"}, "http://[::1]:8000", None),
        ({"ALL_PROXY": "http://p:1"}, "http://127.8.9.10", None),
        ({"ALL_PROXY": "http://p:1"}, "http://a.localhost", None),
        ({"http_proxy": "http://p:1", "NO_PROXY": "box:8000"}, "http://me@box:8000/v1", None),
        ({"http_proxy": "http://p:1", "NO_PROXY": "box:8001"}, "http://box:8000/v1", "http://p:1"),
        ({"ALL_PROXY": "http://p:1"}, "https://[", None),
    ],
)
def test_which_proxy_is_before_a_server(variables, url, proxy, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    actual = proxy_for(url)
    assert (None if actual is None else actual.url) == proxy
    assert actual is None or actual.variable in variables


def test_a_proxy_in_the_way_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://user:pass@word@{NOBODY}")
    way = (
        rf"\(through the proxy http://{NOBODY} of HTTP_PROXY; to reach it without, unset that or add gpu-box to"
        r" NO_PROXY\)"
    )
    with pytest.raises(Refusal, match=rf"no server answers at http://gpu-box:8000 {way} \(ConnectError: .*; start one"):
        remote("http://gpu-box:8000").check([])
    (score, _) = judge("http://gpu-box:8000").score(PICTURES, PROMPTS)
    assert score.error is not None and "user" not in score.error and "word" not in score.error
    assert score.error.startswith("the server (through the proxy http://127.0.0.1:9 of HTTP_PROXY; ")


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("variables", "scheme", "sentence"),
    [
        (
            {"ALL_PROXY": "socks5://p:1"},
            "http",
            r"the proxy socks5://p:1 of ALL_PROXY, which needs a package: pip install socksio; ",
        ),
        ({"http_proxy": "foo://p:1"}, "http", r"the proxy foo://p:1 of http_proxy; .* cannot be asked: Unknown scheme"),
        (
            {"https_proxy": "http://p:x"},
            "https",
            r"the proxy http://p:x of https_proxy; .* cannot be asked: Invalid port",
        ),
        (
            {"SSL_CERT_FILE": "/no/such"},
            "https",
            r"the certificates that SSL_CERT_FILE names, /no/such, which are not there\) cannot be asked: ",
        ),
    ],
)
def test_what_keeps_a_client_from_being_made_is_refused_in_a_sentence(client, variables, scheme, sentence, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refusal, match=sentence) as refused:
        CLIENTS[client](f"{scheme}://gpu-box:8000")
    assert str(refused.value).isprintable()


def test_what_keeps_the_hub_away_is_named(monkeypatch):
    assert on_the_way_to_the_hub() == ""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert on_the_way_to_the_hub() == " (HF_HUB_OFFLINE is set, so it was not asked)"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror")
    monkeypatch.setenv("ALL_PROXY", "socks5h://p:1")
    said = on_the_way_to_the_hub()
    assert (
        "at https://mirror, which HF_ENDPOINT names; HF_HUB_OFFLINE is set" in said and "add mirror to NO_PROXY" in said
    )
    for error in (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed"), OSError("no network")):
        with (
            pytest.raises(Refusal, match=r"the Hugging Face hub \(at https://mirror"),
            fetching("pickscore", "a model"),
        ):
            raise error
        if isinstance(error, ImportError):
            assert reason_of(error, "org/model").startswith("the hub (at https://mirror")
    assert "mirror" not in reason_of(OSError("it has no such file"), "org/model")
    assert "mirror" not in reason_of(ImportError("Using SOCKS proxy"), os.getcwd())


def test_certificates_are_named_for_tls_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    known = f" (with the certificates that SSL_CERT_FILE names, {tmp_path}/ca.pem"
    assert on_the_way("http://box") == "" and on_the_way("https://box") == f"{known}, which are not there)"
    (tmp_path / "ca.pem").write_text("none")
    assert on_the_way("https://box") == f"{known})"
    with pytest.raises(Refusal, match=r"SSL_CERT_FILE names, .*ca.pem\) cannot be asked: "):
        remote("https://box")
