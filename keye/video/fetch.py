"""Videos and pictures of URLs: `data:` and `file:` are decoded here, `http(s):` is downloaded only on request.

URLs in a data set come from strangers, and the training machine can reach hosts that they cannot. Nothing is fetched
unless the caller gives `UrlRules`. Then names are resolved once, every address is checked, and the connection goes to
the checked address, so that a later change of the name's address has no effect. Each redirect is checked like the first
URL. TLS is verified against the name. Size and time are limited while reading, whatever the server declares. Proxies of
the environment are not used, since they would resolve the name again.
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
    """Limits of downloads.

    max_bytes: size of the largest file. timeout: seconds in total, including redirects. allow_private: also allow
    addresses of this machine and its local networks. max_redirects: how many redirects are followed.

    Raises:
        KeyeError: a limit allows no download.
    """

    max_bytes: int = 1 << 30
    timeout: float = 60.0
    allow_private: bool = False
    max_redirects: int = 5

    def __post_init__(self) -> None:
        try:
            allowed = self.max_bytes >= 1 and self.timeout > 0 and self.max_redirects >= 0
        except TypeError:  # not a number
            allowed = False
        if not allowed:
            raise KeyeError(
                f"UrlRules with max_bytes={self.max_bytes}, timeout={self.timeout}, max_redirects={self.max_redirects}"
                " allow no download; give max_bytes >= 1, timeout > 0 and max_redirects >= 0"
            )


def scheme_of(source: object) -> str | None:
    """The scheme of a URL in lower case ("http", "data", "file", …), None for anything else, paths included."""
    if not isinstance(source, str):
        return None
    found = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+)://|(data):", source)
    return (found[1] or found[2]).lower() if found else None


def url_name(url: str) -> str:
    """A URL for messages, without long or secret parts (contents, user, password, query)."""
    if scheme_of(url) == "data":
        return f"a data: URL of {len(url)} characters"
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.split("?")[0]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def path_name(path: str | os.PathLike) -> str:
    """A path as text that can be printed and written; on Linux names are bytes that need not be UTF-8."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:  # not a name of this system
        name = str(path).encode("utf-8", "backslashreplace")
    return name.decode("utf-8", "backslashreplace")


