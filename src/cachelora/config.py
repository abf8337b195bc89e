"""The configuration: one model that gives the defaults, the checks, the JSON schema and the documentation."""

import itertools
import json
import re
from collections.abc import Hashable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from cachelora.errors import ConfigError
from cachelora.schemas import LookAlikeKind

RESERVED_NAMES = ("base", "joint")
"""Model ids that the workflow gives itself; no domain and no merge may take them."""

BATCH_TOKENS = 1536
"""Tokens encoded at once: the quickest of 400 to 2,048 on two cores (benchmarks/evaluate_speed.py, docs/metrics.md)."""

_TRIAL = "sweep-"


def _check_name(name: str) -> str:
    """Refuse what would not be one plain folder name, or would clash with another model."""
    if not re.fullmatch(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*", name) or len(name) > 64:
        raise ValueError(
            f"{name!r} is no name: use lower-case letters and digits, joined by single '-' or '_', a letter first, "
            "64 at most"
        )
    return name


def _check_free_name(name: str) -> str:
    """Refuse the reserved names too."""
    if name in RESERVED_NAMES:
        raise ValueError(f"'{name}' is reserved: choose another name")
    return _check_name(name)


def _check_source(source: str) -> str:
    """Refuse a hub model without a commit: what a branch or tag names may change."""
    if source.startswith("hub:") and not re.fullmatch(r"hub:[^@]+@[0-9a-f]{40}", source):
        raise ValueError(f"'{source}' names no commit: write hub:OWNER/NAME@COMMIT, with the commit's 40 digits")
    return source


def _check_url(url: str) -> str:
    """Refuse what is no address, and an address with a password in it, which would reach logs and reports."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it is no address: write for example http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment or ";" in url:
        raise ValueError("it holds more than an address: give a key by an environment variable, see `key_variable`")
    return url


Name = Annotated[str, AfterValidator(_check_name)]
FreeName = Annotated[str, AfterValidator(_check_free_name)]
Share = Annotated[float, Field(ge=0, le=1)]


def _check_number(value: Any) -> Any:
    """Refuse true and false; pydantic takes them for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number: give it a value, not whether")
    return value


def _listed_value(value: Any) -> Any:
    """Make a list of a single value."""
    return value if isinstance(value, list) else [value]


# Far beyond any use, and far from what a square would make infinite.
Weight = Annotated[float, Field(ge=-1e6, le=1e6), BeforeValidator(_check_number)]
Density = Annotated[float, Field(gt=0, le=1), BeforeValidator(_check_number)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Section(BaseModel):
    """A part of the configuration; a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_truth(cls, values: Any) -> Any:
        """Refuse true and false where a number is wanted; pydantic takes them for 1 and 0."""
        for name, field in cls.model_fields.items():
            wanted = (field.annotation, *get_args(field.annotation))
            if isinstance(values, dict) and isinstance(values.get(name), bool) and bool not in wanted:
                raise ValueError(f"`{name}` is {str(values[name]).lower()}: give it a value, not whether")
        return values


class BaseModelSource(_Section):
    """A sentence-embedding model that adapters are trained on."""

    source: Annotated[str, AfterValidator(_check_source)] = Field(
        description="`package:NAME` (weights inside an installed Python package), `hub:OWNER/NAME@COMMIT` (a model "
        "hub), or a local folder."
    )
    name: str = Field(description="What adapters and model cards call it, for example its id on a model hub.")
    sha256: Sha256 | None = Field(None, description="SHA-256 of its model.safetensors; checked whenever it is loaded.")


class ForeignAdapter(_Section):
    """An adapter that was trained elsewhere, as a row of the table."""

    source: Annotated[str, AfterValidator(_check_source)] = Field(
        description="`hub:OWNER/NAME@COMMIT` (a model hub) or a local folder, with adapter_model.safetensors and "
        "adapter_config.json as peft writes them. Without a manifest of cachelora, nothing vouches for them."
    )
    base: str | None = Field(None, description="The base model that it was trained on; default: the only one.")


class LabelledSet(_Section):
    """A test set of anybody's making, measured beside those of the domains. No training looks out for its texts."""

    source: str = Field(
        min_length=1,
        description="A local file or an https address, .jsonl, .csv or .parquet: pairs (`a`, `b`, `label`: 1 if one "
        "answer serves both, else 0) or triplets (`anchor`, `positive`, `negative`, and `kind` where it is known).",
    )
    sha256: Sha256 | None = Field(None, description="SHA-256 of the file; required for an address.")
    description: str | None = Field(None, description="What it is and where it comes from, in a line.")

    @model_validator(mode="after")
    def _check_source(self) -> "LabelledSet":
        """Refuse an address whose content may change under the way, and one that is not https."""
        if "://" not in self.source:
            return self
        parts = urlsplit(self.source)
        if parts.scheme != "https" or not parts.hostname or not PurePosixPath(parts.path).suffix:
            raise ValueError("it is no https address of a file: write for example https://HOST/FOLDER/pairs.jsonl")
        if parts.username or parts.password or parts.query or parts.fragment or ";" in self.source:
            raise ValueError("it holds more than an address: leave user, password, query and fragment out")
        if not self.source.isascii():
            raise ValueError("it holds letters that an address cannot: write them with %, as a browser copies it")
        if self.sha256 is None:
            raise ValueError("an address needs `sha256`: give the SHA-256 of the file")
        return self


class ExampleNegative(_Section):
    """A hard negative of an example."""

    kind: LookAlikeKind = Field(description="How it differs: see docs/corpora.md.")
    text: str = Field(min_length=1, description="The query.")


class Example(_Section):
    """A query of the domain with what an LLM should write for it."""

    query: str = Field(min_length=1, description="The query.")
    paraphrases: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, description="Its paraphrases.")
    negatives: list[ExampleNegative] = Field(min_length=1, description="Its hard negatives.")


class DomainPrompt(_Section):
    """The words that make the prompts those of a domain."""

    role: str | None = Field(None, description="Who the LLM is to be; default: an expert of the field.")
    subfields: list[str] = Field([], description="Parts of the field.")
    aspects: list[str] = Field([], description="What people ask about a subject of the field.")
    examples: list[Example] = Field([], description="Examples that go before the query: two do most.")


class Domain(_Section):
    """A domain: its queries, where its augmentation comes from, and its test set."""

    queries: str = Field(description="File of unlabelled queries: .jsonl or .csv or .parquet (key `query`), or .txt.")
    recording: str | None = Field(None, description="Recorded LLM replies, for the engine type `recorded` (.jsonl).")
    verdicts: str | None = Field(None, description="Recorded verdicts, for a judge of type `recorded` (.jsonl).")
    test: str | None = Field(
        None, description="Held-out triplets (.jsonl). Without it, a share of the groups is held out and tested on."
    )
    engine: str | None = Field(None, description="The engine for this domain; default: `augment.engine`.")
    field: str | None = Field(
        None, description="What prompts call the domain, for example 'tenancy law'; default: its name."
    )
    prompt: DomainPrompt = Field(DomainPrompt(), description="Words for its prompts.")
    adapter: bool = Field(
        True,
        description="Whether it gets an adapter of its own and takes part in merges. With false its triplets go into "
        "`joint` only, as those of queries of no domain that keep a model from forgetting.",
    )
    added: bool = Field(
        False,
        description="Whether it comes to models that are finished: neither `joint` nor any other domain is trained "
        "again. Test triplets of which their training texts hold a text are dropped from its test set instead.",
    )


class Queries(_Section):
    """How queries are read and split."""

    max_queries: int | None = Field(None, ge=3, description="Use at most so many groups of a domain, drawn by hash.")
    max_chars: int = Field(1000, ge=1, description="Longer queries are set aside.")
    max_reject_share: Share = Field(0.05, description="Stop when a larger share of a file's records is bad.")
    validation_share: float = Field(0.15, gt=0, lt=1, description="Share of the groups held out for choosing settings.")
    train_share: float = Field(
        1.0, gt=0, le=1, description="Train on this share of the other groups, drawn by hash: for learning curves."
    )
    test_share: float = Field(
        0.15, gt=0, lt=1, description="Share of the groups held out for the test, for a domain without a test file."
    )

    @model_validator(mode="after")
    def _check_shares(self) -> "Queries":
        """Refuse shares that leave nothing to train on."""
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share leave nothing to train on: lower one of the two")
        return self


class RecordedEngine(_Section):
    """Replays the recording that each domain names."""

    type: Literal["recorded"]


class Price(_Section):
    """What an LLM costs, for the estimate."""

    prompt: float = Field(0.0, ge=0, description="A million tokens of prompt.")
    reply: float = Field(0.0, ge=0, description="A million tokens of reply.")
    hour: float = Field(0.0, ge=0, description="An hour of the machine, for an LLM of one's own.")
    currency: str = Field("USD", pattern="^[A-Z]{3}$", description="In which currency.")


class LiveEngine(_Section):
    """What all LLM engines have in common."""

    max_tokens: int = Field(512, ge=16, le=2**20, description="Longest reply, in tokens; a longer one is cut.")
    temperature: float = Field(0.7, ge=0, description="Sampling temperature of the LLM.")
    price: Price = Field(Price(), description="What it costs, for `cachelora estimate`.")

    @property
    def at_once(self) -> int | None:
        """Queries in flight at once; None where the engine takes them all."""
        return None


class LlamaCppEngine(LiveEngine):
    """llama.cpp in this process, on any GGUF file."""

    type: Literal["llamacpp"]
    model: str = Field(description="A GGUF file, or `package:NAME` for the one inside an installed Python package.")
    sha256: Sha256 | None = Field(None, description="SHA-256 of the GGUF file; checked when it is loaded.")
    context_tokens: int = Field(2048, ge=256, le=2**22, description="Context window of one slot, in tokens.")
    slots: int = Field(2, ge=1, le=4096, description="Queries in flight at once.")
    gpu_layers: int = Field(-1, ge=-1, le=10_000, description="Layers on the GPU; -1 for all that fit, 0 for none.")

    @property
    def at_once(self) -> int:
        """Queries in flight at once."""
        return self.slots


class VLLMEngine(LiveEngine):
    """vLLM in this process: all queries of a shard at once, on the GPUs of the job."""

    type: Literal["vllm"]
    model: Annotated[str, AfterValidator(_check_source)] = Field(
        description="A folder in the form of the model hub, with safetensors; or `hub:OWNER/NAME@COMMIT`."
    )
    context_tokens: int = Field(2048, ge=256, le=2**22, description="Context window, in tokens.")
    gpus: int = Field(1, ge=1, le=64, description="GPUs of each shard's job, over which the model is divided.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="Type of the weights.")
    gpu_memory_share: float = Field(0.9, gt=0, le=1, description="Share of the GPU's memory that vLLM takes.")
    chat_template: dict[str, Any] = Field(
        {}, description="Arguments of the model's chat template, such as `enable_thinking: false`."
    )
    eager: bool = Field(False, description="Whether it starts without compiling: sooner ready, slower after that.")


class ServerEngine(LiveEngine):
    """What all servers have in common."""

    model: str = Field(min_length=1, description="The model, as the server calls it.")
    concurrency: int = Field(16, ge=1, le=4096, description="Queries in flight at once.")
    timeout: float = Field(120.0, gt=0, description="Seconds that a reply may take.")
    attempts: int = Field(
        6, ge=1, le=100, description="How often a request is sent that meets a lost connection, 429, 5xx or no reply."
    )

    @property
    def at_once(self) -> int:
        """Queries in flight at once."""
        return self.concurrency


class OpenAIEngine(ServerEngine):
    """A server with an OpenAI-compatible address: vLLM's, llama.cpp's, a hosted one."""

    type: Literal["openai"]
    url: Annotated[str, AfterValidator(_check_url)] = Field(
        description="Its address, for example http://localhost:8000/v1."
    )
    key_variable: str = Field(
        "OPENAI_API_KEY",
        pattern="^[A-Z][A-Z0-9_]*$",
        description="Name of the environment variable that holds the API key, where the server wants one.",
    )
    request: dict[str, Any] = Field(
        {},
        description="Further keys of each request, such as `chat_template_kwargs: {enable_thinking: false}`; one that "
        "is null is left out, as `max_tokens: null` where a server wants `max_completion_tokens`.",
    )

    @field_validator("request")
    @classmethod
    def _check_request(cls, request: dict[str, Any]) -> dict[str, Any]:
        """Refuse keys that are set elsewhere."""
        ours = ("messages", "model", "response_format", "stream", "n")
        # The client's own ways to send more, keys among it, which would stand in reports.
        of_client = ("api_key", "extra_headers", "extra_query", "extra_body")
        for key in (*ours, *of_client):
            if key in request:
                raise ValueError(f"`{key}` is not for you to set here: remove it")
        try:
            # As JSON has it, with texts as keys, so that the journal's key is the same wherever it is taken.
            return json.loads(json.dumps(request, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError("it holds what JSON cannot: use texts, numbers, true, false, null") from None


class OllamaEngine(ServerEngine):
    """An Ollama server, by its own protocol."""

    type: Literal["ollama"]
    url: Annotated[str, AfterValidator(_check_url)] = Field("http://localhost:11434", description="Its address.")
    concurrency: int = Field(
        4, ge=1, le=4096, description="Queries in flight at once; Ollama works on OLLAMA_NUM_PARALLEL of them."
    )
    timeout: float = Field(600.0, gt=0, description="Seconds that a reply may take, loading the model included.")
    context_tokens: int = Field(2048, ge=256, le=2**22, description="Context window (`num_ctx`), in tokens.")
    keep_alive: str = Field(
        "10m", pattern=r"^-?[0-9]+(ms|s|m|h)?$", description="How long Ollama keeps the model loaded after a request."
    )
    think: bool | None = Field(None, description="Whether a model that can think does; null: as the model does it.")
    pull: bool = Field(False, description="Whether a model that Ollama does not have is pulled.")


ENGINES = (RecordedEngine, LlamaCppEngine, VLLMEngine, OpenAIEngine, OllamaEngine)
Engine = Annotated[
    RecordedEngine | LlamaCppEngine | VLLMEngine | OpenAIEngine | OllamaEngine, Field(discriminator="type")
]


def engine_type(settings: type[_Section]) -> str:
    """Return the type that the config names for a class of engine settings.

    Parameters
    ----------
    settings : type
        One of :data:`ENGINES`.

    Returns
    -------
    str
        Such as ``recorded``.
    """
    return get_args(settings.model_fields["type"].annotation)[0]


_ENGINE_BY_TYPE = {engine_type(engine): engine for engine in ENGINES}


def engine_settings(values: dict[str, Any], at_once: int) -> LiveEngine:
    """Make the settings of a live engine of what a job was given.

    Parameters
    ----------
    values : dict
        The settings without ``at_once``.
    at_once : int
        Queries in flight at once, where the engine has a limit.

    Returns
    -------
    LiveEngine
        The settings.
    """
    limit = {"slots", "concurrency"} & set(_ENGINE_BY_TYPE[values["type"]].model_fields)
    return _ENGINE_BY_TYPE[values["type"]](**values, **dict.fromkeys(limit, at_once))


class Augment(_Section):
    """What the LLM is asked for."""

    engine: str = Field("recorded", description="One of `engines`, for every domain that names none.")
    paraphrases: int = Field(3, ge=1, description="Paraphrases asked for, a query.")
    negatives: int = Field(4, ge=1, description="Hard negatives asked for, a query.")
    shards: int = Field(1, ge=1, description="Jobs that a domain's queries are divided into, by a hash of the query.")
    max_chars: int = Field(400, ge=1, description="Longer replies are refused.")
    max_failed_share: Share = Field(0.2, description="Stop a shard when a larger share of its queries fails.")


class Testset(_Section):
    """How test sets are frozen and divided."""

    lock: str | None = Field(
        None,
        description="JSON file with the version and SHA-256 of frozen test sets; one that differs from it is refused. "
        "Written by `cachelora data-check --freeze`.",
    )
    calibration_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of the groups whose pairs are for choosing thresholds; the rest is tested on.",
    )


class Filters(_Section):
    """The filters and their thresholds, chosen on the output of weak and strong LLMs (docs/filters.md); null is off."""

    trivial_edit: float | None = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of the letters, in order, from which on a text is a trivial edit of its query.",
    )
    length_ratio: float | None = Field(
        6.0, gt=1, le=1000, description="How many times longer or shorter than the query a text may be."
    )
    fragment: int | None = Field(
        3, ge=1, le=100, description="Least words of a text whose query has more than twice as many as it."
    )
    statement: bool | None = Field(
        True, description="Whether a negative that is a sentence and asks nothing is dropped."
    )
    repetition: int | None = Field(
        2, ge=1, le=100, description="So many words in a row may not stand twice in a negative."
    )
    number: Share | None = Field(
        0.3, description="A paraphrase that shares so many words with the query must have its numbers."
    )
    negation: Share | None = Field(0.8, description="One that shares so many words must negate where the query does.")
    name: Share | None = Field(0.3, description="One that shares so many words must keep names and versions.")
    far: float | None = Field(
        0.85,
        ge=0,
        le=1,
        description="Least similarity of a paraphrase that shares 60 % of the words with its query; of one that shares "
        "fewer, in proportion less.",
    )
    easy: float | None = Field(0.25, ge=-1, le=1, description="Least similarity of a negative with its query.")
    same_words: Share | None = Field(
        0.9, description="A negative that shares so many words with the query must have one that tells of a difference."
    )
    near_equal: float | None = Field(
        0.97, ge=-1, le=1, description="Similarity with the query or a paraphrase that needs a telling word too."
    )
    elsewhere: float | None = Field(
        0.98, gt=0, le=1, description="Similarity with another query of the domain from which on a negative goes."
    )
    above_positive: float | None = Field(
        0.95,
        gt=0,
        le=2,
        description="A negative this share as near as the nearest paraphrase needs a telling word.",
    )

    @property
    def thresholds(self) -> dict[str, float]:
        """The thresholds of the filters that are on."""
        return {name: float(value) for name, value in self if value is not None and value is not False}


class Filter(_Section):
    """Which texts become triplets, and what joins them."""

    filters: Filters = Filters()
    base_model: str | None = Field(
        None, description="The base model that measures similarities; default: the first of `base_models`."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Its arithmetic; `auto` is bfloat16 where the hardware has it."
    )
    rule_made: int = Field(0, ge=0, le=10, description="Most negatives that rules make of a query.")
    mined: int = Field(0, ge=0, le=100, description="Most other queries of the domain that become negatives of one.")
    mined_share: float = Field(
        0.95, gt=0, lt=1, description="A mined negative is at most this share as near as the query's paraphrase."
    )


class Judge(_Section):
    """Who is asked whether one answer serves a query and what was written for it: an LLM, or a cross-encoder."""

    engine: str | None = Field(None, description="One of `engines`; `recorded` replays each domain's `verdicts`.")
    cross_encoder: Annotated[str, AfterValidator(_check_source)] | None = Field(
        None,
        description="In its place a cross-encoder, or a model of natural language inference: a folder, or "
        "`hub:OWNER/NAME@COMMIT`.",
    )
    threshold: Share = Field(0.5, description="Least score of a pair that one answer serves, for a cross-encoder.")
    max_failed_share: Share = Field(0.2, description="Stop when the judge says nothing on a larger share of pairs.")

    @model_validator(mode="after")
    def _check_one(self) -> "Judge":
        """Refuse two judges, and none."""
        if (self.engine is None) == (self.cross_encoder is None):
            raise ValueError("a judge is either an engine or a cross-encoder: set one of the two")
        if self.cross_encoder is not None and (not self.cross_encoder or self.cross_encoder.startswith("package:")):
            raise ValueError("a cross-encoder is a folder or hub:OWNER/NAME@COMMIT: correct `cross_encoder`")
        # Not by what was set: a job is handed the defaults too.
        if self.engine is not None and self.threshold != type(self).model_fields["threshold"].default:
            raise ValueError("`threshold` is for a cross-encoder: remove it")
        return self


class Triplets(_Section):
    """How texts become triplets."""

    grouping: Literal["group", "product"] = Field(
        "group",
        description="`group`: a row for each paraphrase, with all negatives of its group. `product`: a row for each "
        "paraphrase and each negative, as seed document 003 writes them.",
    )
    near_copy: float = Field(
        0.75,
        gt=0,
        le=1,
        description="A group is dropped when a text of it is at least so similar to a test text "
        "(Jaccard of character trigrams).",
    )


LossName = Literal["ranking", "cosent", "online_contrastive", "bce", "distillation"]
_ON_HARD_NEGATIVES = ("cosent", "online_contrastive", "bce")


class Train(_Section):
    """The training recipe."""

    full: bool = Field(
        False, description="Train all weights instead of an adapter: a control, and no adapter to merge."
    )
    rank: int = Field(7, ge=1, le=4096, description="Rank of the LoRA update.")
    alpha: int = Field(28, ge=1, le=2**20, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of the LoRA matrices.")
    target_modules: list[str] = Field(
        ["query", "key", "value", "dense"], min_length=1, description="Linear layers that get an update."
    )
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    warmup_share: Share = Field(0.1, description="Share of the steps over which the learning rate rises.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Its course after that.")
    epochs: int = Field(2, ge=1, description="Passes over the groups.")
    batch_size: int = Field(8, ge=2, description="Groups a step, of all processes together.")
    size_exponent: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Of each domain are drawn as many groups an epoch as are proportional to this power of their "
        "number: 0 for the same of all, 1 for what there is. None comes more than four times.",
    )
    grouped: bool = Field(
        True,
        description="Whether the rows of a group stay together. Without, each row counts as a group, and siblings that "
        "meet in a batch are taken for negatives: a control.",
    )
    equivalents: int = Field(4, ge=2, description="Equivalent texts drawn of a group each epoch.")
    negatives: int = Field(5, ge=0, description="Hard negatives drawn of a group each epoch.")
    losses: dict[LossName, Annotated[float, Field(gt=0)]] = Field(
        {"ranking": 1.0},
        min_length=1,
        description="The losses and their weights in the sum (`cachelora.train.losses`).",
    )
    temperature: float = Field(0.07, gt=0, description="Divides the cosines in the losses.")
    hardness: float = Field(0.0, ge=0, description="Extra weight of hard negatives in `ranking`.")
    calibration: float = Field(
        0.0,
        ge=0,
        description="How much the hard negatives of all anchors of a batch weigh in `ranking` beside an "
        "anchor's own: one threshold for all.",
    )
    guided: bool = Field(
        False, description="Whether `ranking` leaves out texts of other groups that the base model finds too near."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="The gradient is clipped to this norm.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Arithmetic of the forward pass; `auto` is bfloat16 where the hardware has it."
    )
    mini_batch_size: int | None = Field(
        None,
        ge=1,
        description="Keep the activations of so many texts at once (GradCache), for a second forward pass; null: of "
        "the whole batch.",
    )
    processes: int = Field(
        1, ge=1, description="Data-parallel processes, each on a GPU of its own where there are any."
    )
    evaluations_per_epoch: int = Field(1, ge=1, description="How often the validation set is looked at.")
    validation_groups: int = Field(500, ge=1, description="Most validation groups that are looked at, of a domain.")
    most_lost_similarity: float = Field(
        0.05,
        ge=0,
        description="A checkpoint whose mean positive similarity is further below the base model's comes last.",
    )

    @model_validator(mode="after")
    def _check_batch(self) -> "Train":
        """Refuse a batch that cannot be shared evenly."""
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size {self.batch_size} cannot be shared by {self.processes} processes: change one")
        return self

    @model_validator(mode="after")
    def _check_losses(self) -> "Train":
        """Refuse losses that have nothing to work on."""
        if self.negatives == 0 and (missing := [name for name in self.losses if name in _ON_HARD_NEGATIVES]):
            raise ValueError(f"the loss {missing[0]} needs hard negatives: raise `negatives`, or choose another loss")
        return self


class Model(_Section):
    """A further trained model: a recipe, a seed, a choice of domains, a model to go on from."""

    domains: list[str] | None = Field(
        None, min_length=1, description="What it is trained on; default: all domains that were not `added`."
    )
    start: str | None = Field(
        None, description="An adapter to go on from, by the id of a model above, in place of a fresh one."
    )
    replay: Share = Field(
        0.25,
        description="With `start`: share of the groups of each domain that it was trained on, drawn anew each epoch "
        "so that it keeps what it learnt.",
    )
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="Its seed; default: the one above.")
    train: dict[str, Any] = Field({}, description="What differs from the section `train`.")

    @model_validator(mode="after")
    def _check_replay(self) -> "Model":
        """Refuse a replay of nothing."""
        if self.start is None and "replay" in self.model_fields_set:
            raise ValueError("there is nothing to replay: set `start` too, or remove `replay`")
        return self


class Sweep(_Section):
    """A search for settings: a training for each combination, compared on the validation split alone."""

    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="Keys of `train` with the values to try, in every combination."
    )
    trials: list[dict[str, Any]] = Field(
        [], description="Further changes of `train` to try; `{}` is the recipe as it is."
    )
    domains: list[str] | None = Field(
        None, min_length=1, description="What trials are trained on; default: all domains that were not `added`."
    )
    seeds: list[Annotated[int, Field(ge=0, le=2**32 - 1)]] | None = Field(
        None, min_length=1, description="Each is trained with each of these seeds; default: the one above."
    )

    @model_validator(mode="after")
    def _check_trials(self) -> "Sweep":
        """Refuse a sweep of nothing."""
        if not self.grid and not self.trials:
            raise ValueError("there is nothing to try: give `grid` or `trials`")
        if self.seeds and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice in `seeds`: remove one")
        for key in ("most_lost_similarity", "validation_groups"):
            if any(key in change for change in self.changes):
                raise ValueError(f"{key} is what trials are chosen by: set it under `train`")
        if any("full" in change for change in self.changes):
            raise ValueError("a full fine-tune gives no adapter to choose: declare it under `models`")
        return self

    @property
    def changes(self) -> list[dict[str, Any]]:
        """What is tried, each as changes of `train`."""
        grid = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return [*(grid if self.grid else []), *self.trials]


