"""Time, peak memory and counts of augmenting many queries by a server that answers at once. See docs/engines.md.

    python benchmarks/augment_many.py --queries 5000

What is measured is everything of ours: prompts, HTTP, retries, journal with fsync, checks, table. The server is a
process of its own and refuses one request in fifty with 503.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

from cachelora.augment import query_live
from cachelora.augment.openai import OpenAI
from cachelora.augment.prompt import AugmentPrompts
from cachelora.augment.shard import Shard
from cachelora.config import Augment, OpenAIEngine, read_config
from cachelora.text import digest

REPLIES = {
    "paraphrases": ["in other words", "asked another way", "the same again"],
    "negatives": [{"kind": kind, "text": kind} for kind in ("aspect", "entity", "scope", "quantity")],
}


class Handler(BaseHTTPRequestHandler):
    """Answers every request at once, one in fifty with 503."""

    protocol_version = "HTTP/1.1"
    asked = count()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def send(self, status: int, body: Any) -> None:
        """Send JSON."""
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        """List no models."""
        self.send(200, {"object": "list", "data": []})

    def do_POST(self) -> None:
        """Answer what is asked for."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if next(self.asked) % 50 == 49:
            self.send(503, {"error": {"message": "busy"}})
            return
        task = "negatives" if b"look like the query" in body[-2000:] else "paraphrases"
        message = {"role": "assistant", "content": json.dumps({task: REPLIES[task]})}
        usage = {"prompt_tokens": 650, "completion_tokens": 60, "total_tokens": 710}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        head = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
        self.send(200, head | {"choices": choices, "usage": usage})


def serve(ports: multiprocessing.Queue) -> None:
    """Answer until killed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ports.put(server.server_address[1])
    server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--at-once", type=int, default=64)
    arguments = parser.parse_args()
    ports: multiprocessing.Queue = multiprocessing.Queue()
    process = multiprocessing.Process(target=serve, args=(ports,), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{ports.get()}/v1"
    config = read_config("config/domains.yaml")
    prompts = AugmentPrompts(config.prompt_of("medical"), 3, 4, 200)
    texts = [f"what about case number {number}" for number in range(arguments.queries)]
    with tempfile.TemporaryDirectory() as folder:
        for which in ("asked", "from the journal"):
            begin = time.monotonic()
            engine = OpenAI(
                OpenAIEngine(type="openai", url=url, model="m", concurrency=arguments.at_once), prompts, seed=1
            )
            shard = Shard([(digest(text), text) for text in texts], Augment(), "x", "-")
            run = query_live(engine, shard, folder, "x")
            table, recording = shard.table(), shard.recording()
            seconds = time.monotonic() - begin
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{which}: {len(texts)} queries in {seconds:.1f} s, {len(texts) / seconds:.0f} a second; peak memory "
                f"{peak:.0f} MiB; {dict(shard.ends)}, {len(table)} texts, {recording.count(chr(10))} recorded, {run}"
            )
    process.kill()
