"""Downloads against a server of our own: what is served wrongly, too long, too slowly or from the wrong place."""

import base64
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from keye.errors import KeyeError, VideoError
from keye.video import fetch
from keye.video.fetch import UrlRules, data_bytes, download, file_path, is_public, scheme_of, url_name

HERE = UrlRules(allow_private=True, timeout=5.0)
BODY = bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        getattr(self, f"serve_{self.path.split('?')[0].strip('/').split('/')[0]}")()

    def answer(self, code, headers=(), body=b""):
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:  # the client has closed the connection
            pass

    def serve_whole(self):
        self.answer(200, [("Content-Length", str(len(BODY)))], BODY)

    def serve_nolength(self):
        self.answer(200, [], BODY)

    def serve_chunked(self):
        self.protocol_version = "HTTP/1.1"
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:100], BODY[100:])) + b"0\r\n\r\n"
        self.answer(200, [("Transfer-Encoding", "chunked"), ("Content-Length", "5")], body)

    def serve_short(self):
        self.answer(200, [("Content-Length", str(len(BODY) + 1))], BODY)

    def serve_lying(self):
        self.answer(200, [("Content-Length", "100")], BODY)

    def serve_huge(self):
        self.answer(200, [("Content-Length", str(1 << 40))], b"x")

    def serve_endless(self):
        self.answer(200)
        try:
            while True:
                self.wfile.write(bytes(1 << 16))
        except OSError:
            self.server.stopped.set()

    def serve_drip(self):
        self.answer(200)
        self._drip(b".")

    def serve_dripheader(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        self._drip(b"x")

    def _drip(self, piece):
        try:
            for _ in range(200):
                self.wfile.write(piece)
                time.sleep(0.05)
        except OSError:
            self.server.stopped.set()

    def serve_missing(self):
        self.answer(404)

    def serve_packed(self):
        self.answer(200, [("Content-Encoding", "gzip")], BODY)

    def serve_partial(self):
        self.answer(206, [], BODY)

    def serve_loop(self):
        self.answer(302, [("Location", "/loop")])

    def serve_once(self):
        self.answer(301, [("Location", "whole?from=once")])

    def serve_to(self):
        self.answer(307, [("Location", self.path.partition("?")[2])])

    def serve_nonsense(self):
        self.wfile.write(b"\x00\x01\x02 this is no HTTP\r\n\r\n")

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.daemon_threads = True
    served.requests, served.stopped = [], threading.Event()
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield SimpleNamespace(
        url=lambda path: f"http://127.0.0.1:{served.server_port}/{path}",
        port=served.server_port,
        requests=served.requests,
        stopped=served.stopped,
    )
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize("path", ["whole", "nolength", "chunked", "once", "whole/%C3%A9 é?a=b c"])
def test_a_download_exists_until_it_is_closed(server, path):
    with download(server.url(path), HERE) as file:
        assert file.read_bytes() == BODY
    assert not file.exists()
    assert server.requests[-1][1]["Host"] == f"127.0.0.1:{server.port}"


def test_a_declared_length_that_is_too_small_is_used(server):
    with download(server.url("lying"), HERE) as file:
        assert file.read_bytes() == BODY[:100]


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("missing", "missing returns 404 Not Found; check the URL"),
        ("partial", "returns 206"),
        ("packed", "compressed"),
        ("short", "ended after 10,240 of 10,241 bytes"),
        ("loop", "more than 5 redirects; raise max_redirects"),
        ("nonsense", "cannot be downloaded"),
        ("to?ftp://example.com/a.mp4", "target of a redirect but not http or https"),
        ("to?file:///etc/passwd", "target of a redirect but not http or https"),
        ("to?http://[bad/", "redirects to an invalid URL"),
    ],
)
def test_bad_responses_are_errors(server, path, match):
    with pytest.raises(VideoError, match=match) as caught, download(server.url(path), HERE):
        pass
    assert "\n" not in str(caught.value)


def test_nothing_is_downloaded_without_rules(server):
    with pytest.raises(VideoError, match=r"downloads are off by default; give urls=UrlRules\(\)"):
        with download(server.url("whole"), None):
            pass
    assert not server.requests


