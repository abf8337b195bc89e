import copy

import pytest
import yaml
from conftest import ROOT

from cachelora.config import json_schema, parse
from cachelora.errors import ConfigError
from cachelora.reference import config_reference, contracts_reference


@pytest.fixture
def config():
    return yaml.safe_load((ROOT / "config/domains.yaml").read_text(encoding="utf-8"))


def change(config, path, value):
    config = copy.deepcopy(config)
    *parents, last = path.split("/")
    place = config
    for part in parents:
        place = place.setdefault(part, {})
    place[last] = value
    return config


DOMAIN = {"queries": "q.jsonl", "recording": "r.jsonl"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train/learnin_rate", 1, r"^train\.learnin_rate: unknown key 'learnin_rate'\. Use one of full, rank, "),
        ("trian", {}, r"^trian: unknown key 'trian'\. Use one of pathvars, seed"),
        ("domains/law/querys", "x", r"^domains\.law\.querys: unknown key 'querys'\. Use one of queries, recording"),
        ("domains/a", {}, r"^domains\.a\.queries: missing\. Set it"),
        ("domains/../evil", DOMAIN, None),
        ("domains/a.b", DOMAIN, r"^domains\.a\.b: 'a\.b' is no name"),
        ("domains/..", DOMAIN, r"'\.\.' is no name: |'\.\.' is no name"),
        ("domains/joint", DOMAIN, r"^domains\.joint: 'joint' is reserved"),
        ("domains/base", DOMAIN, r"'base' is reserved"),
        ("domains/Upper", DOMAIN, r"'Upper' is no name"),
        ("domains/law/engine", "gpt", r"^domains\.law\.engine: unknown engine 'gpt'\. Use one of recorded"),
        ("augment/engine", "gpt", r"^augment\.engine: unknown engine 'gpt'"),
        ("engines/x", {"type": "magic"}, r"^engines\.x\.type: unknown engine 'magic'\. Use 'recorded', 'llamacpp'"),
        ("engines/x", {"model": "m"}, r"^engines\.x\.type: missing"),
        ("engines/x", {"type": "llamacpp"}, r"^engines\.x\.model: missing"),
        ("engines/x", {"type": "llamacpp", "model": "m", "tempo": 1}, r"^engines\.x\.tempo: unknown key 'tempo'"),
        ("domains/law/recording", None, r"^domains\.law\.recording: missing, and engine 'recorded' replays"),
        ("merges/law", {"method": "svd", "weight": 1}, r"^merges\.law: there is a domain or model of this name"),
        ("merges/m", {"method": "sum"}, r'^merges\.m\.method: "sum" is not allowed'),
        ("merges/m", {"method": "linear", "rank": 4}, r"^merges\.m: `linear` keeps the adapters' rank\. Remove"),
        ("merges/m", {"method": "svd", "models": ["tax"]}, r"^merges\.m\.models: unknown adapter 'tax'\. Use some of "),
        ("merges/m", {"method": "svd", "models": ["law", "law"]}, r"^merges\.m\.models: an adapter stands twice in it"),
        ("merges/m", {"method": "svd", "weights": {"joint": 1}}, r"^merges\.m\.weights: unknown adapter 'joint'"),
        ("merges/m", {"method": "ties", "density": [0.5, 0]}, r"^merges\.m\.density\.1: 0 is not allowed\. .* greater"),
        ("merges/m", {"method": "ties", "density": 0}, r"^merges\.m\.density\.0: 0 is not allowed\. Input"),
        ("merges/m", {"method": "svd", "weight": []}, r"^merges\.m\.weight: \[\] is not allowed"),
        ("merges/m", {"method": "svd", "weight": [0.5, True]}, r"^merges\.m\.weight\.1: true is no number\. Give it"),
        ("merges/m", {"method": "svd", "weight": float("inf")}, r"^merges\.m\.weight\.0: Infinity is not allowed"),
        ("merges/m", {"method": "svd", "weights": {"law": False}}, r"^merges\.m\.weights\.law: false is no number"),
        ("merges/m", {"method": "svd", "weight": 1e30}, r"^merges\.m\.weight\.0: 1e\+30 is not allowed"),
        ("merges/m", {"method": "svd", "rank": 10**11}, r"^merges\.m\.rank: 10+ is not allowed"),
        ("merges/m", {"method": "svd", "models": ["merge-svd"]}, r"^merges\.m\.models: 'merge-svd' is a merge itself"),
        ("models/m", {"replay": 0.5}, r"^models\.m: there is nothing to replay\. Set `start` too"),
        ("models/m", {"domains": ["law", "law"]}, r"^models\.m\.domains: a domain stands twice"),
        ("domains", {"a": DOMAIN | {"adapter": False}}, r"^domains: none of them gets an adapter"),
        ("domains/law/adapter", "maybe", r'^domains\.law\.adapter: "maybe" is not allowed'),
        ("models/law", {}, r"^models\.law: there is a domain or model of this name"),
        ("models/joint", {}, r"^models\.joint: 'joint' is reserved"),
        ("adapters/law", {"source": "x"}, r"^adapters\.law: there is a domain or model of this name"),
        ("adapters/a", {"source": "hub:o/n@main"}, r"^adapters\.a\.source: 'hub:o/n@main' names no commit"),
        ("adapters/a", {"source": "x", "base": "b"}, r"^adapters\.a\.base: unknown base model 'b'\. Use one of minilm"),
        ("sets/law", {"source": "x.jsonl"}, r"^sets\.law: there is a domain of this name"),
        ("sets/s", {"source": "https://h/x.jsonl"}, r"^sets\.s: an address needs `sha256`\. Give"),
        ("sets/s", {"source": "http://h/x.jsonl", "sha256": "0" * 64}, r"^sets\.s: it is no https address of a file"),
        ("sets/s", {"source": "https://h/", "sha256": "0" * 64}, r"^sets\.s: it is no https address of a file"),
        ("sets/s", {"source": "file:///x.jsonl"}, r"^sets\.s: it is no https address of a file"),
        ("sets/s", {"source": "https://u:p@h/x.jsonl", "sha256": "0" * 64}, r"^sets\.s: it holds more than an address"),
        ("sets/s", {"source": "https://h/x.jsonl#key", "sha256": "0" * 64}, r"^sets\.s: it holds more than an address"),
        ("sets/s", {"source": "https://h/ü.jsonl", "sha256": "0" * 64}, r"^sets\.s: it holds letters that an address"),
        ("thresholds/budgets", [0.05, 0.01, 0.05], r"^thresholds\.budgets: a budget stands in it twice"),
        ("sets/s", {"source": "x.jsonl", "sha256": "12"}, r"^sets\.s\.sha256: \"12\" is not allowed"),
        ("sets/Upper", {"source": "x.jsonl"}, r"'Upper' is no name"),
        ("models/sweep-1", {}, r"^models\.sweep-1: 'sweep-' begins the names of trials"),
        ("models/m", {"domains": ["tax"]}, r"^models\.m\.domains: unknown domain 'tax'\. Use some of medical"),
        ("models/m", {"start": "n"}, r"^models\.m\.start: no model 'n' above it\. Use one of medical"),
        ("models/m", {"start": "m"}, r"^models\.m\.start: no model 'm' above it"),
        ("models/m", {"start": "joint", "train": {"rank": 8}}, r"^models\.m\.train\.rank: 8, and joint has 7\. Make"),
        (
            "models/m",
            {"start": "joint", "train": {"full": True}},
            r"^models\.m\.start: a full fine-tune has no adapter",
        ),
        ("models/m", {"start": "joint", "replay": 2}, r"^models\.m\.replay: 2 is not allowed"),
        ("hybrids/m", {"otherwise": "n"}, r"^hybrids\.m\.otherwise: unknown model 'n'\. Use one of base, medical"),
        ("hybrids/m", {"models": {"law": "n"}}, r"^hybrids\.m\.models\.law: unknown model 'n'"),
        ("hybrids/m", {"models": {"tax": "law"}}, r"^hybrids\.m\.models: unknown domain 'tax'"),
        ("hybrids/m", {"detector": "magic"}, r'^hybrids\.m\.detector: "magic" is not allowed'),
        ("hybrids/merge-svd", {}, r"^hybrids\.merge-svd: there is a domain or model of this name"),
        ("domains", {"a": DOMAIN | {"added": True}}, r"^domains: all of them are added, to nothing"),
        ("models/m", {"train": {"rnk": 1}}, r"^models\.m\.train\.rnk: unknown key 'rnk'\. Use one of full, rank"),
        ("models/m", {"train": {"rank": 0}}, r"^models\.m\.train\.rank: 0 is not allowed"),
        ("sweep", {"grid": {"rnk": [1]}}, r"^sweep\.rnk: unknown key 'rnk'\. Use one of full, rank"),
        ("sweep", {"grid": {"rank": []}}, r"^sweep\.grid\.rank: \[\] is not allowed"),
        (
            "sweep",
            {"grid": {"rank": [1]}, "gird": {}},
            r"^sweep\.gird: unknown key 'gird'\. Use one of grid, trials, ",
        ),
        ("sweep", {"trials": [{"rank": 0}]}, r"^sweep\.rank: 0 is not allowed"),
        ("sweep", {"seeds": [1]}, r"^sweep: there is nothing to try\. Give"),
        ("sweep", {"trials": [{}], "seeds": [1, 1]}, r"^sweep: a seed stands twice in `seeds`\. Remove one"),
        ("sweep", {"trials": [{}], "seeds": [-1]}, r"^sweep\.seeds\.0: -1 is not allowed"),
        ("sweep", {"trials": [{"most_lost_similarity": 1}]}, r"^sweep: most_lost_similarity is what trials are chosen"),
        ("train/losses", {"triplet": 1}, r"^train\.losses\.triplet"),
        ("train/processes", 3, r"^train: batch_size 8 cannot be shared by 3 processes"),
        ("train/full", True, r"^merges\.merge-svd: medical is trained in full"),
        ("deploy/model", "x", r"^deploy\.model: 'x' is unknown\. Use one of medical"),
        ("train/rank", "many", r'^train\.rank: "many" is not allowed'),
        ("train/rank", 0, r"^train\.rank: 0 is not allowed"),
        ("train/rank", 10**30, r"^train\.rank: 10+ is not allowed"),
        ("train/rank", True, r"^train: `rank` is true\. Give it a value, not whether"),
        ("models/m", {"seed": False}, r"^models\.m: `seed` is false\. Give it a value"),
        ("models/m", {"train": {"negatives": 0, "losses": {"bce": 1}}}, r"^models\.m\.train: the loss bce needs hard"),
        ("models/" + "a" * 65, {}, r"is no name: |'a+' is no name"),
        ("models/a\n", {}, r"'a\\n' is no name"),
        ("sweep", {"trials": [{"validation_groups": 1}]}, r"^sweep: validation_groups is what trials are chosen by"),
        ("sweep", {"trials": [{"full": True}]}, r"^sweep: a full fine-tune gives no adapter to choose"),
        ("sweep", {"grid": {"rank": [4, "4"]}}, r"^sweep: sweep-001 and sweep-002 are the same training\. Leave one"),
        ("sweep", {"trials": [{}, {"learning_rate": 0.001}]}, r"^sweep: sweep-001 and sweep-002 are the same training"),
        ("train/learning_rate", float("nan"), r"^train\.learning_rate"),
        ("queries/max_reject_share", 2, r"^queries\.max_reject_share: 2 is not allowed"),
        ("base_models/minilm-l6/sha256", "abc", r"^base_models\.minilm-l6\.sha256: \"abc\" is not allowed"),
        ("train", None, r"^train: it is empty\. Remove the line"),
        ("seed", 2**32, r"^seed: 4294967296 is not allowed"),
        ("pathvars/results", "", r"^pathvars\.results"),
        ("queries/validation_share", 0.9, r"^queries: validation_share and test_share leave nothing"),
        ("domains", {}, r"^domains: \{\} is not allowed"),
        ("base_models/minilm-l6/source", "hub:a/b@main", r"'hub:a/b@main' names no commit: |names no commit"),
    ],
)
def test_mistakes_are_named_by_key(config, path, value, message):
    if path == "domains/../evil":
        broken = copy.deepcopy(config)
        broken["domains"]["../evil"] = DOMAIN
        message = r"'\.\./evil' is no name"
    else:
        broken = change(config, path, value)
    with pytest.raises(ConfigError, match=message) as caught:
        parse(broken)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("recipe", "method", "message"),
    [
        (
            {"rank": 8},
            "linear",
            r"^merges\.m: `linear` needs adapters of the same rank, and law has 7, other 8\.",
        ),
        ({"target_modules": ["query"]}, "svd", r"^merges\.m: `svd` needs adapters of the same target_modules, and law"),
        ({"full": True}, "svd", r"^merges\.m: other is trained in full, and has no adapter\. Merge others"),
        ({"rank": 8}, "svd", None),
        ({"target_modules": ["dense", "value", "key", "query"]}, "linear", None),
    ],
)
def test_adapters_that_cannot_be_merged_are_known_before_they_are_trained(config, recipe, method, message):
    config["models"] = {"other": {"domains": ["law"], "train": recipe}}
    config["merges"] = {"m": {"method": method, "models": ["law", "other"]}}
    if message is None:
        assert parse(config).merged_models == {"m": ["law", "other"]}
        return
    with pytest.raises(ConfigError, match=message):
        parse(config)