class TrainedModel(BaseModel):
    """What a model is trained on and how, everything filled in."""

    model_config = ConfigDict(frozen=True)

    domains: list[str]
    seed: int
    train: Train
    start: str | None = None
    replayed: dict[str, float] = {}

    forgotten: list[str] = []
    """Domains that the model it goes on from has seen, and it does not see again."""

    @property
    def all_domains(self) -> list[str]:
        """The domains whose triplets it sees, and on whose validation split its checkpoint is chosen."""
        return [*self.domains, *self.replayed]


class Merge(_Section):
    """A merge of adapters by weight arithmetic. Where several values are given, the best on validation is taken."""

    method: Literal["svd", "linear", "cat", "ties", "dare_ties", "magnitude_prune"] = Field(
        description="How the updates are combined (`cachelora.merge`)."
    )
    models: list[str] | None = Field(
        None, min_length=1, description="The adapters, by model id; default: those of the domains."
    )
    weight: Annotated[
        list[Weight], Field(min_length=1), BeforeValidator(_listed_value, json_schema_input_type=Weight | list[Weight])
    ] = Field([0.5], description="Weight of each adapter in the sum, the same for all; or several to choose from.")
    weights: dict[str, Weight] = Field({}, description="Weights of single adapters, by model id, in its place.")
    factors: list[Annotated[float, Field(gt=0, le=1e6), BeforeValidator(_check_number)]] = Field(
        [],
        description="Multiples of the weight that are tried for one adapter after the other, once the rest is chosen.",
    )
    density: Annotated[
        list[Density],
        Field(min_length=1),
        BeforeValidator(_listed_value, json_schema_input_type=Density | list[Density]),
    ] = Field(
        [0.5],
        description="Share of an update's values that `ties`, `dare_ties` and `magnitude_prune` keep; or several to "
        "choose from.",
    )
    rank: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Rank of the result, at most that of the smallest layer; default: the largest of the adapters, for "
        "`cat` their sum.",
    )

    @model_validator(mode="after")
    def _check_rank(self) -> "Merge":
        """Refuse a rank where none can be chosen."""
        if self.method == "linear" and self.rank is not None:
            raise ValueError("`linear` keeps the adapters' rank: remove `rank`, or use another method")
        return self


