"""A server in this process that plays the model behind a reward's questions."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def completion(text, **choice) -> dict:
    message = {"role": "assistant", "content": text} | choice.pop("message", {})
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"} | choice],
    }


class Server:
    """Answers with what `answer(request)` gives: a status and a text, or an object; keeps what it was asked."""

    def __init__(self, answer: Callable) -> None:
        self.asked: list[dict] = []
        self.headers: list[dict] = []
        self.paths: list[str] = []
        self.connections: set = set()
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler) -> None:
                request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.asked.append(request)
                    self.headers.append(dict(handler.headers))
                    self.paths.append(handler.path)
                    self.connections.add(handler.client_address)
                    self.at_once += 1
                    self.most_at_once = max(self.most_at_once, self.at_once)
                said = answer(request)
                with lock:
                    self.at_once -= 1
                status, body = said if isinstance(said, tuple) else (200, json.dumps(said))
                if status == 0:  # hang up
                    handler.close_connection = True
                    handler.connection.shutdown(socket.SHUT_RDWR)
                    return
                handler.send_response(status)
                handler.send_header("Content-Length", str(len(body.encode())))
                handler.end_headers()
                handler.wfile.write(body.encode())

            def log_message(handler, *args) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def pictures_of(request: dict) -> list[np.ndarray]:
    """The pictures of a request, in order."""
    parts = [p for p in request["messages"][-1]["content"] if p["type"] == "image_url"]
    return [_decoded(part["image_url"]["url"]) for part in parts]


def _decoded(url: str) -> np.ndarray:
    head, data = url.split(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


def texts_of(request: dict) -> list[str]:
    """The texts of a request's last message, in order."""
    return [p["text"] for p in request["messages"][-1]["content"] if p["type"] == "text"]
