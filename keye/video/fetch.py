"""Videos and pictures behind URLs: `data:` and `file:` decoded here, `http(s):` downloaded only when asked for.

A URL in a data set is written by strangers, and the machine that trains on it can reach places that they cannot. So
nothing is fetched unless the caller gives `UrlRules`, and then: names are resolved once, every address is checked and
the connection goes to the checked address (a name that resolves differently a moment later changes nothing); each
redirect is checked like the first URL; TLS is verified against the name; size and time are limited while reading,
whatever the server claims. Proxies of the environment are not used, as they would resolve the name again.
"""

import base64
import binascii
import http.client
import ipaddress
import os
import re
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit, urlunsplit
from urllib.request import url2pathname

from keye.errors import KeyeError, VideoError

_CHUNK = 1 << 16  # bytes
_REDIRECTS = {301, 302, 303, 307, 308}
_HEADERS = {"User-Agent": "keye", "Accept-Encoding": "identity", "Connection": "close"}
_PORTS = {"http": 80, "https": 443}
_NAT64 = [ipaddress.IPv6Network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48")]


@dataclass(frozen=True)
class UrlRules:
    """What may be downloaded.

    max_bytes: the largest file. timeout: seconds in all, redirects included. allow_private: also addresses of this
    machine and its local networks. max_redirects: how many redirects are followed.
    """

    max_bytes: int = 1 << 30
    timeout: float = 60.0
    allow_private: bool = False
    max_redirects: int = 5

    def __post_init__(self) -> None:
        if not (self.max_bytes >= 1 and self.timeout > 0 and self.max_redirects >= 0):
            raise KeyeError(
                f"UrlRules with max_bytes={self.max_bytes}, timeout={self.timeout}, max_redirects={self.max_redirects}"
                " let nothing through; give max_bytes >= 1, timeout > 0 and max_redirects >= 0"
            )


def scheme_of(source: object) -> str | None:
    """The scheme of a URL in lower case ("http", "data", "file", …), None for anything else, paths included."""
    if not isinstance(source, str):
        return None
    found = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+)://|(data):", source)
    return (found[1] or found[2]).lower() if found else None


def url_name(url: str) -> str:
    """A URL as errors name it: without what may be long or secret (contents, user, password, query)."""
    if scheme_of(url) == "data":
        return f"a data: URL of {len(url)} characters"
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.split("?")[0]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def path_name(path: str | os.PathLike) -> str:
    """A path as text that can be printed and written: on Linux names are bytes, and need not be UTF-8."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:  # no name of this system's
        name = str(path).encode("utf-8", "backslashreplace")
    return name.decode("utf-8", "backslashreplace")


def file_path(url: str) -> Path:
    """The path of a `file:` URL; VideoError if it names another machine."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise VideoError(f"{url} names the machine {parts.netloc!r}; give a path here, as in file:///videos/a.mp4")
    return Path(url2pathname(parts.path))


def data_bytes(url: str) -> bytes:
    """The contents of a `data:` URL (RFC 2397)."""
    header, comma, body = url.partition(",")
    if not comma:
        raise VideoError(f"{url_name(url)} has no comma; write it as data:video/mp4;base64,AAAA…")
    content = unquote_to_bytes(body)
    if not header.lower().rstrip().endswith(";base64"):
        return content
    try:
        content = bytes(content.translate(None, b" \t\r\n"))
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except binascii.Error as error:
        raise VideoError(f"{url_name(url)} is not base64 ({error}); encode it again") from error


@contextmanager
def download(url: str, rules: UrlRules | None) -> Iterator[Path]:
    """The file behind an http(s) URL, in a temporary file that is deleted on leaving; VideoError says why not.

    rules: what is allowed; None allows nothing.
    """
    name = url_name(url)
    if scheme_of(url) not in _PORTS:
        raise VideoError(f"{name} is no http or https URL; download it yourself and give the path")
    if rules is None:
        raise VideoError(f"{name} is a URL, and nothing is downloaded unasked; give urls=UrlRules() to allow it")
    with tempfile.NamedTemporaryFile(prefix="keye-") as file:
        try:
            _fetch(url, rules, file)
            file.flush()
        except (OSError, http.client.HTTPException) as error:  # ssl.SSLError and time-outs are OSErrors
            reason = getattr(error, "verify_message", "") or getattr(error, "strerror", None) or str(error)
            reason = " ".join((reason or type(error).__name__).split())[:120]
            raise VideoError(f"{name} cannot be downloaded ({reason}); check the URL") from error
        yield Path(file.name)


def _fetch(url: str, rules: UrlRules, file: tempfile._TemporaryFileWrapper) -> None:
    """Write what the URL leads to, in the end, into the file."""
    deadline = time.monotonic() + rules.timeout
    for _ in range(rules.max_redirects + 1):
        following = _request(url, rules, deadline, file)
        if following is None:
            return
        if scheme_of(url) == "https" and scheme_of(following) == "http":
            raise VideoError(f"{url_name(url)} leads from https to plain http; download it yourself if you trust it")
        url = following
    raise VideoError(f"{url_name(url)} is reached by more than {rules.max_redirects} redirects; raise max_redirects")