class Hybrid(_Section):
    """A detector of the domain, and the model that embeds the queries of each."""

    detector: Literal["logistic", "centroid"] = Field("logistic", description="How domains are told apart.")
    models: dict[str, str] = Field(
        {}, description="Model id by domain, for other models than each domain's own; `base` is the base model."
    )
    otherwise: str = Field("joint", description="The model for queries that no domain's model is for.")
    reject: Share = Field(0.5, description="Queries whose likeliest domain is less probable count as such.")


class Evaluate(_Section):
    """How models are compared."""

    bootstrap: int = Field(2000, ge=100, description="Bootstrap resamples behind each interval.")
    confidence: float = Field(0.95, gt=0, lt=1, description="Coverage of the intervals.")
    false_hit_budget: float = Field(
        0.05, gt=0, lt=1, description="Share of negatives that may hit where recall and hit ratio are read off."
    )
    batch_tokens: int = Field(
        BATCH_TOKENS, ge=1, description="Tokens encoded at once, padding included; a GPU wants more."
    )


class Thresholds(_Section):
    """Thresholds for false-hit budgets."""

    budgets: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.01, 0.02, 0.05], min_length=1, description="Largest shares of look-alikes that may hit, each once."
    )
    confidence: float = Field(
        0.95, gt=0, lt=1, description="With that confidence a threshold keeps to its budget; coverage of the intervals."
    )
    fixed: float = Field(0.8, ge=-1, le=1, description="The one threshold that is shown beside those chosen.")

    @field_validator("budgets")
    @classmethod
    def _check_budgets(cls, budgets: list[float]) -> list[float]:
        """Refuse a budget that stands twice: its rows would."""
        if len(set(budgets)) < len(budgets):
            raise ValueError("a budget stands in it twice: remove one")
        return budgets


