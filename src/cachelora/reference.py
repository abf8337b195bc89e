"""Reference pages that are written from the code, so that they cannot drift from it."""

import json
import types
from typing import Any, Literal, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cachelora import schemas
from cachelora.config import ENGINES, Config, engine_type

_CONFIG_INTRO = """# Configuration

`config/domains.yaml` is the one file to edit; it holds science only. Threads, memory and GPUs stand in the rules, how
jobs are run in `profiles/`. A file given with `--configfile` is laid over it, key by key, as the presets are; an entry
that it sets to `null` (a domain, an engine, a base model, a model, a merge, a hybrid, an adapter, a set, a loss) is
removed. A key that is not listed is an error.

Written by `cachelora reference config`; do not edit."""

_CONTRACTS_INTRO = """# Contracts

What stands in the files between the stages. No column is ever null.

Beside them, as JSON:

* `results/augmented/{domain}/{shard}.json` holds of a shard the engine with its version, the model, the `identity` that
  the journal is keyed by, how its `queries` ended, `texts` by kind, `refused` texts by reason, `failed_examples`, the
  `tokens` of all its replies, and the `run`: how many queries it asked, found in the journal, and the seconds.
  `results/augmented/{domain}.jsonl` is the domain's recording ([corpora.md](corpora.md)).
* `results/evaluation/{base}/{model}.json` holds the `results` (a metric of a test set and kind each, with its interval
  and change, as in `results/benchmark.csv`), the settings and digests behind them, and for a hybrid `routed`: how many
  anchors of each test set went to which model.
* `results/replay/{base}/{model}.json` holds what the `stream` is made of; for each of the `thresholds` the counts of
  outcomes, by form and test set too, hit_ratio, calls_saved (right hits), false_hit_share (each a share of the queries)
  and false_hits_of_hits with their intervals over intents, and the first three `over_time`; the budgets that are
  `unmet`; and apart from all that, `timing`: milliseconds of encoding and search, the size of the index, the hardware.
* `results/models/{base}/{model}/metrics.json` holds, of a training, `validation` (each evaluation, by domain too),
  `best_step` (the one that was kept), `log`, `items` (groups) and `device`; of a merge, the chosen `weights` and
  `density`, their `validation`, that of the `base` model and all that was `tried`; of a hybrid, the detector's accuracy
  on the validation queries. `manifest.json` beside it has settings, digests of inputs and files, versions, hardware and
  seconds.

Written by `cachelora reference contracts`; do not edit."""

_CONTRACTS = {
    "results/queries/{domain}.parquet": schemas.QUERIES,
    "results/augmented/{domain}.parquet": schemas.AUGMENTED,
    "results/filtered/{domain}.parquet": schemas.FILTERED,
    "results/judged/{domain}.parquet": schemas.VERDICTS,
    "results/testset/{domain}.parquet": schemas.TESTSET,
    "results/testset/{domain}.pairs.parquet": schemas.PAIRS,
    "results/sets/{set}.parquet": schemas.LABELLED,
    "results/triplets/{domain}.parquet": schemas.TRIPLETS,
    "results/evaluation/{base}/{model}.parquet": schemas.SCORES,
    "results/evaluation/{base}/{model}.curves.parquet": schemas.CURVES,
    "results/thresholds/{base}/{model}.parquet": schemas.THRESHOLDS,
    "results/replay/{base}/{model}.parquet": schemas.REPLAY,
}


def config_reference() -> str:
    """Describe every key of the configuration.

    Returns
    -------
    str
        Markdown: a table for each section, with default and meaning.
    """
    parts = [_CONFIG_INTRO, "## Top level", _table(Config)]
    for name, field in Config.model_fields.items():
        sections = [found for found in _sections(field.annotation) if found is not Config]
        for section in sections:
            place = f"{name}.NAME" if get_origin(field.annotation) is dict else name
            variant = f" (type `{engine_type(section)}`)" if name == "engines" else ""
            parts += [f"## `{place}`{variant}", section.__doc__.strip(), _table(section)]
        for key, part in {key: part for section in sections for key, part in _parts(section)}.items():
            parts += [f"## `{place}.{key}`", part.__doc__.strip(), _table(part)]
    return "\n\n".join(parts) + "\n"


def contracts_reference() -> str:
    """Describe every column of the files between the stages.

    Returns
    -------
    str
        Markdown: a table for each file.
    """
    parts = [_CONTRACTS_INTRO]
    for path, schema in _CONTRACTS.items():
        rows = [(f"`{field.name}`", _type_name(field.type), field.metadata[b"meaning"].decode()) for field in schema]
        parts += [f"## `{path}`", _markdown(("column", "type", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """List the sections that a field holds."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    if "Engine" in str(annotation):
        return [*ENGINES]
    return [found for part in getattr(annotation, "__args__", ()) for found in _sections(part)]


def _parts(section: type[BaseModel], above: str = "") -> list[tuple[str, type[BaseModel]]]:
    """List the sections inside a section, at any depth, by their keys."""
    found = []
    for key, field in section.model_fields.items():
        for part in _sections(field.annotation):
            found += [(f"{above}{key}", part), *_parts(part, f"{above}{key}.")]
    return found


def _table(section: type[BaseModel]) -> str:
    """Make the table of a section's keys."""
    rows = [
        (f"`{name}`", _default(field), (field.description or "see below") + _choices(field.annotation))
        for name, field in section.model_fields.items()
        if name != "type"
    ]
    return _markdown(("key", "default", "meaning"), rows) if rows else "It has no keys but `type`."


def _default(field: FieldInfo) -> str:
    """Show a default."""
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return ""
    return f"`{json.dumps(field.default)}`"


def _choices(annotation: Any) -> str:
    """List the words that a key, or the keys of a mapping, may take."""
    number = "One"
    if get_origin(annotation) is dict:
        annotation, number = get_args(annotation)[0], "Some"
    for part in get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,):
        if get_origin(part) is Literal:
            return f" {number} of " + ", ".join(f"`{choice}`" for choice in get_args(part)) + "."
    return ""


def _type_name(type_: pa.DataType) -> str:
    """Show the type of a column."""
    if pa.types.is_list(type_) and not pa.types.is_struct(type_.value_type):
        return f"list of {type_.value_type}"
    if pa.types.is_list(type_):
        return "list of (" + ", ".join(f"{field.name}: {field.type}" for field in type_.value_type) + ")"
    return str(type_)


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Make a Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
