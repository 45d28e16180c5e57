"""Requests to addresses that clients name: webhooks, and whatever else takes a URL.

The URL is parsed once. That parse is checked, and it is what is sent. The name is resolved once, in the act of
connecting; all of its addresses must be public, and the connection goes to one of those that were checked, with the
name kept for TLS and `Host`: a name that resolves differently a moment later (DNS rebinding) changes nothing.
No redirect is followed, no proxy variable read, and a response is cut.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpcore2
import httpx2

RESPONSE_BYTES = 2048
HTTPS_PORT = 443
MAX_URL_LENGTH = 2048

Resolve = Callable[[str, int], list[str]]

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
# At least two labels, and a last one that begins with a letter: no name that some resolver takes for an address
# (2130706433, 0x7f.1, 0177.0.0.1), and none that a search domain completes.
_NAME = re.compile(rf"(?=.{{1,253}}$)(?:{_LABEL}\.)+[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])?")
_V4 = re.compile(r"(?:(?:0|[1-9]\d{0,2})\.){3}(?:0|[1-9]\d{0,2})")

_AZURE_HOST_AGENT = "168.63.129.16"  # a public number that every guest there can reach
_NOT_PUBLIC_V4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT, and a cloud's metadata at 100.100.100.200
        "127.0.0.0/8",
        _AZURE_HOST_AGENT,
        "169.254.0.0/16",  # link-local, and most clouds' metadata at 169.254.169.254
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
]
# Only this is allocated to be routed; outside lie mapped and compatible IPv4, NAT64, unique local, link-local, multicast.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # Teredo, benchmarking, ORCHID: tunnels and special purposes
        "2001:db8::/32",
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "3fff::/20",
    )
]


class UrlRefused(ValueError):
    """A URL, or what it resolves to, that this server does not call. The message never repeats it."""


class Unreachable(Exception):
    """No answer: no connection, no trusted certificate, no HTTP, or not in time."""


@dataclass(frozen=True)
class Answer:
    """A response, of whatever status; `body` is its first 2048 bytes at most."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def is_public(address: str) -> bool:
    """Whether an address (in digits) is one of the public internet."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _NOT_PUBLIC_V4)
    if parsed.scope_id is not None:
        return False
    return parsed in _GLOBAL_V6 and not any(parsed in network for network in _NOT_PUBLIC_V6)


def _may_be_named(address: str) -> bool:
    """Whether an operator may let clients reach this address: private ones and the loopback, but no metadata service,
    nothing that means "any host" or "many hosts"."""
    parsed = ipaddress.ip_address(address)
    refused = parsed.is_link_local or parsed.is_multicast or parsed.is_unspecified
    return not refused and address != _AZURE_HOST_AGENT


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, in digits, by the system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(one[4][0]) for one in found))


@cache
def _public_tls() -> ssl.SSLContext:
    """Read once: the list of authorities takes 30 ms."""
    return httpx2.create_ssl_context()


class Outbound:
    """Checks URLs and posts to them. Safe to use from several threads.

    `private_hosts`: names or addresses that may be private, be called by plain http and on any port.
    """

    def __init__(
        self,
        *,
        private_hosts: Collection[str] = (),
        timeout_seconds: float = 15.0,
        resolve: Resolve = resolve,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._private = frozenset(host.lower().strip("[]") for host in private_hosts)
        self._timeout = timeout_seconds
        self._resolve = resolve
        self._ssl = ssl_context or _public_tls()

    def check(self, text: str) -> httpx2.URL:
        """The parsed URL. Raises `UrlRefused`; asks no name server."""
        if len(text) > MAX_URL_LENGTH or re.fullmatch(r"[\x21-\x7e]+", text) is None or "\\" in text:
            raise UrlRefused("must be a URL in plain ASCII; write other names in punycode (xn--...)")
        try:
            url = httpx2.URL(text)
            # Not `url.host`, which is for people: it shows punycode as what it stands for.
            host, port = url.raw_host.decode("ascii").lower(), url.port
        except Exception as error:  # the parser has several kinds of its own; all mean the same
            raise UrlRefused("is not a URL") from error
        authority = text.partition("://")[2]
        if "@" in re.split(r"[/?#]", authority)[0] or url.userinfo:
            raise UrlRefused("must not hold a user or password")
        if "#" in text:
            raise UrlRefused("must not have a fragment")
        if host in self._private and url.scheme in ("http", "https"):
            return url
        if url.scheme != "https":
            raise UrlRefused("must begin with https://")
        if port not in (None, HTTPS_PORT):
            raise UrlRefused(f"must use port {HTTPS_PORT}")
        if ":" in host or _V4.fullmatch(host):
            if not is_public(host):
                raise UrlRefused("must name a public address")
        elif _NAME.fullmatch(host) is None:
            raise UrlRefused("must name a public host, such as hooks.example.com")
        return url

    def post(self, text: str, *, content: bytes, headers: Mapping[str, str]) -> Answer:
        """POST to a URL, at most `timeout_seconds` after its name is resolved.

        Raises `UrlRefused` and `Unreachable`.
        """
        url = self.check(text)
        target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        backend = _CheckedBackend(self._addresses, self._timeout)
        limits = dict.fromkeys(("connect", "read", "write", "pool"), self._timeout)
        pool = httpcore2.ConnectionPool(
            ssl_context=self._ssl, network_backend=backend, max_keepalive_connections=0, http2=False
        )
        try:
            with (
                pool,
                pool.stream(
                    "POST",
                    target,
                    headers=[*headers.items(), ("Connection", "close")],
                    content=content,
                    extensions={"timeout": limits},
                ) as response,
            ):
                fields = {
                    name.decode("latin-1").lower(): value.decode("latin-1")
                    for name, value in response.headers
                }
                return Answer(response.status, fields, _beginning(response))
        except httpcore2.TimeoutException as error:
            raise Unreachable("no answer in time") from error
        except httpcore2.ProtocolError as error:
            raise Unreachable("the answer is not HTTP") from error
        except httpcore2.NetworkError as error:
            cause = "the certificate is not trusted" if _is_tls(error) else "no connection"
            raise Unreachable(cause) from error

    def _addresses(self, host: str, port: int) -> list[str]:
        """The addresses of a host, every one of them checked."""
        try:
            found = self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise UrlRefused("the host has no public address") from error
        allowed = _may_be_named if host.lower() in self._private else is_public
        # One answer for "no such name" and "a private one": a client is not to explore our own names by it.
        if not found or not all(allowed(address) for address in found):
            raise UrlRefused("the host has no public address")
        return found


def _beginning(response: httpcore2.Response) -> bytes:
    """The first bytes of a body; what follows, or fails to, does not matter."""
    body = b""
    try:
        for chunk in response.iter_stream():
            body += chunk
            if len(body) >= RESPONSE_BYTES:
                break
    except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError):
        pass
    return body[:RESPONSE_BYTES]


def _is_tls(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


class _CheckedBackend(httpcore2.NetworkBackend):
    """Connects to checked addresses only, and ends everything at one deadline."""

    def __init__(self, addresses: Resolve, seconds: float) -> None:
        self._addresses = addresses
        self._seconds = seconds
        self._plain = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = self._addresses(host, port)
        deadline = time.monotonic() + self._seconds
        failure: Exception = httpcore2.ConnectError("no address")
        for address in addresses:
            try:
                left = _left(deadline, httpcore2.ConnectTimeout)
                stream = self._plain.connect_tcp(address, port, left, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return _BoundedStream(stream, deadline)
        raise failure


class _BoundedStream(httpcore2.NetworkStream):
    """A stream whose reads and writes together end at a deadline: a receiver that sends a byte now and then holds
    nobody for long."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline, httpcore2.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        left = _left(self._deadline, httpcore2.ConnectTimeout)
        return _BoundedStream(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float, error: type[Exception]) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise error("the deadline has passed")
    return left