def test_a_hybrid_is_not_deployed(config):
    config["hybrids"] = {"h": {}}
    with pytest.raises(ConfigError, match=r"^deploy\.model: 'h' is a hybrid, and not one model\. Use one of medical"):
        parse(change(config, "deploy/model", "h"))


def test_a_deployed_model_needs_an_adapter(config):
    config["train"] = {"full": True}
    config["merges"] = {}
    with pytest.raises(ConfigError, match=r"^deploy\.model: every model is trained in full\. Set train\.full only in"):
        parse(config)


def test_an_overlay_removes_entries_by_null(config):
    settings = parse(change(config, "domains/law", None))
    assert list(settings.domains) == ["medical", "programming", "psychology", "general"]


@pytest.mark.parametrize(
    ("pathvars", "folder"),
    [
        ({}, "results/state"),
        ({"results": "results/tiny"}, "results/tiny/state"),
        ({"state": "/mnt/state"}, "/mnt/state"),
        ({"scratch": "/scratch/<group>", "group": "law", "state": "<scratch>/x"}, "/scratch/law/x"),
    ],
)
def test_where_the_state_is_kept(config, pathvars, folder):
    assert parse(config | {"pathvars": pathvars}).state_folder == folder


@pytest.mark.parametrize("state", ["<scratch>/x", "<state>/x"])
def test_a_state_that_names_nothing_or_itself_is_refused(config, state):
    with pytest.raises(ConfigError, match=r"^pathvars\.state: .* names what is not declared, or itself"):
        assert parse(config | {"pathvars": {"state": state}}).state_folder


