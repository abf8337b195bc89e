"""What is said of an object store's address before anything is sent there; a real store is in tests/cluster."""

from dataclasses import dataclass

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


def test_a_store_that_only_redirects_is_no_store(tmp_path):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(301)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Redirect)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(CacheloraError, match=r"it answers with redirects|it refuses with"):
            check_inputs("s3://bucket/prefix", {}, Settings(f"http://127.0.0.1:{server.server_port}"))
    finally:
        server.shutdown()
