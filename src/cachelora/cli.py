"""The command `cachelora`: small helpers beside the workflow."""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from cachelora import __version__
from cachelora.errors import CacheloraError

if TYPE_CHECKING:
    from cachelora.config import BaseModelSource, Config

CONFIG = "config/domains.yaml"
_LONG = 1000
"""Texts from which on their encoding shows how far it is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The arguments; those of the process by default.

    Returns
    -------
    int
        The exit code: 0, or 1 after a message.
    """
    parser = argparse.ArgumentParser(prog="cachelora", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check model folders against their manifests")
    verify.add_argument("folder", nargs="+", help="a folder under results/models or results/deploy")
    reference = commands.add_parser("reference", help="print a page that is written from the code")
    reference.add_argument("page", choices=("schema", "config", "contracts"))
    check = commands.add_parser("data-check", help="check queries, recordings and test sets")
    check.add_argument("--freeze", action="store_true", help="if all is well, give changed test sets a new version")
    measured = commands.add_parser("evaluate", help="measure a model on your own test sets, or those of the config")
    measured.add_argument(
        "--base", help="a base model's name in it, package:NAME, hub:OWNER/NAME@COMMIT or a folder; default: its first"
    )
    measured.add_argument(
        "--adapter", help="beside the base model: a folder (under results/models, or of peft) or hub:OWNER/NAME@COMMIT"
    )
    measured.add_argument("--output", help="a file for all metrics: .csv, .md or .parquet")
    measured.add_argument(
        "set",
        nargs="+",
        help="a file of pairs (a, b, label) or triplets (anchor, positive, negative), or a name under `sets`",
    )
    compared = commands.add_parser("compare", help="see what an adapter changes in a cache, on a log of your own")
    compared.add_argument("log", help=".jsonl, .csv or .parquet with a column `query`, or .txt; in the order of time")
    compared.add_argument("--adapter", required=True, help="a folder (under results/models, or of peft)")
    compared.add_argument("--base", help="the base model, as for `evaluate`")
    compared.add_argument(
        "--threshold", type=_cosine, help="of the base model; default: as for --threshold-after, or .8 if that is given"
    )
    compared.add_argument(
        "--threshold-after", type=_cosine, help="of the adapter; default: what the workflow chose for 5 %% false hits"
    )
    compared.add_argument("--output", help="a CSV file for all pairs that become hits or stop being hits")
    compared.add_argument("--limit", type=_positive, help="read so many queries of the log")
    fitted = commands.add_parser("threshold", help="choose a threshold on labelled pairs of your own, or check one")
    fitted.add_argument("set", help="a file or a name, as for `evaluate`")
    fitted.add_argument("--base", help="the base model, as for `evaluate`")
    fitted.add_argument("--adapter", help="an adapter on it, as for `evaluate`")
    fitted.add_argument("--budget", type=_share, action="append", help="largest share of false hits; may be repeated")
    fitted.add_argument("--check", type=_cosine, help="a threshold in use: exit code 1 if it breaks the budget")
    shown = commands.add_parser("table", help="print the overviews of a finished run")
    shown.add_argument("file", nargs="?", default="results/benchmark.parquet", help="default: %(default)s")
    watched = commands.add_parser("jobs", help="see which jobs run, where, and which have failed")
    watched.add_argument("logs", nargs="?", default="logs", help="the folder of the logs; default: %(default)s")
    watched.add_argument("--failed", action="store_true", help="show the last lines of the log of each failed job")
    watched.add_argument("--lines", type=_positive, default=10, help="how many of them (default: %(default)s)")
    watched.add_argument("--since", type=_time, help="leave out jobs started before, such as 2026-01-31T09:30")
    cost = commands.add_parser("estimate", help="ask an LLM a handful of queries, and say what the log will take")
    cost.add_argument("--domain", action="append", help="a domain; by default all with a live engine")
    cost.add_argument("--queries", type=_positive, default=16, help="how many of each are asked (default: 16)")
    cost.add_argument("--threads", type=_positive, default=os.cpu_count() or 1, help="CPU threads of an LLM in process")
    for command in (check, measured, compared, fitted, cost):
        command.add_argument(
            "--configfile", action="append", default=[], help=f"a file laid over {CONFIG}, as in Snakemake"
        )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "verify":
            return _verify(chosen.folder)
        if chosen.command == "data-check":
            return _data_check([CONFIG, *chosen.configfile], chosen.freeze)
        if chosen.command == "estimate":
            _estimate([CONFIG, *chosen.configfile], chosen.domain, chosen.queries, chosen.threads)
        elif chosen.command == "evaluate":
            _evaluate([CONFIG, *chosen.configfile], chosen.base, chosen.adapter, chosen.set, chosen.output)
        elif chosen.command == "threshold":
            return _threshold([CONFIG, *chosen.configfile], chosen)
        elif chosen.command == "jobs":
            return _jobs(chosen)
        elif chosen.command == "table":
            _table(chosen.file)
        elif chosen.command == "compare":
            _compare([CONFIG, *chosen.configfile], chosen)
        else:
            from cachelora.config import json_schema
            from cachelora.reference import config_reference, contracts_reference

            pages = {"schema": json_schema, "config": config_reference, "contracts": contracts_reference}
            print(pages[chosen.page](), end="")
    except BrokenPipeError:
        # Whoever read has seen enough; what is left to write goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CacheloraError, OSError) as error:
        from cachelora.terminal import plain

        print(plain(f"ERROR {error}"), file=sys.stderr)
        return 1
    return 0


def _verify(folders: Sequence[str]) -> int:
    """Check each folder, whatever is wrong with those before it; return 1 if something is."""
    from cachelora.manifest import verify

    damaged = 0
    for folder in folders:
        try:
            print(f"{folder}: {len(verify(folder)['files'])} files as the manifest says")
        except CacheloraError as error:
            damaged = 1
            print(f"ERROR {error}", file=sys.stderr)
    return damaged


def _data_check(configfiles: Sequence[str], freeze: bool) -> int:
    """Print the report on the corpora; return 1 if it found a problem."""
    from cachelora.config import read_config
    from cachelora.datacheck import check_corpora, check_frozen
    from cachelora.datacheck import freeze as freeze_testsets
    from cachelora.models import load_model

    config = read_config(*configfiles)
    report = check_corpora(config, load_model(next(iter(config.base_models.values())), None))
    if freeze and report.problems:
        print("nothing was frozen: mend the problems first", file=sys.stderr)
    elif freeze:
        for change in freeze_testsets(config) or ["nothing to freeze: every test set is as it was"]:
            print(change, file=sys.stderr)
    check_frozen(config, report)
    print(report.markdown(), end="")
    return 1 if report.problems else 0


def _positive(text: str) -> int:
    """Read a number of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def _share(text: str) -> float:
    """Read a share between 0 and 1."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError("it must be between 0 and 1")
    return number


def _cosine(text: str) -> float:
    """Read a cosine."""
    number = float(text)
    if not -1 <= number <= 1:
        raise argparse.ArgumentTypeError("it must be between -1 and 1")
    return number


def _time(text: str) -> datetime:
    """Read a point in time; one without an offset is of this machine's time zone."""
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError("it must be a time such as 2026-01-31T09:30") from None


def _estimate(configfiles: Sequence[str], domains: Sequence[str] | None, queries: int, threads: int) -> None:
    """Print what augmenting the domains will take."""
    import logging

    from cachelora.augment.estimate import estimate, estimates_table
    from cachelora.config import RecordedEngine, read_config
    from cachelora.errors import ConfigError

    config = read_config(*configfiles)
    live = [name for name in config.domains if not isinstance(config.engine_of(name), RecordedEngine)]
    chosen = dict.fromkeys(domains or live)
    if not chosen:
        raise ConfigError("domains", "none has a live engine", "Set the `engine` of one, or give a --configfile")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("cachelora").setLevel(logging.INFO)
    print(estimates_table([estimate(config, domain, queries, threads) for domain in chosen]), end="")


def _evaluate(
    configfiles: Sequence[str], base: str | None, adapter: str | None, names: Sequence[str], output: str | None
) -> None:
    """Print what a model, or a base model and an adapter on it, make of test sets."""
    from cachelora.config import read_config
    from cachelora.sets import check_output, measure_models, read_sets, set_tables, write_measured
    from cachelora.terminal import print_table

    config = read_config(*configfiles)
    if output is not None:
        check_output(output, names, config.sets, config.mirror)
    settings = _base_model(config, base)
    pairs = read_sets(names, config.sets, config.mirror)
    # Imported when everything else is known to be right: it takes seconds.
    from cachelora.models import load_model

    models = {"base": load_model(settings, None)}
    if adapter is not None:
        models["adapter"] = load_model(settings, adapter, foreign=True)
    table = measure_models(pairs, models, config.evaluate, config.seed, os.cpu_count() or 1)
    print(f"base: {settings.source}" + (f", adapter: {adapter}" if adapter else ""))
    descriptions = {name: entry.description for name, entry in config.sets.items()}
    for title, head, rows in set_tables(table, descriptions, config.evaluate.false_hit_budget):
        print_table(title, head, rows)
    share, budget = config.evaluate.confidence, config.evaluate.false_hit_budget
    print(
        f"In brackets: {share:.0%} intervals; *: that of the change does not hold 0. Of fewer than {ceil(1 / budget)} "
        f"pairs with another answer, {budget:.0%} false hits are none at all."
    )
    if output is not None:
        write_measured(output, table)


def _compare(configfiles: Sequence[str], chosen: argparse.Namespace) -> None:
    """Print what an adapter changes on a log."""
    from cachelora.compare import check_files, compare, comparison_tables, fitted_threshold, write_changed
    from cachelora.config import read_config
    from cachelora.queries import read_queries
    from cachelora.terminal import plain, print_table

    config = read_config(*configfiles)
    settings = _base_model(config, chosen.base)
    check_files(chosen.log, chosen.output)
    before, after = chosen.threshold, chosen.threshold_after
    notes = ["given", "given"]
    if after is None:
        after, notes[1] = fitted_threshold(chosen.adapter), "chosen by the workflow"
        if before is None:
            # Beside a fixed one, the difference would be mostly that of the thresholds.
            before, notes[0] = fitted_threshold(Path(chosen.adapter).parent / "base"), "chosen by the workflow"
    elif before is None:
        before, notes[0] = config.thresholds.fixed, "default"
    queries, rejects = read_queries(chosen.log, config.queries)
    if rejects:
        first = f"the first is line {rejects[0].line}, {rejects[0].reason}"
        print(plain(f"{chosen.log}: {len(rejects)} records are set aside; {first}"), file=sys.stderr)
    queries = queries[: chosen.limit]
    # Imported when everything else is known to be right: it takes seconds.
    import numpy as np

    from cachelora.models import encode_texts, load_model

    texts, vectors = list(dict.fromkeys(queries)), []
    for adapter in (None, chosen.adapter):
        model = load_model(settings, adapter, foreign=adapter is not None)
        found = encode_texts(model, texts, config.evaluate.batch_tokens, progress=len(texts) >= _LONG)
        vectors.append(np.stack([found[text] for text in texts]))
    comparison = compare(queries, (vectors[0], vectors[1]), (before, after))
    for title, head, rows in comparison_tables(comparison, (before, after), notes):
        print_table(title, head, rows)
    if chosen.output is not None:
        write_changed(chosen.output, comparison.changed)


def _threshold(configfiles: Sequence[str], chosen: argparse.Namespace) -> int:
    """Print thresholds for false-hit budgets; return 1 if one that is checked breaks its budget."""
    from cachelora.config import read_config
    from cachelora.sets import read_sets
    from cachelora.terminal import print_table
    from cachelora.thresholds import REFIT_HEAD, drift, refit_rows

    config = read_config(*configfiles)
    settings = config.thresholds
    if chosen.budget:
        settings = settings.model_copy(update={"budgets": chosen.budget})
    base = _base_model(config, chosen.base)
    pairs = read_sets([chosen.set], config.sets, config.mirror)
    # Imported when everything else is known to be right: it takes seconds.
    from cachelora.models import load_model, score_pairs

    model = load_model(base, chosen.adapter, foreign=chosen.adapter is not None)
    scores = score_pairs(model, pairs, config.evaluate.batch_tokens)
    if chosen.check is None:
        different = int((~pairs["same_answer"]).sum())
        title = f"{chosen.set}: {len(pairs)} pairs, {different} of them with another answer"
        print_table(title, REFIT_HEAD, refit_rows(scores, settings))
        return 0
    broken, rows = 0, []
    for budget in settings.budgets:
        found = drift(scores, chosen.check, budget, settings.confidence)
        broken |= found.verdict == "broken"
        rows.append([f"{budget:.2%}", f"{found.rate:.4f} [{found.low:.4f}, {found.high:.4f}]", found.verdict])
    print_table(f"The threshold {chosen.check:g} on {chosen.set}", ("budget", "false-hit rate", "verdict"), rows)
    return broken


def _jobs(chosen: argparse.Namespace) -> int:
    """Print what jobs do, or the end of each log of a failed one; return 1 if there are failures."""
    from cachelora.jobs import JOBS_HEAD, STAGES_HEAD, failure_lines, job_rows, read_jobs, read_plan, stage_rows
    from cachelora.terminal import print_table

    # Of a run that is under way or was the last one; other times have no plan.
    plan = read_plan(chosen.logs) if chosen.since is None else None
    jobs = read_jobs(chosen.logs, plan.started if plan else chosen.since)
    if chosen.failed:
        print("\n".join(failure_lines(jobs, chosen.lines)), flush=True)
    else:
        print_table(f"{len(jobs)} jobs under {chosen.logs}", STAGES_HEAD, stage_rows(jobs, plan))
        rows = job_rows(jobs)
        if rows:
            print_table("Not done", JOBS_HEAD, rows)
    return any(job.failed for job in jobs)


def _table(path: str) -> None:
    """Print the overviews of a finished run."""
    import pandas as pd

    from cachelora.benchmark import MEASURED, overviews
    from cachelora.errors import InputError
    from cachelora.terminal import print_table

    try:
        table = pd.read_parquet(path)
        measured = table[table["source"] == MEASURED]
        confidence = float(measured["confidence"].iloc[0])
    except (OSError, ValueError, KeyError, IndexError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "it is no benchmark table"
        raise InputError(path, reason, "Run `snakemake --cores all`, or name its benchmark.parquet") from error
    for _, rows in measured.groupby("base_model", sort=False):
        for section in overviews(rows, confidence):
            print_table(section.title, [*section.table.columns], section.table.to_numpy().tolist())
    print(f"Values of the base model and changes of the others, with {100 * confidence:g} % intervals; *: significant.")
    page, tables, numbers = (Path(path).with_suffix(end) for end in (".html", ".md", ".csv"))
    print(f"The page: {page}   All tables: {tables}   Every number: {numbers}")


def _base_model(config: "Config", base: str | None) -> "BaseModelSource":
    """Find a base model by its name in the configuration, or by where it comes from."""
    from pydantic import ValidationError

    from cachelora.config import BaseModelSource
    from cachelora.errors import ConfigError

    if base is None or base in config.base_models:
        return config.base_models[base or next(iter(config.base_models))]
    if not base.startswith(("package:", "hub:")) and not os.path.isdir(base):  # noqa: PTH112
        known = ", ".join(config.base_models)
        raise ConfigError(f"--base {base}", "no such base model", f"Use one of {known}, a package, a hub or a folder")
    try:
        return BaseModelSource(source=base, name=base)
    except ValidationError as error:
        what, _, remedy = str(error.errors()[0]["ctx"]["error"]).partition(": ")
        raise ConfigError(f"--base {base}", what, remedy.capitalize()) from None