def test_what_is_added_is_trained_on_only_where_it_is_named(config):
    config["domains"]["tax"] = DOMAIN | {"added": True}
    config["domains"]["banking"] = DOMAIN | {"added": True}
    config["models"] = {
        "on": {"start": "joint", "domains": ["tax"], "replay": 0.5},
        "further": {"start": "on", "domains": ["banking"]},
        "alone": {"start": "on", "domains": ["banking"], "replay": 0},
        "all": {},
    }
    config["merges"]["two"] = {"method": "svd", "models": ["joint", "tax"], "weights": {"tax": 0.3}}
    config["hybrids"] = {"h": {"models": {"law": "joint"}, "otherwise": "base"}}
    settings = parse(config)
    pool = ["medical", "law", "programming", "psychology", "general"]
    models = settings.trained_models
    assert models["joint"].domains == models["all"].domains == settings.pool == pool
    assert (models["tax"].domains, models["tax"].start) == (["tax"], None)
    assert models["on"].replayed == dict.fromkeys(pool, 0.5)
    assert models["further"].replayed == dict.fromkeys(["tax", *pool], 0.25)
    assert models["alone"].all_domains == ["banking"]
    # Also what was not replayed in between.
    chain = change(config, "models/forgetful", {"start": "joint", "domains": ["tax"], "replay": 0})
    chain = change(chain, "models/again", {"start": "forgetful", "domains": ["banking"]})
    assert parse(chain).trained_models["forgetful"].all_domains == ["tax"]
    assert parse(chain).trained_models["again"].replayed == dict.fromkeys(["tax", *pool], 0.25)
    assert settings.before("law") == settings.before("tax") == pool
    assert settings.before("banking") == [*pool, "tax"]
    assert settings.merged_models["two"] == ["joint", "tax"]
    assert settings.merged_models["merge-svd"] == ["medical", "law", "programming", "psychology", "tax", "banking"]
    assert settings.hybrid_models["h"]["law"] == "joint" and settings.hybrid_models["h"]["tax"] == "tax"