def _request(url: str, rules: UrlRules, deadline: float, file: tempfile._TemporaryFileWrapper) -> str | None:
    """Ask for one URL: its body goes to the file, or the URL that it redirects to is returned."""
    name = url_name(url)
    scheme, host, port, target = _parts(url)
    connection = _connect(scheme, host, port, name, rules, deadline)
    # A server that sends a byte now and then never runs into a socket's time-out: at the deadline the line is cut.
    raw = connection.sock
    cut = threading.Timer(max(deadline - time.monotonic(), 0.0), _cut, [raw])
    cut.daemon = True
    cut.start()
    try:
        connection.request("GET", target, headers=_HEADERS)
        response = connection.getresponse()
        if response.status in _REDIRECTS and response.getheader("Location"):
            return _follow(url, response.getheader("Location"))
        if response.status != 200:
            raise VideoError(f"{name} answers {response.status} {response.reason}".rstrip() + "; check the URL")
        if response.getheader("Content-Encoding", "identity").lower() != "identity":
            raise VideoError(f"{name} is sent compressed though plain was asked for; download it yourself")
        _save(response, name, rules, deadline, file)
    except (OSError, http.client.HTTPException):
        _check_time(name, rules, deadline)
        raise
    finally:
        cut.cancel()
        connection.close()
    return None


def _follow(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise VideoError(f"{url_name(url)} redirects to what is not a valid URL; check the URL") from error


def _cut(connected: socket.socket) -> None:
    try:
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
    except OSError:  # it is closed already
        pass


def _save(
    response: http.client.HTTPResponse,
    name: str,
    rules: UrlRules,
    deadline: float,
    file: tempfile._TemporaryFileWrapper,
) -> None:
    declared = response.length
    if declared is not None and declared > rules.max_bytes:
        raise VideoError(f"{name} has {declared:,} bytes and {rules.max_bytes:,} are allowed; raise max_bytes")
    count = 0
    while chunk := response.read1(_CHUNK):
        count += len(chunk)
        if count > rules.max_bytes:
            raise VideoError(f"{name} has more than the {rules.max_bytes:,} bytes allowed; raise max_bytes")
        _check_time(name, rules, deadline)
        file.write(chunk)
    _check_time(name, rules, deadline)
    if declared is not None and count < declared:
        raise VideoError(f"{name} broke off after {count:,} of {declared:,} bytes; try again")


def _check_time(name: str, rules: UrlRules, deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise VideoError(f"{name} was not there in full after {rules.timeout:g} s; raise timeout")


def _parts(url: str) -> tuple[str, str, int, str]:
    """(scheme, host in ASCII, port, request target) of an http(s) URL."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or _PORTS.get(parts.scheme, 0)
        host = host if ":" in host else host.encode("idna").decode()
    except (ValueError, UnicodeError) as error:
        raise VideoError(f"{url_name(url)} is not a valid URL ({error}); check it") from error
    if parts.scheme not in _PORTS:
        raise VideoError(f"{url_name(url)} is reached by a redirect and is neither http nor https; check the URL")
    if not host:
        raise VideoError(f"{url_name(url)} names no host; check the URL")
    if "@" in parts.netloc:
        raise VideoError(f"{url_name(url)} carries a user's name; download it yourself and give the path")
    safe = "%/:=&?~+!$,;'@()*[]"
    target = quote(parts.path or "/", safe) + (f"?{quote(parts.query, safe)}" if parts.query else "")
    return parts.scheme, host, port, target


def _connect(
    scheme: str, host: str, port: int, name: str, rules: UrlRules, deadline: float
) -> http.client.HTTPConnection:
    """A connection to one of the host's checked addresses, with TLS for the host's name."""
    failure: OSError | None = None
    for family, address in _allowed(_resolve(host, port, name, rules, deadline), name, rules):
        _check_time(name, rules, deadline)
        connected = socket.socket(family, socket.SOCK_STREAM)
        connected.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connected.connect(address)
            if scheme == "https":
                connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
        except OSError as error:
            failure = error
            connected.close()
            if isinstance(error, ssl.SSLError):  # the name's certificate is as wrong at its other addresses
                break
            continue
        connection = http.client.HTTPConnection(host, port)
        connection.default_port = _PORTS[scheme]  # what the Host header leaves out
        connection.sock = connected
        return connection
    _check_time(name, rules, deadline)
    assert failure is not None
    raise failure


def _resolve(host: str, port: int, name: str, rules: UrlRules, deadline: float) -> list[tuple[int, tuple]]:
    """(family, socket address) of every address of the host, within the deadline."""
    found: list = []

    def ask() -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.append(error)

    # The system's resolver knows no time limit, so it gets a thread that may be left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(max(deadline - time.monotonic(), 0.0))
    _check_time(name, rules, deadline)
    if not found or isinstance(found[0], Exception):
        raise VideoError(f"the host of {name} is not known; check the URL and the network")
    return [(family, address) for family, _, _, _, address in found]


def _allowed(addresses: list[tuple[int, tuple]], name: str, rules: UrlRules) -> list[tuple[int, tuple]]:
    allowed = [entry for entry in addresses if rules.allow_private or is_public(entry[1][0])]
    if not allowed:
        raise VideoError(
            f"{name} leads to {addresses[0][1][0]}, an address that is not public; give UrlRules(allow_private=True)"
            " if you trust it"
        )
    return allowed


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address is one of the public internet, and so is any IPv4 address wrapped in it.

    Not public: loopback, private, link-local (cloud metadata too), shared, multicast, reserved, unspecified; and those
    inside IPv4-mapped, 6to4, Teredo and NAT64 addresses, by which the same machines are reached.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.version == 6:
        if any(parsed in network for network in _NAT64):
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
        wrapped = [parsed.ipv4_mapped, parsed.sixtofour, *(parsed.teredo or ())]
        if not all(is_public(str(inner)) for inner in wrapped if inner is not None):
            return False
        if parsed.ipv4_mapped is not None:  # its own range is reserved
            return True
        if parsed.is_site_local:
            return False
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified)