def test_size_is_limited_by_the_received_bytes(server):
    with pytest.raises(VideoError, match="has 1,099,511,627,776 bytes, and 1,073,741,824 are allowed; raise max_bytes"):
        with download(server.url("huge"), HERE):
            pass
    rules = UrlRules(allow_private=True, max_bytes=len(BODY) - 1)
    for path in ("nolength", "chunked", "endless"):
        with pytest.raises(VideoError, match="more than the 10,239 bytes allowed"), download(server.url(path), rules):
            pass
    assert server.stopped.wait(5)
    with download(server.url("nolength"), UrlRules(allow_private=True, max_bytes=len(BODY))) as file:
        assert file.stat().st_size == len(BODY)


@pytest.mark.parametrize("path", ["drip", "dripheader"])
def test_the_total_time_is_limited(server, path):
    began = time.monotonic()
    with pytest.raises(VideoError, match="not downloaded within 0.3 s; raise timeout"):
        with download(server.url(path), UrlRules(allow_private=True, timeout=0.3)):
            pass
    assert time.monotonic() - began < 5  # dripping lasts ten
    assert server.stopped.wait(5)


def test_private_addresses_are_refused(server):
    with pytest.raises(VideoError, match="127.0.0.1, an address that is not public; give UrlRules"):
        with download(server.url("whole"), UrlRules()):
            pass
    for host in ("localhost", "127.1", "2130706433", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]", "0"):
        with pytest.raises(VideoError, match="not public|not known"):
            with download(f"http://{host}:{server.port}/whole", UrlRules()):
                pass
    assert not server.requests


def _names(monkeypatch, table):
    """Make names resolve as the table says; connections to public addresses end at the server."""
    resolved = []

    def resolve(host, port, *args, **options):
        resolved.append(host)
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in table[host].pop(0)]
        return found

    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolve)
    return resolved


def _reroute(monkeypatch, port):
    """Connections to whatever address end at the local server; returns the addresses that were meant."""
    meant = []
    connect = socket.socket.connect

    def local(self, address):
        meant.append(address)
        return connect(self, ("127.0.0.1", port))

    monkeypatch.setattr(socket.socket, "connect", local)
    return meant


def test_a_redirect_to_a_private_address_is_refused(server, monkeypatch):
    _names(monkeypatch, {"public.test": [["8.8.8.8"]], "inner.test": [["10.0.0.7"]]})
    meant = _reroute(monkeypatch, server.port)
    with pytest.raises(VideoError, match=r"inner.test/secret resolves to 10.0.0.7, an address that is not public"):
        with download("http://public.test/to?http://inner.test/secret", UrlRules()):
            pass
    assert meant == [("8.8.8.8", 80)] and len(server.requests) == 1


def test_the_address_that_was_checked_is_the_one_connected_to(server, monkeypatch):
    # A name that resolves to a public and then to a private address is resolved only once.
    resolved = _names(monkeypatch, {"turning.test": [["8.8.8.8"], ["127.0.0.1"]]})
    meant = _reroute(monkeypatch, server.port)
    with download("http://turning.test/whole", UrlRules()) as file:
        assert file.read_bytes() == BODY
    assert resolved == ["turning.test"] and meant == [("8.8.8.8", 80)]
    assert server.requests[0][1]["Host"] == "turning.test"


def test_of_several_addresses_only_public_ones_are_tried(server, monkeypatch):
    _names(monkeypatch, {"mixed.test": [["192.168.0.9", "1.1.1.1"]]})
    meant = _reroute(monkeypatch, server.port)
    with download("http://mixed.test/whole", UrlRules()):
        pass
    assert meant == [("1.1.1.1", 80)]


def test_tls_is_verified_against_the_name(server, monkeypatch):
    wrapped = []

    def wrap(self, connected, server_hostname):
        wrapped.append((server_hostname, self.verify_mode, self.check_hostname))
        raise ssl.SSLCertVerificationError(1, "certificate verify failed")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap)
    _names(monkeypatch, {"bücher.test".encode("idna").decode(): [["8.8.8.8", "1.1.1.1"]]})
    _reroute(monkeypatch, server.port)
    with pytest.raises(VideoError, match="certificate verify failed"), download("https://bücher.test/a", UrlRules()):
        pass
    assert wrapped == [("xn--bcher-kva.test", ssl.CERT_REQUIRED, True)]
    assert not server.requests


