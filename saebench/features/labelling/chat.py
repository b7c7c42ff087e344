"""A language model behind an OpenAI-compatible chat endpoint, asked with the standard library alone.

Nothing is sent anywhere unless `ask` is called. The key is sent in the `Authorization` header to the host that the user named and nowhere
else: redirects are refused, and the key is neither written nor shown, not even where a server's message repeats it.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from saebench.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_ANSWER = 4 << 20  # bytes
LONGEST_WAIT = 60.0  # seconds
BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
OPTIONAL = {"temperature": 0, "max_tokens": 200}
"""What some models do not take: left out once a server says so."""


class Malformed(UserError):
    """The server answered, but not with what was asked for."""


class Stopped(Exception):
    """The caller does not want the answer any more."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class Endpoint:
    """Where to ask, whom, and how patiently."""

    url: str
    """The base URL, such as http://127.0.0.1:8000/v1."""
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    """Seconds after which an answer is no longer waited for."""
    retries: int = 5
    """Further tries after a busy server, a lost connection or a malformed answer."""
    wait: float = 1.0
    """Seconds before the first of them; twice as long before each next one, unless the server says how long."""
    _left_out: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def given(cls, url: str, model: str, *, key: str | None = None, variable: str = KEY_VARIABLE, **options: Any) -> Endpoint:
        """With the key given, or that of an environment variable, or none where neither is set."""
        return cls(url, model, key or os.environ.get(variable) or None, **options)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise UserError(f"{_without_secrets(self.url)!r} is no base URL: give one such as http://127.0.0.1:8000/v1")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise UserError("the key has white space or other characters that no key has: check that it was copied whole")
        self.host = parts.hostname
        handlers: list[Any] = [_NoRedirects]
        if self.host in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def ask(self, messages: list[dict[str, str]], stop: threading.Event | None = None) -> str:
        """The text that the model answers. Raises UserError in one line where it cannot be had, `Malformed` where the server's answer is
        none, and `Stopped` where `stop` is set while waiting for another try."""
        stop = stop or threading.Event()
        wait = self.wait
        for left in range(self.retries, -1, -1):
            try:
                return self._once(messages)
            except _Again as problem:
                if not left:
                    raise problem.error from None
                if stop.wait(min(LONGEST_WAIT, max(wait, problem.after))):
                    raise Stopped from None
                wait *= 2
        raise AssertionError("the loop returns or raises")

    def _once(self, messages: list[dict[str, str]]) -> str:
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        body |= {name: value for name, value in OPTIONAL.items() if name not in self._left_out}
        headers = {"Content-Type": "application/json", "User-Agent": "saebench"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                content = answer.read(LONGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except TimeoutError:
            raise _Again(UserError(f"{self.host} did not answer within {self.timeout:g} s")) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Again(UserError(f"{self.host} did not answer within {self.timeout:g} s")) from None
            raise _Again(UserError(f"cannot reach {self.host}: {self._clean(str(error.reason))}")) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Again(
                UserError(f"the connection to {self.host} was lost: {self._clean(str(error) or type(error).__name__)}")
            ) from None
        return self._text(content)

    def _text(self, content: bytes) -> str:
        """What the model said."""
        try:
            if len(content) > LONGEST_ANSWER:
                raise ValueError("it is too long")
            text = json.loads(content)["choices"][0]["message"]["content"]
            if not isinstance(text, str) or not text.strip():
                raise ValueError("it is empty")
            return text.strip()
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _Again(
                Malformed(
                    f"{self.host} answered what is no chat completion: {self._clean(content[:80].decode(errors='replace'))!r}"
                )
            ) from None

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What an error status means."""
        message = self._clean(_message(error))
        said = f": {message}" if message else ""
        if error.code in BUSY:
            return _Again(
                UserError(f"{self.host} is busy or out of order ({error.code}){said}"), _seconds(error.headers.get("Retry-After"))
            )
        if error.code == 400 and (named := [name for name in OPTIONAL if name in message and name not in self._left_out]):
            self._left_out.update(named)
            return _Again(UserError(f"{self.host} refuses the request (400){said}"), 0.0)
        if error.code in (401, 403):
            return UserError(
                f"{self.host} refuses the key ({error.code}){said}"
                if self.key
                else f"{self.host} wants a key ({error.code}){said}"
            )
        if error.code == 404:
            return UserError(
                f"{self.url} has no chat completions, or no model {self.model!r} (404){said}: a base URL mostly ends in /v1"
            )
        if 300 <= error.code < 400:
            return UserError(
                f"{self.host} sends requests on to another address ({error.code}), where a key is not sent: give that address"
            )
        return UserError(f"{self.host} refuses the request ({error.code}){said}")

    def _clean(self, text: str) -> str:
        """One line without the key."""
        if self.key:
            text = text.replace(self.key, "•••")
        return " ".join(text.split())[:200]


class _Again(Exception):
    """What may go better another time, after some seconds; `error` says it where it does not."""

    def __init__(self, error: UserError, after: float = 0.0):
        self.error, self.after = error, after


def _message(error: urllib.error.HTTPError) -> str:
    """What a server says of an error."""
    try:
        content = error.read(64 << 10).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        found = json.loads(content)
        found = found.get("error", found) if isinstance(found, dict) else found
        return str(found.get("message", found) if isinstance(found, dict) else found)
    except ValueError:
        return "" if content.lstrip().startswith("<") else content


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0  # a date: the usual wait will do


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return url.replace(parts.netloc, parts.netloc.rpartition("@")[2]) if "@" in parts.netloc else url
