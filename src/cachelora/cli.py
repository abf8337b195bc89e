"""The command `cachelora`: small helpers beside the workflow."""

import argparse
import os
import sys
from collections.abc import Sequence

from cachelora import __version__
from cachelora.errors import CacheloraError

CONFIG = "config/domains.yaml"


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
    labelled = commands.add_parser("labelled", help="measure an adapter on labelled pairs or triplets of your own")
    labelled.add_argument("--base", help="the base model's name in it; the first by default")
    labelled.add_argument("--adapter", required=True, help="a folder under results/models")
    labelled.add_argument("file", nargs="+", help="pairs (a, b, label) or triplets (anchor, positive, negative)")
    cost = commands.add_parser("estimate", help="ask an LLM a handful of queries, and say what the log will take")
    cost.add_argument("--domain", action="append", help="a domain; by default all with a live engine")
    cost.add_argument("--queries", type=_positive, default=16, help="how many of each are asked (default: 16)")
    cost.add_argument("--threads", type=_positive, default=os.cpu_count() or 1, help="CPU threads of an LLM in process")
    for command in (check, labelled, cost):
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
        elif chosen.command == "labelled":
            _labelled([CONFIG, *chosen.configfile], chosen.base, chosen.adapter, chosen.file)
        else:
            from cachelora.config import json_schema
            from cachelora.reference import config_reference, contracts_reference

            pages = {"schema": json_schema, "config": config_reference, "contracts": contracts_reference}
            print(pages[chosen.page](), end="")
    except (CacheloraError, OSError) as error:
        print(f"ERROR {error}", file=sys.stderr)
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


def _labelled(configfiles: Sequence[str], base: str | None, adapter: str, files: Sequence[str]) -> None:
    """Print what an adapter changes on labelled sets."""
    from cachelora.config import read_config
    from cachelora.errors import ConfigError
    from cachelora.labelled import labelled_markdown, measure_labelled, read_labelled
    from cachelora.models import load_model

    config = read_config(*configfiles)
    name = base or next(iter(config.base_models))
    if name not in config.base_models:
        raise ConfigError(f"--base {name}", "no such base model", f"Use one of {', '.join(config.base_models)}")
    sets = {file: read_labelled(file) for file in files}
    models = [load_model(config.base_models[name], folder) for folder in (None, adapter)]
    tables = {file: (measure_labelled(pairs, models, config.seed), len(pairs)) for file, pairs in sets.items()}
    print(labelled_markdown(tables), end="")