class Replay(_Section):
    """The stream of queries that goes through a cache: drawn from the test part of the test sets."""

    queries: int = Field(
        2000,
        ge=1,
        description="Length of the stream. A longer one repeats more, for a test set has few wordings of an intent.",
    )
    exponent: float = Field(
        0.8,
        ge=0,
        le=10,
        description="The r-th most popular intent is asked r to this power less often than the first (Zipf's law); "
        "0.64 to 0.83 in what web caches are asked (Breslau et al. 1999).",
    )
    paraphrase_share: Share = Field(
        0.4, description="Share of the queries of a known intent in other words, as long as there are any."
    )
    look_alike_share: Share = Field(0.1, description="Share of them that are a look-alike of the intent instead.")

    @model_validator(mode="after")
    def _check_shares(self) -> "Replay":
        """Refuse shares of more than there is."""
        if self.paraphrase_share + self.look_alike_share > 1:
            raise ValueError("paraphrase_share and look_alike_share are more than 1 together: lower one of the two")
        return self


class Deploy(_Section):
    """What is put into service."""

    model: str = Field("joint", description="The adapter to merge into a plain model folder.")


class Config(_Section):
    """The whole configuration."""

    pathvars: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        {},
        description="Snakemake's names for folders: `results`, `logs`, `state` for LLM replies and checkpoints.",
    )
    seed: int = Field(13, ge=0, le=2**32 - 1, description="Seed of every draw: splits, batches, weights, bootstrap.")
    base_models: dict[Name, BaseModelSource] = Field(min_length=1, description="The base models, each with all rows.")
    domains: dict[FreeName, Domain] = Field(min_length=1, description="The domains.")
    queries: Queries = Queries()
    engines: dict[Name, Engine] = Field(min_length=1, description="The LLM engines that domains may use.")
    augment: Augment = Augment()
    testset: Testset = Testset()
    filter: Filter = Filter()
    judge: Judge | None = Field(None, description="A judge of the texts that the filters keep; default: none.")
    triplets: Triplets = Triplets()
    train: Train = Train()
    models: dict[FreeName, Model] = Field(
        {}, description="Further trained models, beside one for each domain and `joint`."
    )
    sweep: Sweep | None = Field(None, description="A search for settings of `train`, done instead of the table.")
    merges: dict[FreeName, Merge] = Field({}, description="The weight merges; each becomes a model of its name.")
    hybrids: dict[FreeName, Hybrid] = Field(
        {}, description="Detectors with the models that they choose from; each becomes a row of its name."
    )
    adapters: dict[FreeName, ForeignAdapter] = Field(
        {}, description="Adapters that were trained elsewhere; each becomes a row of its name."
    )
    sets: dict[Name, LabelledSet] = Field({}, description="Further test sets, beside one for each domain.")
    mirror: str | None = Field(
        None,
        description="A folder in which the file of a set is looked for by its name, if it is not where its path says "
        "and before it is fetched: for machines without network.",
    )
    evaluate: Evaluate = Evaluate()
    thresholds: Thresholds = Thresholds()
    replay: Replay = Replay()
    deploy: Deploy = Deploy()

    @model_validator(mode="after")
    def _check_references(self) -> "Config":
        """Check what one part says about another."""
        for domain, settings in self.domains.items():
            key = f"domains.{domain}.engine" if settings.engine else "augment.engine"
            name = settings.engine or self.augment.engine
            if name not in self.engines:
                raise ConfigError(
                    key,
                    f"unknown engine '{name}'",
                    f"Use one of {_listed(self.engines)}, or declare it under `engines`",
                )
            if self.engines[name].type == "recorded" and settings.recording is None:
                raise ConfigError(
                    f"domains.{domain}.recording",
                    f"missing, and engine '{name}' replays a recording",
                    "Name a recording, or set `engine` to one that asks an LLM (README, 'Your own LLM')",
                )
        self._check_filter_and_judge()
        if not self.adapter_domains:
            raise ConfigError("domains", "none of them gets an adapter", "Leave `adapter` out of one of them")
        if not self.pool:
            raise ConfigError("domains", "all of them are added, to nothing", "Leave `added` out of one of them")
        taken = [*self.domains]
        for section in ("models", "merges", "hybrids", "adapters"):
            for name in getattr(self, section):
                if name in taken:
                    raise ConfigError(
                        f"{section}.{name}", "there is a domain or model of this name", "Rename one of the two"
                    )
                if name.startswith(_TRIAL):
                    raise ConfigError(f"{section}.{name}", f"'{_TRIAL}' begins the names of trials", "Rename it")
            taken += getattr(self, section)
        adapters = [name for name, model in self.trained_models.items() if not model.train.full]
        self._check_merges(adapters)
        self._check_hybrids()
        self._check_sets_and_adapters()
        if not adapters and not self.merges:
            raise ConfigError("deploy.model", "every model is trained in full", "Set train.full only in models.*")
        if self.deploy.model not in [*adapters, *self.merges]:
            hybrid = "is a hybrid, and not one model" if self.deploy.model in self.hybrids else "is unknown"
            raise ConfigError(
                "deploy.model", f"'{self.deploy.model}' {hybrid}", f"Use one of {_listed([*adapters, *self.merges])}"
            )
        # Refuses what the trainings of a sweep would.
        seen: dict[str, str] = {}
        for name, trial in self.trials.items():
            if (same := seen.setdefault(trial.model_dump_json(), name)) != name:
                raise ConfigError("sweep", f"{same} and {name} are the same training", "Leave one of them out")
        return self

    def _check_filter_and_judge(self) -> None:
        """Check that they name what there is."""
        if self.filter.base_model not in (None, *self.base_models):
            raise ConfigError(
                "filter.base_model",
                f"unknown base model '{self.filter.base_model}'",
                f"Use one of {_listed(self.base_models)}",
            )
        if self.judge is None or self.judge.engine is None:
            return
        if self.judge.engine not in self.engines:
            raise ConfigError(
                "judge.engine", f"unknown engine '{self.judge.engine}'", f"Use one of {_listed(self.engines)}"
            )
        if self.engines[self.judge.engine].type == "recorded":
            for domain, settings in self.domains.items():
                if settings.verdicts is None:
                    raise ConfigError(
                        f"domains.{domain}.verdicts",
                        f"missing, and the judge '{self.judge.engine}' replays verdicts",
                        "Name the recorded verdicts, or set judge.engine to one that asks an LLM",
                    )

    @property
    def judge_type(self) -> str | None:
        """The type of the judge: that of its engine, or ``cross_encoder``; None without a judge."""
        if self.judge is None:
            return None
        return self.engines[self.judge.engine].type if self.judge.engine else "cross_encoder"

    @property
    def used_engines(self) -> list[str]:
        """The engines that a domain or the judge uses."""
        named = [domain.engine or self.augment.engine for domain in self.domains.values()]
        named += [self.judge.engine] if self.judge and self.judge.engine else []
        return list(dict.fromkeys(named))

    @property
    def filter_base_model(self) -> str:
        """The base model that measures similarities for the filters."""
        return self.filter.base_model or next(iter(self.base_models))

    def _check_merges(self, adapters: list[str]) -> None:
        """Check that merges name adapters."""
        trained = self.trained_models
        for name, merge in self.merges.items():
            members = self.merged_models[name]
            if full := [member for member in members if member in trained and member not in adapters]:
                raise ConfigError(
                    f"merges.{name}", f"{full[0]} is trained in full, and has no adapter", "Merge others, by `models`"
                )
            if merges := [member for member in members if member in self.merges]:
                raise ConfigError(
                    f"merges.{name}.models", f"'{merges[0]}' is a merge itself", "Merge the adapters that it is made of"
                )
            for key, given, known in (("models", members, adapters), ("weights", merge.weights, members)):
                if unknown := [member for member in given if member not in known]:
                    raise ConfigError(
                        f"merges.{name}.{key}", f"unknown adapter '{unknown[0]}'", f"Use some of {_listed(known)}"
                    )
            if len(set(members)) < len(members):
                raise ConfigError(
                    f"merges.{name}.models", "an adapter stands twice in it", "Give it more weight instead"
                )
            for key in ("rank", "target_modules") if merge.method == "linear" else ("target_modules",):
                values = {member: getattr(trained[member].train, key) for member in members}
                first = values[members[0]]
                for member, value in values.items():
                    if not _same(value, first):
                        raise ConfigError(
                            f"merges.{name}",
                            f"`{merge.method}` needs adapters of the same {key}, and {members[0]} has {first}, "
                            f"{member} {value}",
                            "Merge adapters of one recipe",
                        )

    def _check_hybrids(self) -> None:
        """Check that hybrids name domains and models."""
        known = ["base", *self.trained_models, *self.merges]
        for name, hybrid in self.hybrids.items():
            if len(self.domains) < 2:
                raise ConfigError(f"hybrids.{name}", "there is one domain only, and nothing to detect", "Remove it")
            self._known_domains([*hybrid.models], f"hybrids.{name}.models")
            named = {"otherwise": hybrid.otherwise} | {f"models.{domain}": m for domain, m in hybrid.models.items()}
            for key, model in named.items():
                if model not in known:
                    raise ConfigError(
                        f"hybrids.{name}.{key}", f"unknown model '{model}'", f"Use one of {_listed(known)}"
                    )

    def _check_sets_and_adapters(self) -> None:
        """Check that sets have names and files of their own, and foreign adapters a base model."""
        by_name: dict[str, str] = {}
        for name, entry in self.sets.items():
            file = PurePosixPath(urlsplit(entry.source).path if "://" in entry.source else entry.source).name
            other = by_name.setdefault(file, name)
            twice = other != name and self.sets[other].source != entry.source
            if twice and self.mirror is not None and None in (entry.sha256, self.sets[other].sha256):
                raise ConfigError(
                    f"sets.{name}.source",
                    f"its file has the name of that of {other}, and `mirror` cannot tell them apart",
                    "Give both a `sha256`, or one of the files another name",
                )
        for name in self.sets:
            if name in self.domains:
                raise ConfigError(f"sets.{name}", "there is a domain of this name", "Rename one of the two")
        for name, adapter in self.adapters.items():
            known = f"Use one of {_listed(self.base_models)}"
            if adapter.base is None and len(self.base_models) > 1:
                raise ConfigError(f"adapters.{name}.base", "missing, and there are several base models", known)
            if adapter.base not in (None, *self.base_models):
                raise ConfigError(f"adapters.{name}.base", f"unknown base model '{adapter.base}'", known)

    @property
    def adapter_bases(self) -> dict[str, str]:
        """The base model of each adapter that was trained elsewhere, by its name."""
        only = next(iter(self.base_models))
        return {name: adapter.base or only for name, adapter in self.adapters.items()}

    @property
    def hybrid_models(self) -> dict[str, dict[str, str]]:
        """The model of each domain that has one of its own, by the hybrid's name."""
        return {
            name: {domain: domain for domain in self.adapter_domains} | hybrid.models
            for name, hybrid in self.hybrids.items()
        }

    @property
    def state_folder(self) -> str:
        """Where LLM replies and checkpoints are kept: the pathvar ``state``, with those put in that it names."""
        known = {"results": "results", "logs": "logs", "state": "<results>/state", **self.pathvars}
        path = known["state"]
        # Each may name others; as many rounds as there are names reach the end of any chain.
        for _ in known:
            path = re.sub(r"<(\w+)>", lambda found: known.get(found[1], found[0]), path)
        if re.search(r"<\w+>", path):
            raise ConfigError("pathvars.state", f"'{path}' names what is not declared, or itself", "Name a folder")
        return path

    @property
    def merged_models(self) -> dict[str, list[str]]:
        """The adapters that are merged, by the merge's name."""
        return {name: merge.models or self.adapter_domains for name, merge in self.merges.items()}

    @property
    def trained_models(self) -> dict[str, TrainedModel]:
        """What is trained, by model id: a model for each domain, ``joint`` and those of ``models``."""
        found = {name: TrainedModel(domains=[name], seed=self.seed, train=self.train) for name in self.adapter_domains}
        found["joint"] = TrainedModel(domains=self._known_domains(None, ""), seed=self.seed, train=self.train)
        for name, model in self.models.items():
            domains = self._known_domains(model.domains, f"models.{name}.domains")
            train = self._train_with(model.train, f"models.{name}.train")
            before: list[str] = []
            if model.start is not None:
                _check_start(f"models.{name}", model.start, train, found)
                seen = [*found[model.start].all_domains, *found[model.start].forgotten]
                before = [domain for domain in seen if domain not in domains]
            found[name] = TrainedModel(
                domains=domains,
                seed=self.seed if model.seed is None else model.seed,
                train=train,
                start=model.start,
                replayed=dict.fromkeys(before, model.replay) if model.replay else {},
                forgotten=[] if model.replay else before,
            )
        return found

    @property
    def repeats(self) -> dict[str, list[str]]:
        """The models that differ in nothing but seeds, their own or those of their parts, by the id of the first."""
        alike: dict[str, dict[Hashable, str]] = {}
        first: dict[str, str] = {}

        def add(name: str, what: Any, which: Hashable) -> None:
            names = alike.setdefault(json.dumps(what), {})
            names.setdefault(which, name)
            first[name] = next(iter(names.values()))

        for name, model in self.trained_models.items():
            add(name, model.model_dump(mode="json", exclude={"seed"}), model.seed)
        for name, members in self.merged_models.items():
            merge = self.merges[name].model_dump(mode="json", exclude={"models"})
            merge["weights"] = {first[member]: weight for member, weight in merge["weights"].items()}
            add(name, [merge, [first[member] for member in members]], tuple(members))
        for name, by_domain in self.hybrid_models.items():
            hybrid = self.hybrids[name].model_dump(mode="json", exclude={"models", "otherwise"})
            models = [*by_domain.values(), self.hybrids[name].otherwise]
            add(name, [hybrid, [*by_domain], [first.get(model, model) for model in models]], tuple(models))
        groups = ([*names.values()] for names in alike.values())
        return {names[0]: names for names in groups if len(names) > 1}

    @property
    def trials(self) -> dict[str, TrainedModel]:
        """The trials of the sweep, by model id; none without a sweep."""
        if self.sweep is None:
            return {}
        domains = self._known_domains(self.sweep.domains, "sweep.domains")
        seeds = itertools.cycle(self.sweep.seeds or [self.seed])
        return {
            name: TrainedModel(domains=domains, seed=next(seeds), train=self._train_with(changes, "sweep"))
            for name, changes in self.trial_changes.items()
        }

    @property
    def trial_changes(self) -> dict[str, dict[str, Any]]:
        """What each trial of the sweep changes of the recipe, by model id; the seeds of a combination in a row."""
        if self.sweep is None:
            return {}
        each = len(self.sweep.seeds or [self.seed])
        changes = []
        for change in self.sweep.changes:
            # As they were understood: on a command line, Snakemake makes words of numbers.
            understood = self._train_with(change, "sweep").model_dump(mode="json")
            changes += [{key: understood[key] for key in change}] * each
        return {f"{_TRIAL}{number:03d}": change for number, change in enumerate(changes, start=1)}

    def _known_domains(self, domains: list[str] | None, key: str) -> list[str]:
        """Return the named domains, or all that were not added."""
        for name in domains or []:
            if name not in self.domains:
                raise ConfigError(key, f"unknown domain '{name}'", f"Use some of {_listed(self.domains)}")
        if len(set(domains or [])) < len(domains or []):
            raise ConfigError(key, "a domain stands twice in it", "Leave one of the two out")
        return domains or self.pool

    def _train_with(self, changes: dict[str, Any], key: str) -> Train:
        """Lay changes over the section `train`; a change replaces a value whole."""
        try:
            return Train.model_validate({**self.train.model_dump(), **changes})
        except ValidationError as error:
            raise _config_error(error, key) from None

    @property
    def pool(self) -> list[str]:
        """The domains that models are trained on together: those that were not added later."""
        return [name for name, domain in self.domains.items() if not domain.added]

    def before(self, domain: str) -> list[str]:
        """Return the domains that were there when a domain came.

        Parameters
        ----------
        domain : str
            A domain of this configuration.

        Returns
        -------
        list of str
            The whole pool with the domain itself in it for a domain of the pool; for one that was added, the pool and
            the domains added above it.
        """
        if not self.domains[domain].added:
            return self.pool
        names = [*self.domains]
        return self.pool + [name for name in names[: names.index(domain)] if self.domains[name].added]

    @property
    def adapter_domains(self) -> list[str]:
        """The domains that get an adapter of their own."""
        return [name for name, domain in self.domains.items() if domain.adapter]

    def prompt_of(self, domain: str) -> dict[str, Any]:
        """Return what the prompts of a domain are made of.

        Parameters
        ----------
        domain : str
            A domain of this configuration.

        Returns
        -------
        dict
            The fields of a :class:`DomainPrompt`, and ``field``.
        """
        settings = self.domains[domain]
        return {"field": settings.field or domain, **settings.prompt.model_dump()}

    def engine_of(self, domain: str) -> RecordedEngine | LiveEngine:
        """Return the settings of the engine that a domain uses.

        Parameters
        ----------
        domain : str
            A domain of this configuration.

        Returns
        -------
        RecordedEngine or LiveEngine
            Its settings.
        """
        return self.engines[self.domains[domain].engine or self.augment.engine]