def test_models_and_trials_fill_in_what_they_leave_out(config):
    config = change(config, "models/again", {"seed": 14, "domains": ["law"], "train": {"losses": {"bce": 1}}})
    config["sweep"] = {"grid": {"rank": [2, 4], "learning_rate": [1e-3]}, "seeds": [1, 2]}
    settings = parse(config)
    models = settings.trained_models
    assert list(models) == ["medical", "law", "programming", "psychology", "joint", "again"]
    assert models["law"].domains == ["law"] and models["joint"].domains == list(settings.domains)
    assert (models["again"].seed, models["again"].domains, models["again"].train.losses) == (14, ["law"], {"bce": 1})
    assert models["again"].train.rank == settings.train.rank
    assert settings.repeats == {}
    config["models"] |= {"law-14": {"seed": 14, "domains": ["law"]}, "law-15": {"seed": 15, "domains": ["law"]}}
    # One seed twice, as joint and the model of an only domain are.
    config["models"]["same"] = {"domains": ["law"]}
    assert parse(config).repeats == {"law": ["law", "law-14", "law-15"]}
    # And what is made of models that differ in their seeds; not with other weights or parts.
    config["merges"] = {
        "merge": {"method": "svd", "models": ["law", "joint"], "weights": {"law": 1.0}},
        "merge-14": {"method": "svd", "models": ["law-14", "joint"], "weights": {"law-14": 1.0}},
        "other": {"method": "svd", "models": ["law-15", "joint"], "weights": {"law-15": 0.9}},
        "another": {"method": "svd", "models": ["law-15", "medical"], "weights": {"law-15": 1.0}},
    }
    config["hybrids"] = {
        "hybrid": {},
        "hybrid-14": {"models": {"law": "merge-14"}},
        "mixed": {"models": {"law": "merge"}},
        "hybrid-15": {"models": {"law": "law-15"}},
    }
    assert {first: names for first, names in parse(config).repeats.items() if first != "law"} == {
        "merge": ["merge", "merge-14"], "hybrid-14": ["hybrid-14", "mixed"], "hybrid": ["hybrid", "hybrid-15"],
    }  # fmt: skip
    trials = settings.trials
    assert [(name, trial.seed, trial.train.rank) for name, trial in trials.items()] == [
        ("sweep-001", 1, 2), ("sweep-002", 2, 2), ("sweep-003", 1, 4), ("sweep-004", 2, 4),
    ]  # fmt: skip
    assert settings.trial_changes["sweep-003"] == {"rank": 4, "learning_rate": 1e-3}
    config["sweep"] = {"grid": {"rank": ["2"]}}
    assert parse(config).trial_changes == {"sweep-001": {"rank": 2}}
    config["sweep"] = {"trials": [{}, {"negatives": 0}]}
    trials = parse(config).trials
    assert [(trial.seed, trial.train.negatives) for trial in trials.values()] == [
        (settings.seed, settings.train.negatives), (settings.seed, 0),
    ]  # fmt: skip


