"""A chat-completions server on this machine that answers as it is told: well, late, wrongly or not at all."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from saebench.features.labelling.asking import CLOSE, OPEN


class Server:
    """Answers with what `reply` makes of each request: a text, a status with a body, or bytes as they are; None hangs up."""

    def __init__(self):
        self.requests, self.reply = [], honest
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                answer = outer.reply(body)
                if answer is None:
                    self.close_connection = True
                    return
                status, content, headers = answer if isinstance(answer, tuple) else (200, answer, {})
                if isinstance(content, str):
                    content = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})
                elif isinstance(content, dict):
                    content = json.dumps(content)
                content = content if isinstance(content, bytes) else content.encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                outer.requests.append((self.path, dict(self.headers), None))
                self.send_error(405)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def question(body) -> str:
    return body["messages"][1]["content"]


def asks_for_label(body) -> bool:
    return "description: " not in question(body)


def snippets_of(body) -> dict[int, str]:
    return {int(n): text for n, text in re.findall(r"^(\d+): (.*)$", question(body), re.MULTILINE)}


def honest(body) -> str:
    """One who sees that the marked token is ` self`, and finds it in the snippets."""
    if asks_for_label(body):
        return '"the word self"' if question(body).count(f"{OPEN} self{CLOSE}") > 6 else "something else"
    return json.dumps([number for number, text in snippets_of(body).items() if "self" in text])