def _same(one: Any, other: Any) -> bool:
    """Compare a setting of two recipes; of a list of layers, the order says nothing."""
    return set(one) == set(other) if isinstance(one, list) else one == other


def _check_start(key: str, start: str, train: Train, found: dict[str, TrainedModel]) -> None:
    """Refuse to go on from what a training cannot go on from."""
    if start not in found:
        raise ConfigError(f"{key}.start", f"no model '{start}' above it", f"Use one of {_listed(found)}")
    before = found[start].train
    if before.full or train.full:
        raise ConfigError(f"{key}.start", "a full fine-tune has no adapter to go on from", "Use adapters")
    for name in ("rank", "alpha", "target_modules"):
        mine, theirs = getattr(train, name), getattr(before, name)
        if not _same(mine, theirs):
            raise ConfigError(f"{key}.train.{name}", f"{mine}, and {start} has {theirs}", "Make them the same")


def parse(config: dict[str, Any]) -> Config:
    """Check a configuration and fill in the defaults.

    Parameters
    ----------
    config : dict
        What the YAML files hold, overlays merged. A domain, engine, base model, model, merge, hybrid, adapter, set or
        loss that an overlay sets to null is removed.

    Returns
    -------
    Config
        The checked configuration.

    Raises
    ------
    ConfigError
        If a key is unknown or missing, or a value is not allowed; with the key's full name.
    """
    config = dict(config)
    for section in ("base_models", "domains", "engines", "models", "merges", "hybrids", "adapters", "sets"):
        if isinstance(config.get(section), dict):
            config[section] = {name: value for name, value in config[section].items() if value is not None}
    train = config.get("train")
    if isinstance(train, dict) and isinstance(train.get("losses"), dict):
        losses = {name: weight for name, weight in train["losses"].items() if weight is not None}
        config["train"] = {**train, "losses": losses}
    try:
        return Config.model_validate(config)
    except ValidationError as error:
        raise _config_error(error) from None


