"""What a cluster's answers, and its silence, are called: nothing unheard is a failed job."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cluster.connection import BadAddress, Cluster, ClusterUnreachable
from cluster.jobs import AccessRefused, Job, Jobs, JobsError, checked_address


@pytest.fixture
def answering():
    """Start a server that answers every request in one way; gives its address."""
    servers = []

    def start(status: int, body: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_HEADERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "auto", "http://", "ftp://x"])
def test_an_address_that_is_no_dashboard_is_refused_with_an_example(address):
    with pytest.raises(BadAddress, match="such as http://head:8265"):
        checked_address(address)


def test_no_password_gets_into_the_record():
    with pytest.raises(BadAddress, match="no passwords in an address"):
        checked_address("https://me:secret@head:8265")


def test_a_dashboard_is_not_joined():
    with pytest.raises(BadAddress, match="`layersweep submit`"):
        Cluster("http://head:8265")


@pytest.mark.parametrize("status", [401, 403])
def test_a_missing_or_wrong_token_says_what_to_set(answering, status):
    with pytest.raises(AccessRefused, match="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"):
        Jobs(answering(status, "Unauthorized"))


def test_a_proxy_without_its_head_is_no_answer(answering):
    with pytest.raises(ClusterUnreachable, match="status 503"):
        Jobs(answering(503, "Service Unavailable"))


def test_something_else_on_the_port_is_named(answering):
    with pytest.raises(JobsError, match="is not Ray's dashboard"):
        Jobs(answering(200, "<html>It works!</html>"))


def test_a_closed_port_is_no_answer_and_rays_variables_do_not_redirect_us(answering, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", answering(401, ""))
    with pytest.raises(ClusterUnreachable, match=r"no answer from http://127.0.0.1:1: .*refused"):
        Jobs("http://127.0.0.1:1")


def test_headers_must_be_json(monkeypatch):
    monkeypatch.setenv("RAY_JOB_HEADERS", "Name: value")
    with pytest.raises(BadAddress, match="RAY_JOB_HEADERS is no JSON object"):
        Jobs("http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("state", "exit_status", "handed_on"),
    [("done", 0, 0), ("failed", 3, 3), ("failed", None, 1), ("stopped", None, 130)],
)
def test_a_jobs_own_exit_status_is_handed_on(state, exit_status, handed_on):
    assert Job("j", state, exit_status, "", None, {}).status == handed_on