def test_an_overlay_removes_a_loss_by_null(config):
    settings = parse(change(config, "train/losses", {"ranking": None, "bce": 1.0}))
    assert settings.train.losses == {"bce": 1.0}
    with pytest.raises(ConfigError, match=r"^train\.losses: \{\} is not allowed"):
        parse(change(config, "train/losses", {"ranking": None}))


def test_adapters_trained_elsewhere_have_a_base_model_and_null_removes_them_and_sets(config):
    config = change(config, "sets", {"s": {"source": "s.jsonl"}, "t": None})
    config = change(config, "adapters", {"a": {"source": "x"}, "c": None})
    parsed = parse(config)
    assert parsed.adapter_bases == {"a": "minilm-l6"}
    assert set(parsed.sets) == {"s"}
    config = change(config, "base_models/large", {"source": "somewhere", "name": "large"})
    with pytest.raises(
        ConfigError, match=r"adapters\.a\.base: missing, and there are several base models\. Use one of"
    ):
        parse(config)
    assert parse(change(config, "adapters/a/base", "large")).adapter_bases == {"a": "large"}


def test_every_default_is_allowed(config):
    minimal = {key: config[key] for key in ("base_models", "domains", "engines")}
    assert parse(minimal).train == parse(config).train


@pytest.mark.parametrize(
    ("path", "page"),
    [
        ("workflow/schemas/config.schema.json", json_schema),
        ("config/README.md", config_reference),
        ("docs/contracts.md", contracts_reference),
    ],
)
def test_pages_written_from_the_code_are_up_to_date(path, page):
    name = {"workflow/schemas/config.schema.json": "schema", "config/README.md": "config"}.get(path, "contracts")
    written = (ROOT / path).read_text(encoding="utf-8")
    assert written == page(), f"run: cachelora reference {name} > {path}"


