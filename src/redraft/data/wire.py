"""HTTP/1.1 to one server within bounds: seconds for a request as a whole, and bytes that are read and not kept.

A server that sends a byte now and then would outlive any limit on single reads, in its headers too, so every read,
write and connection of a request is given what is left of the request's own time. Bodies come as they were sent:
packed ones are refused, for a few bytes may unpack to any size. Nobody is sent on elsewhere: prompts and keys go to the
address that was given.

Connections are kept for the next request, and a server may close one in the very moment in which that is sent. A
request whose kept connection ends before a byte of its answer is sent again on another; one on a new connection is not.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore

CONNECT_SECONDS = 10.0
# What httpcore raises of its own, and what comes through from below: a socket that was closed under its reader, a
# header that is no text, an answer whose parts contradict each other.
FAULTS = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
    httpcore.ConnectionNotAvailable,
    OSError,
    ValueError,
    RuntimeError,
)
TIMEOUTS = (httpcore.TimeoutException, TimeoutError)
# How a connection's end is met, by who writes and by who reads.
ENDED = (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError)


@dataclass(frozen=True)
class Reply:
    """An answer whose body is still to be read: ``chunks`` come as they arrive."""

    status: int
    headers: dict[str, str]
    chunks: Iterator[bytes]


class Clock(threading.local):
    """The moment by which this thread's request must have ended; none between requests. ``unheard`` while the request
    is on a connection that an earlier one used, and no byte of its answer is there."""

    ends: float | None = None
    request: object = None
    unheard: bool = False

    def left(self, seconds: float | None) -> float | None:
        """``seconds``, or what is left of the request's time if that is less. Raises ``TimeoutException``."""
        if self.ends is None:
            return seconds
        left = self.ends - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("out of time")
        return left if seconds is None else min(seconds, left)


class _Streams:
    """The connections that are open, also those that a request is just making, of which a pool does not know yet."""

    def __init__(self) -> None:
        self._lock, self._open, self._ended = threading.Lock(), set[_Timed](), False

    def add(self, stream: _Timed) -> bool:
        """Whether there may still be one more."""
        with self._lock:
            if not self._ended:
                self._open.add(stream)
            return not self._ended

    def discard(self, stream: _Timed) -> None:
        with self._lock:
            self._open.discard(stream)

    def end(self) -> None:
        """Close all, and let no other be."""
        with self._lock:
            self._ended, left = True, list(self._open)
        for stream in left:
            stream.close()


class _Timed(httpcore.NetworkStream):
    """A connection that keeps to the clock of the thread which uses it. Raises ``ReadError`` where all have ended."""

    def __init__(self, inner: httpcore.NetworkStream, clock: Clock, streams: _Streams) -> None:
        self._inner, self._clock, self._streams = inner, clock, streams
        self._kept = False  # it has carried an answer
        self._lock, self._used, self._ended = threading.Lock(), False, False
        if not streams.add(self):
            self.close()
            raise httpcore.ReadError("the connection was closed")

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with self._in_use():
            found = self._inner.read(max_bytes, self._clock.left(timeout))
        if found:
            self._kept, self._clock.unheard = True, False
        return found

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._clock.unheard = self._kept
        with self._in_use():
            self._inner.write(buffer, self._clock.left(timeout))

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock:
            self._used = True
        try:
            yield
        finally:
            with self._lock:
                self._used, ended = False, self._ended
            if ended:
                self._inner.close()

    def close(self) -> None:
        """Close it; where another thread waits for bytes, wake that, which then does. A number of a socket that is free
        while somebody begins to wait for it would soon be another's, and the wait one for that."""
        self._streams.discard(self)
        with suppress(Exception):
            self._inner.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._ended, used = True, self._used
        if not used:
            self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        inner = self._inner.start_tls(ssl_context, server_hostname, self._clock.left(timeout))
        self._streams.discard(self)
        return _Timed(inner, self._clock, self._streams)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, clock: Clock, streams: _Streams) -> None:
        self._inner, self._clock, self._streams = httpcore.SyncBackend(), clock, streams

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        left = self._clock.left(timeout)
        inner = self._inner.connect_tcp(host, port, left, local_address, socket_options)
        return _Timed(inner, self._clock, self._streams)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Wire:
    """Up to ``connections`` requests at a time to the server at ``url``, through the proxy of the environment where
    that names one. ``certificates`` says whom to trust over https. Raises ``ValueError`` for an address that is none.
    """

    def __init__(self, url: str, connections: int, certificates: ssl.SSLContext) -> None:
        parts = urlsplit(url)
        self._scheme, self._host = parts.scheme.encode(), (parts.hostname or "").encode("idna")
        self._port, self._root = parts.port, quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
        self.clock, self._streams = Clock(), _Streams()
        self._closed, self._connections = False, connections
        how: dict[str, Any] = {
            "ssl_context": certificates,
            "max_connections": connections,
            "max_keepalive_connections": connections,
            "network_backend": _Backend(self.clock, self._streams),
        }
        proxy = None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme, getproxies().get("all"))
        self._pool: httpcore.ConnectionPool = _through(proxy, how) if proxy else httpcore.ConnectionPool(**how)

    @contextmanager
    def ask(
        self, method: str, path: str, headers: dict[str, str], body: bytes | None, seconds: float
    ) -> Iterator[Reply]:
        """Send a request and give its answer, all of it within ``seconds`` (:meth:`hurry` sets them anew). Raises what
        ``TIMEOUTS`` and ``FAULTS`` list."""
        url = httpcore.URL(scheme=self._scheme, host=self._host, port=self._port, target=self._root + path)
        self.hurry(seconds)
        mine = self.clock.request = object()
        timeouts = {"connect": min(CONNECT_SECONDS, seconds), "pool": seconds}
        how: dict[str, Any] = {"headers": list(headers.items()), "content": body, "extensions": {"timeout": timeouts}}
        try:
            with ExitStack() as open_answer:
                found = self._begin(open_answer, method, url, how)
                said = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in found.headers}
                if said.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
                    raise ValueError(f"an answer packed as {said['content-encoding']!r}, which was not asked for")
                yield Reply(found.status, said, found.iter_stream())
        finally:
            if self.clock.request is mine:  # else an earlier answer was thrown away behind the next one's begin
                self.clock.ends = None

    def _begin(self, open_answer: ExitStack, method: str, url: httpcore.URL, how: dict[str, Any]) -> httpcore.Response:
        """The head of an answer. Every kept connection may turn out to be closed, and the next one is new then."""
        for left in range(self._connections, -1, -1):
            if self._closed:
                raise RuntimeError("the connection was closed")
            self.clock.unheard = False
            try:
                return open_answer.enter_context(self._pool.stream(method, url, **how))
            except ENDED:
                if not (self.clock.unheard and left):
                    raise
        raise AssertionError("the last try returns or raises")

    def hurry(self, seconds: float) -> None:
        """The request of this thread has these seconds from now on."""
        self.clock.ends = time.monotonic() + seconds

    def close(self) -> None:
        """End the requests under way in all threads, and take no more."""
        self._closed = True
        self._streams.end()
        self._pool.close()


def _through(proxy: str, how: dict[str, Any]) -> httpcore.ConnectionPool:
    """A pool behind a proxy, with the name and password that its address may hold."""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"the proxy that the environment names is one of {parts.scheme}, and none of HTTP")
    auth = (parts.username or "", parts.password or "") if parts.username or parts.password else None
    at = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/"
    return httpcore.HTTPProxy(at, proxy_auth=auth, **how)
