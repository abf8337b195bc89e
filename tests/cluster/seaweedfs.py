"""A real object store: SeaweedFS, speaking S3 on this machine only."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

KEY_ID = "cachelora-tests"
READER = "cachelora-reader"
"""A key, with the same secret, that may not write."""
SECRET = "s3-averysecretkey"
"""The secret key that must not turn up anywhere."""


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on, all different; each also free 10,000 above, where SeaweedFS puts gRPC."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port + 10_000 > 65_535 or port in ports:
                continue
            try:
                other.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            ports.append(port)
    return ports


def client(url: str, secret: str = SECRET):
    """Return a client of the store."""
    return boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id=KEY_ID, aws_secret_access_key=secret,
        config=Config(connect_timeout=2, read_timeout=20, retries={"max_attempts": 1}),
    )  # fmt: skip


@contextmanager
def object_store(folder: Path) -> Iterator[str]:
    """Run SeaweedFS with its data in a folder, and give its S3 address once it answers."""
    folder.mkdir(parents=True)
    users = {
        "identities": [
            {
                "name": "tests",
                "credentials": [{"accessKey": KEY_ID, "secretKey": SECRET}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            },
            {
                "name": "reader",
                "credentials": [{"accessKey": READER, "secretKey": SECRET}],
                "actions": ["Read", "List"],
            },
        ]
    }
    (folder / "users.json").write_text(json.dumps(users), encoding="utf-8")
    (folder / "data").mkdir()
    s3, master, volume, filer = free_ports(4)
    command = [
        str(Path(sys.executable).with_name("weed")), "server", "-s3", f"-dir={folder / 'data'}",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}",
        f"-filer.port={filer}", f"-s3.config={folder / 'users.json'}", f"-s3.localSocket={folder / 's3.sock'}",
        # Small volumes, made when they are needed, and no other services.
        "-master.volumeSizeLimitMB=64", "-volume.max=100", "-volume.preStopSeconds=0", "-master.telemetry=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0",
    ]  # fmt: skip
    log = folder / "log.txt"
    with log.open("wb") as stream, subprocess.Popen(command, stdout=stream, stderr=stream, cwd=folder) as process:
        try:
            url = f"http://127.0.0.1:{s3}"
            deadline = time.monotonic() + 60
            while True:
                try:
                    client(url).create_bucket(Bucket="ready")
                    client(url).put_object(Bucket="ready", Key="ready", Body=b"ready")
                    break
                except (BotoCoreError, ClientError):
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                    time.sleep(0.2)
            client(url).delete_object(Bucket="ready", Key="ready")
            client(url).delete_bucket(Bucket="ready")
            yield url
        finally:
            process.kill()
