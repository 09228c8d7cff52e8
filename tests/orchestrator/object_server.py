"""A real S3 server on a free loopback port, and a wire to it that tests can count, cut and spoil."""

import contextlib
import http.client
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "bucket"
HOP_BY_HOP = {"connection", "expect", "transfer-encoding"}


@contextlib.contextmanager
def object_server() -> Iterator[str]:
    """A server in a process of its own, with one bucket; yields its endpoint."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
        for _ in range(600):
            assert process.poll() is None, "the server did not start: is moto[s3] installed?"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=5).close()
                break
            time.sleep(0.1)
        yield endpoint
    finally:
        process.kill()
        process.wait()


def never(method: str, path: str) -> bool:
    """Of no request."""
    del method, path
    return False


def naming(text: str) -> Callable[[str, str], bool]:
    """Of requests whose path holds a text."""
    return lambda _, path: text in path


class Wire:
    """Passes requests on to a server and remembers them.

    Attributes:
        seen: method and path of each request.
        refuse: answers 503 to those it holds true for; may take its time.
        spoil: flips the first byte of the answer to those it holds true for.
    """

    def __init__(self, endpoint: str) -> None:
        self.target = endpoint.removeprefix("http://")
        self.seen: list[tuple[str, str]] = []
        self.refuse = self.spoil = never
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handler(wire) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _pass(self) -> None:
                body = self._body()
                wire.seen.append((self.command, self.path))
                if wire.refuse(self.command, self.path):
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                upstream = http.client.HTTPConnection(wire.target, timeout=60)
                headers = {n: v for n, v in self.headers.items() if n.lower() not in HOP_BY_HOP}
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                content = answer.read()
                if content and wire.spoil(self.command, self.path):
                    content = bytes([content[0] ^ 1]) + content[1:]
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in HOP_BY_HOP:
                        self.send_header(name, value)
                if answer.getheader("Content-Length") is None:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)
                upstream.close()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass  # noqa: N815

        return Handler