def test_shipped_configs_fit_the_published_schema(config):
    import json

    import jsonschema
    from snakemake.utils import update_config

    schema = json.loads(json_schema())
    for preset in [None, *(ROOT / "config/presets").glob("*.yaml")]:
        merged = copy.deepcopy(config)
        if preset:
            update_config(merged, yaml.safe_load(preset.read_text(encoding="utf-8")))
        merged["domains"] = {name: value for name, value in merged["domains"].items() if value is not None}
        jsonschema.Draft202012Validator(schema).validate(merged)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            {"type": "openai", "url": "http://x/v1", "model": "m", "price": {"completion": 1}},
            r"engines\.mine\.price\.completion: unknown key 'completion'\. Use one of prompt, reply, hour, currency",
        ),
        (
            {"type": "llamacpp", "model": "m.gguf", "url": "http://x/v1"},
            r"engines\.mine\.url: unknown key 'url'\. Use one of (?!.*url, )(?!.*concurrency).*slots",
        ),
        ({"type": "none"}, r"engines\.mine\.type: unknown engine 'none'"),
        ({"type": "ollama"}, r"engines\.mine\.model: missing"),
    ],
)
def test_what_is_wrong_with_an_engine_is_said_by_its_type(default_config, engine, message):
    values = default_config.model_dump(mode="json", exclude_unset=True)
    values["engines"]["mine"] = engine
    with pytest.raises(ConfigError, match=message):
        parse(values)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({}, "judge: a judge is either an engine or a cross-encoder"),
        ({"engine": "recorded", "cross_encoder": "x"}, "judge: a judge is either an engine or a cross-encoder"),
        ({"engine": "none"}, r"judge\.engine: unknown engine 'none'"),
        ({"engine": "recorded"}, r"domains\.medical\.verdicts: missing"),
        ({"engine": "recorded", "threshold": 0.9}, "judge: `threshold` is for a cross-encoder"),
        ({"cross_encoder": "package:x"}, "judge: a cross-encoder is a folder or hub"),
        ({"cross_encoder": "hub:a/b"}, r"judge\.cross_encoder: 'hub:a/b' names no commit"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(config, judge, message):
    config["judge"] = judge
    with pytest.raises(ConfigError, match=message):
        parse(config)


def test_a_job_understands_the_judge_that_the_config_describes(config):
    config["engines"]["llm"] = {"type": "llamacpp", "model": "x.gguf"}
    config["judge"] = {"engine": "llm"}
    judge = parse(config).judge
    assert type(judge)(**judge.model_dump(mode="json")) == judge


def test_filters_can_be_off(config):
    config["filter"] = {"filters": {"far": None, "statement": False, "easy": 0.4}}
    thresholds = parse(config).filter.filters.thresholds
    assert "far" not in thresholds and "statement" not in thresholds and thresholds["easy"] == 0.4
    config["filter"] = {"base_model": "other"}
    with pytest.raises(ConfigError, match=r"filter\.base_model: unknown base model 'other'"):
        parse(config)