def read_config(*paths: str | Path) -> Config:
    """Read a configuration file and what is laid over it, key by key, as Snakemake does.

    Parameters
    ----------
    *paths : str or Path
        The YAML files; a later one wins.

    Returns
    -------
    Config
        The checked configuration.

    Raises
    ------
    ConfigError
        If a file is missing or not YAML, or as :func:`parse`.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(str(path), f"it cannot be read ({error.strerror})", "Correct the path") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            first = str(error).strip().replace("\n", " ")[:160]
            raise ConfigError(str(path), f"it is not YAML ({first})", "Correct it") from error
        if not isinstance(content, dict):
            raise ConfigError(str(path), "it holds no keys", "Compare with the shipped file")
        merged = _laid_over(merged, content)
    return parse(merged)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two mappings, those inside them too; what is above wins."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def json_schema() -> str:
    """Return the JSON schema of the configuration, for editors.

    Returns
    -------
    str
        The schema, draft 2020-12, as JSON. The workflow itself checks with :func:`parse`.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _config_error(error: ValidationError, above: str = "") -> ConfigError:
    """Turn the first problem that pydantic found into a message for the person who edits the file."""
    problems = error.errors(include_url=False, include_context=True)
    problem = problems[0]
    # Pydantic puts the tag of a union and "[key]" into the path; the file has neither.
    path = [*filter(None, above.split(".")), *(str(part) for part in problem["loc"] if part != "[key]")]
    engine = None
    if len(path) > 2 and path[0] == "engines":
        engine = _ENGINE_BY_TYPE.get(path[2])
        if engine:
            del path[2]
    key = ".".join(part if part.isprintable() else ascii(part) for part in path) or "config"
    more = f" ({len(problems) - 1} more problems follow)" if len(problems) > 1 else ""
    match problem["type"]:
        case "extra_forbidden":
            known = _listed(Train.model_fields if above else _section_fields(path[:-1], engine))
            return ConfigError(key, f"unknown key '{path[-1]}'", f"Use one of {known}, or remove it{more}")
        case "missing":
            return ConfigError(key, "missing", f"Set it{more}")
        case "union_tag_invalid":
            expected = problem["ctx"]["expected_tags"]
            return ConfigError(f"{key}.type", f"unknown engine '{problem['ctx']['tag']}'", f"Use {expected}{more}")
        case "union_tag_not_found":
            return ConfigError(f"{key}.type", "missing", f"Name the type of the engine{more}")
        case "value_error":
            what, _, remedy = str(problem["ctx"]["error"]).partition(": ")
            return ConfigError(key, what, f"{remedy[:1].upper()}{remedy[1:]}{more}")
    if problem["input"] is None:
        return ConfigError(key, "it is empty", f"Remove the line, or give it a value{more}")
    shown = json.dumps(problem["input"], ensure_ascii=False, default=str)
    return ConfigError(key, f"{shown[:80]} is not allowed", f"{problem['msg']}{more}")


def _section_fields(path: list[str], engine: type[BaseModel] | None) -> list[str]:
    """List the keys that may stand at a path of the configuration, in an engine's settings those of its type."""
    section: Any = Config
    if engine:
        section, path = engine, path[2:]
    for part in path:
        if isinstance(section, type) and issubclass(section, BaseModel) and part in section.model_fields:
            section = section.model_fields[part].annotation
            continue
        # A mapping of names to sections: the name leads to the section, whichever it is.
        arguments = getattr(section, "__args__", ())
        section = arguments[-1] if arguments else section
    for variant in (section, *getattr(section, "__args__", ())):
        if isinstance(variant, type) and issubclass(variant, BaseModel):
            return list(variant.model_fields)
    return sorted({name for variant in ENGINES for name in variant.model_fields})


def _listed(names: Any) -> str:
    """Join names for a message."""
    return ", ".join(names)
