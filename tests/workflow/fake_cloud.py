"""A cloud on localhost: buckets, and the addresses to which three executors send their jobs.

It speaks as much of the protocols of S3, Cloud Storage, Kubernetes, AWS Batch and Google Batch as the real clients ask
for while Snakemake plans, submits and sees a job fail. No job runs: each is recorded and reported as failed.
"""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "site-bucket"
LONG_AGO = "2020-01-01T00:00:00.000Z"


class FakeCloud(ThreadingHTTPServer):
    """Answers on a free port for as long as the context lasts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, bytes] = {}
        """What lies in the bucket, by key."""
        self.made: str | None = None
        """All that begins so is said to lie there too, as files of one kilobyte; None for nothing."""
        self.submitted: list[dict[str, Any]] = []
        """The jobs as they came over the wire: V1Job, RegisterJobDefinition, Job of Google Batch."""
        self.secrets: list[dict[str, Any]] = []

    def __enter__(self) -> "FakeCloud":
        Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer in one packet: in two, each waits for an acknowledgement.
    wbufsize = -1
    server: FakeCloud

    def log_message(self, *arguments: object) -> None:
        """Keep the terminal for the tests."""

    def send(self, body: bytes | dict[str, Any] = b"", status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml" if isinstance(body, bytes) else "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        path, query = url.path, {key: values[0] for key, values in parse_qs(url.query).items()}
        if path.startswith(("/storage/v1/b/", "/upload/storage/v1/b/")):
            self.cloud_storage(path.split("/b/")[1], query, body)
        elif path.startswith(("/api/v1/namespaces/", "/apis/batch/v1/namespaces/")):
            self.kubernetes(path, json.loads(body or b"{}"))
        elif path.startswith("/v1/projects/"):
            self.google_batch(path, json.loads(body or b"{}"))
        elif path.startswith(f"/{BUCKET}"):
            self.s3(unquote(path).removeprefix(f"/{BUCKET}").lstrip("/"), query, body)
        elif path.startswith("/v1/"):
            self.aws_batch(path.removeprefix("/v1/"), json.loads(body))
        else:
            self.send(b"", 404)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def find(self, key: str) -> bytes | None:
        """Return what lies in the bucket under a key."""
        made = self.server.made is not None and key.startswith(self.server.made) and not key.endswith("/")
        return bytes(1000) if made else self.server.objects.get(key)

    def s3(self, key: str, query: dict[str, str], body: bytes) -> None:
        objects = self.server.objects
        if self.command == "PUT":
            objects[key] = body
            self.send(ETag='"0"')
        elif self.command == "DELETE":
            # Nothing is deleted, so that the sources of a run can be looked at after it.
            self.send(status=204)
        elif not key and self.command == "HEAD":
            self.send()
        elif not key:
            found = "".join(
                f"<Contents><Key>{escape(name)}</Key><LastModified>{LONG_AGO}</LastModified><ETag>0</ETag>"
                f"<Size>{len(content)}</Size></Contents>"
                for name, content in sorted(objects.items())
                if name.startswith(query.get("prefix", ""))
            )
            self.send(f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode())
        elif (content := self.find(key)) is not None:
            self.send(
                content,
                Content_Length=str(len(content)), Last_Modified="Wed, 01 Jan 2020 00:00:00 GMT", ETag='"0"',
            )  # fmt: skip
        else:
            self.send(status=404)

    def cloud_storage(self, path: str, query: dict[str, str], body: bytes) -> None:
        objects = self.server.objects
        _, _, rest = path.partition("/")
        key = unquote(rest.removeprefix("o").lstrip("/"))

        def described(name: str, content: bytes) -> dict[str, Any]:
            # No checksum: nothing is read back.
            return {"name": name, "bucket": BUCKET, "size": str(len(content)), "updated": LONG_AGO}

        if self.command == "POST":
            # A multipart upload: JSON with the name, then the content.
            boundary = b"--" + self.headers["Content-Type"].split("boundary=")[1].strip("\"'").encode()
            described_part, content_part = body.split(boundary)[1:3]
            name = json.loads(described_part.split(b"\r\n\r\n", 1)[1])["name"]
            objects[name] = content_part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
            self.send(described(name, objects[name]))
        elif self.command == "DELETE":
            self.send(status=204)
        elif not rest:
            self.send({"name": BUCKET})
        elif not key:
            prefix = query.get("prefix", "")
            self.send({"items": [described(name, found) for name, found in objects.items() if name.startswith(prefix)]})
        elif (content := self.find(key)) is not None:
            self.send(described(key, content))
        else:
            self.send({"error": {"code": 404, "message": "not found"}}, 404)

    def kubernetes(self, path: str, body: dict[str, Any]) -> None:
        if path.endswith("/secrets"):
            self.server.secrets.append(body)
            self.send(body, 201)
        elif self.command == "POST":
            self.server.submitted.append(body)
            self.send(body, 201)
        elif path.endswith("/status"):
            self.send({"status": {"failed": 1}})
        elif path.endswith("/pods"):
            self.send({"items": []})
        else:
            self.send({})

    def aws_batch(self, operation: str, body: dict[str, Any]) -> None:
        if operation == "registerjobdefinition":
            self.server.submitted.append(body)
            name = body["jobDefinitionName"]
            self.send({"jobDefinitionName": name, "jobDefinitionArn": f"arn:{name}", "revision": 1})
        elif operation == "submitjob":
            self.server.submitted[-1]["queue"] = body["jobQueue"]
            self.send({"jobName": body["jobName"], "jobId": body["jobName"]})
        elif operation == "describejobs":
            failed = {"jobQueue": "queue", "status": "FAILED", "statusReason": "out of memory", "startedAt": 1}
            self.send(
                {"jobs": [failed | {"jobName": name, "jobId": name, "jobDefinition": "arn"} for name in body["jobs"]]}
            )
        else:
            self.send({})

    def google_batch(self, path: str, body: dict[str, Any]) -> None:
        if self.command == "POST":
            self.server.submitted.append(body)
            self.send(body | {"name": f"{path.removeprefix('/v1/')}/{len(self.server.submitted)}", "uid": "1"})
        else:
            self.send({"name": path.removeprefix("/v1/"), "status": {"state": "FAILED"}})