def test_https_does_not_fall_back_to_http(server, monkeypatch):
    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", lambda self, connected, server_hostname: connected)
    _names(monkeypatch, {"safe.test": [["8.8.8.8"]]})
    _reroute(monkeypatch, server.port)
    with pytest.raises(VideoError, match="redirects from https to http"):
        with download("https://safe.test/to?http://plain.test/a", UrlRules()):
            pass


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("ftp://example.com/a.mp4", "is not an http or https URL"),
        ("rtsp://example.com/a", "is not an http or https URL"),
        ("http:///a.mp4", "has no host"),
        ("http://user:word@example.com/a.mp4?key=1", "http://example.com/a.mp4 contains a user name"),
        ("http://example.com:99999/", "not a valid URL"),
        ("http://no.such.name.invalid/", "host of http://no.such.name.invalid/ is not known"),
    ],
)
def test_invalid_urls(url, match):
    with pytest.raises(VideoError, match=match), download(url, UrlRules(timeout=20)):
        pass


# Addresses of RFC 6890's registry, and the ways to write IPv4 inside IPv6.
PRIVATE = """0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.0.2.1 192.168.1.1
198.18.0.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 :: ::1 fe80::1 fe80::1%eth0 fc00::1 fd12::1 fec0::1
ff02::1 2001:db8::1 100::1 ::ffff:127.0.0.1 ::ffff:a9fe:a9fe ::127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::a00:1 2002:7f00:1::
2002:a9fe:a9fe::1 2001:0:7f00:1::1""".split()
PUBLIC = """1.1.1.1 8.8.8.8 172.15.0.1 172.32.0.1 100.128.0.1 2606:4700::1111 2001:4860:4860::8888 ::ffff:8.8.8.8
64:ff9b::808:808 2002:808:808::1""".split()


def test_public_and_private_addresses():
    assert [address for address in PRIVATE if is_public(address)] == []
    assert [address for address in PUBLIC if not is_public(address)] == []


def test_schemes():
    for text in ("a.mp4", "/a/b.mp4", "C:\\clips\\a.mp4", "C://a", "concat:a|b", "://", "", 3, b"http://a", Path("a")):
        assert scheme_of(text) is None, text
    assert [scheme_of(text) for text in ("HTTP://a", "data:,a", "file:///a", "s3://b/c")] == [
        "http",
        "data",
        "file",
        "s3",
    ]


def test_data_urls():
    text = base64.b64encode(BODY).decode()
    for url in (
        f"data:video/mp4;base64,{text}",
        f"DATA:;base64,{text.rstrip('=')}",
        f"data:a/b;x=y;base64,{text[:9]}\n{text[9:]}",
    ):
        assert data_bytes(url) == BODY
    assert data_bytes("data:text/plain,a%20b") == b"a b"
    with pytest.raises(VideoError, match="has no comma"):
        data_bytes("data:video/mp4;base64")
    with pytest.raises(VideoError, match="a data: URL of 26 characters is not base64"):
        data_bytes("data:video/mp4;base64,A*==")


def test_file_urls():
    assert file_path("file:///a%20b/c.mp4") == file_path("file://localhost/a%20b/c.mp4") == Path("/a b/c.mp4")
    with pytest.raises(VideoError, match="names the machine 'there'"):
        file_path("file://there/c.mp4")


def test_names_of_urls_contain_no_secrets():
    assert url_name("https://user:word@a.org:8080/b.mp4?token=abc#d") == "https://a.org:8080/b.mp4"
    assert url_name("data:video/mp4;base64,AAAA") == "a data: URL of 26 characters"


def test_rules_that_allow_no_download_are_errors():
    for wrong in ({"max_bytes": 0}, {"timeout": 0}, {"max_redirects": -1}, {"timeout": None}, {"max_bytes": "1G"}):
        with pytest.raises(KeyeError, match="allow no download"):
            UrlRules(**wrong)
