"""What is said of an object store's address before anything is sent there; a real store is in tests/cluster."""

from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from conftest import KEY

from cachelora.errors import CacheloraError
from cachelora.objectstore import check_inputs

pytest.importorskip("boto3", reason="boto3 is not installed: requirements/s3.txt")


@dataclass
class Settings:
    endpoint_url: str | None
    region: str | None = "us-east-1"
    access_key: str | None = "me"
    secret_key: str | None = KEY
    token: str | None = None
    signature_version: str | None = None


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (f"http://me:{KEY}@127.0.0.1:1", "--storage-s3-endpoint-url: it holds a user or a password"),
        ("http://127.0.0.1:1", "s3://bucket at http://127.0.0.1:1: it does not answer"),
    ],
)
def test_an_address_that_cannot_be_right_is_named_and_no_password_shown(address, message):
    with pytest.raises(CacheloraError) as error:
        check_inputs("s3://bucket/prefix", {}, Settings(address))
    assert str(error.value).startswith(message)
    assert KEY not in str(error.value)


class Redirect(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(301)
        self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}{self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


class Portal(Redirect):
    def do_GET(self):
        page = b"<html><body><p>Please log in</p></body></html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    do_HEAD = do_GET


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (Redirect, r"it answers with redirects|it refuses with"),
        (Portal, r"it answers, but not as S3 does|it does not answer"),
    ],
)
def test_what_only_redirects_or_shows_a_page_is_no_store(handler, message):
    server = HTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(CacheloraError, match=message):
            check_inputs("s3://bucket/prefix", {}, Settings(f"http://127.0.0.1:{server.server_port}"))
    finally:
        server.shutdown()