def file_path(url: str) -> Path:
    """The path of a `file:` URL; VideoError if the URL names another machine."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise VideoError(f"{url} names the machine {parts.netloc!r}; give a local path, as in file:///videos/a.mp4")
    if not parts.path:
        raise VideoError(f"{url} names no file; write it as file:///videos/a.mp4")
    return Path(url2pathname(parts.path))


def data_bytes(url: str) -> bytes:
    """The contents of a `data:` URL (RFC 2397); VideoError if it is malformed."""
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
    """Download an http(s) URL to a temporary file, which is deleted on exit.

    Args:
        url: the URL.
        rules: limits of the download; None refuses it.

    Raises:
        VideoError: the URL cannot be downloaded or is not allowed.
    """
    name = url_name(url)
    if scheme_of(url) not in _PORTS:
        raise VideoError(f"{name} is not an http or https URL; download it yourself and give the path")
    if rules is None:
        raise VideoError(f"{name} is a URL, and downloads are off by default; give urls=UrlRules() to allow them")
    with tempfile.NamedTemporaryFile(prefix="keye-") as file:
        try:
            _Download(rules, file).fetch(url)
            file.flush()
        except (OSError, http.client.HTTPException) as error:  # ssl.SSLError and time-outs are OSErrors
            reason = getattr(error, "verify_message", "") or getattr(error, "strerror", None) or str(error)
            reason = " ".join((reason or type(error).__name__).split())[:120]
            raise VideoError(f"{name} cannot be downloaded ({reason}); check the URL") from error
        yield Path(file.name)


class _Download:
    """One download under `rules`; name: of the current URL, which redirects change."""

    def __init__(self, rules: UrlRules, file: tempfile._TemporaryFileWrapper):
        self.rules, self.file, self.name = rules, file, ""
        self.deadline = time.monotonic() + rules.timeout

    def fetch(self, url: str) -> None:
        """Write the content of the URL to the file, following redirects."""
        for _ in range(self.rules.max_redirects + 1):
            self.name = url_name(url)
            following = self.request(url)
            if following is None:
                return
            if scheme_of(url) == "https" and scheme_of(following) == "http":
                raise VideoError(f"{self.name} redirects from https to http; download it yourself if you trust it")
            url = following
        raise VideoError(f"{url_name(url)} follows more than {self.rules.max_redirects} redirects; raise max_redirects")

    def request(self, url: str) -> str | None:
        """Request one URL; write its body to the file, or return the URL that it redirects to."""
        scheme, host, port, target = _parts(url)
        connection = self.connect(scheme, host, port)
        # A server that sends single bytes never exceeds a socket's timeout, so the connection ends at the deadline.
        timer = threading.Timer(max(self.deadline - time.monotonic(), 0.0), _shut_down, [connection.sock])
        timer.daemon = True
        timer.start()
        try:
            connection.request("GET", target, headers=_HEADERS)
            response = connection.getresponse()
            if response.status in _REDIRECTS and response.getheader("Location"):
                try:
                    return urljoin(url, response.getheader("Location"))
                except ValueError as error:
                    raise VideoError(f"{self.name} redirects to an invalid URL; check the URL") from error
            if response.status != 200:
                status = f"{response.status} {response.reason}".rstrip()
                raise VideoError(f"{self.name} returns {status}; check the URL")
            if response.getheader("Content-Encoding", "identity").lower() != "identity":
                raise VideoError(f"{self.name} is sent compressed, against the request; download it yourself")
            self.save(response)
        except (OSError, http.client.HTTPException):
            self.check_time()
            raise
        finally:
            timer.cancel()
            connection.close()
        return None

    def save(self, response: http.client.HTTPResponse) -> None:
        """Write the body of a response to the file, within the limits of size and time."""
        declared, limit = response.length, self.rules.max_bytes
        if declared is not None and declared > limit:
            raise VideoError(f"{self.name} has {declared:,} bytes, and {limit:,} are allowed; raise max_bytes")
        count = 0
        while chunk := response.read1(_CHUNK):
            count += len(chunk)
            if count > limit:
                raise VideoError(f"{self.name} has more than the {limit:,} bytes allowed; raise max_bytes")
            self.check_time()
            self.file.write(chunk)
        self.check_time()
        if declared is not None and count < declared:
            raise VideoError(f"the download of {self.name} ended after {count:,} of {declared:,} bytes; try again")

    def check_time(self) -> None:
        if time.monotonic() >= self.deadline:
            raise VideoError(f"{self.name} was not downloaded within {self.rules.timeout:g} s; raise timeout")

    def connect(self, scheme: str, host: str, port: int) -> http.client.HTTPConnection:
        """A connection to one of the host's checked addresses, with TLS for the host's name."""
        failure: OSError | None = None
        for family, address in self.addresses(host, port):
            self.check_time()
            connected = socket.socket(family, socket.SOCK_STREAM)
            connected.settimeout(max(self.deadline - time.monotonic(), 0.001))
            try:
                connected.connect(address)
                if scheme == "https":
                    connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
            except OSError as error:
                failure = error
                connected.close()
                if isinstance(error, ssl.SSLError):  # the certificate would be invalid at the other addresses, too
                    break
                continue
            connection = http.client.HTTPConnection(host, port)
            connection.default_port = _PORTS[scheme]  # the port that the Host header omits
            connection.sock = connected
            return connection
        self.check_time()
        assert failure is not None
        raise failure

    def addresses(self, host: str, port: int) -> list[tuple[int, tuple]]:
        """(family, socket address) of every allowed address of the host, within the deadline."""
        found: list = []

        def resolve() -> None:
            try:
                found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError) as error:
                found.append(error)

        # The system's resolver has no time limit, so it runs in a thread that can be abandoned.
        thread = threading.Thread(target=resolve, daemon=True)
        thread.start()
        thread.join(max(self.deadline - time.monotonic(), 0.0))
        self.check_time()
        if not found or isinstance(found[0], Exception):
            raise VideoError(f"the host of {self.name} is not known; check the URL and the network")
        addresses = [(family, address) for family, _, _, _, address in found]
        allowed = [entry for entry in addresses if self.rules.allow_private or is_public(entry[1][0])]
        if not allowed:
            raise VideoError(
                f"{self.name} resolves to {addresses[0][1][0]}, an address that is not public; give"
                " UrlRules(allow_private=True) if you trust it"
            )
        return allowed


def _shut_down(connection: socket.socket) -> None:
    try:
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:  # already closed
        pass


def _parts(url: str) -> tuple[str, str, int, str]:
    """(scheme, host in ASCII, port, request target) of an http(s) URL."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or _PORTS.get(parts.scheme, 0)
        host = host if ":" in host else host.encode("idna").decode()
    except (ValueError, UnicodeError) as error:
        raise VideoError(f"{url_name(url)} is not a valid URL ({error}); check it") from error
    if parts.scheme not in _PORTS:
        raise VideoError(f"{url_name(url)} is the target of a redirect but not http or https; check the URL")
    if not host:
        raise VideoError(f"{url_name(url)} has no host; check the URL")
    if "@" in parts.netloc:
        raise VideoError(f"{url_name(url)} contains a user name; download it yourself and give the path")
    safe = "%/:=&?~+!$,;'@()*[]"
    target = quote(parts.path or "/", safe) + (f"?{quote(parts.query, safe)}" if parts.query else "")
    return parts.scheme, host, port, target


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address, and any IPv4 address embedded in it, is on the public internet.

    Not public are loopback, private, link-local (including cloud metadata), shared, multicast, reserved and unspecified
    addresses, and those embedded in IPv4-mapped, 6to4, Teredo and NAT64 addresses, which reach the same machines.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.version == 6:
        if any(parsed in network for network in _NAT64):
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
        embedded = [parsed.ipv4_mapped, parsed.sixtofour, *(parsed.teredo or ())]
        if not all(is_public(str(inner)) for inner in embedded if inner is not None):
            return False
        if parsed.ipv4_mapped is not None:  # its own range is reserved
            return True
        if parsed.is_site_local:
            return False
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified)
