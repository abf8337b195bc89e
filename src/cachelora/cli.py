"""The command `cachelora`: small helpers beside the workflow."""

import argparse
import sys
from collections.abc import Sequence

from cachelora import __version__
from cachelora.errors import CacheloraError


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
    check.add_argument("--configfile", default="config/domains.yaml", help="the configuration that names the files")
    check.add_argument(
        "--freeze", action="store_true", help="first write the lock: changed test sets get a new version"
    )
    labelled = commands.add_parser("labelled", help="measure an adapter on labelled pairs or triplets of your own")
    labelled.add_argument("--configfile", default="config/domains.yaml", help="the configuration with the base model")
    labelled.add_argument("--base", help="the base model's name in it; the first by default")
    labelled.add_argument("--adapter", required=True, help="a folder under results/models")
    labelled.add_argument("file", nargs="+", help="pairs (a, b, label) or triplets (anchor, positive, negative)")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "verify":
            from cachelora.manifest import verify as verify_folder

            for folder in chosen.folder:
                print(f"{folder}: {len(verify_folder(folder)['files'])} files as the manifest says")
        elif chosen.command == "data-check":
            return _data_check(chosen.configfile, chosen.freeze)
        elif chosen.command == "labelled":
            _labelled(chosen.configfile, chosen.base, chosen.adapter, chosen.file)
        else:
            from cachelora.config import json_schema
            from cachelora.reference import config_reference, contracts_reference

            pages = {"schema": json_schema, "config": config_reference, "contracts": contracts_reference}
            print(pages[chosen.page](), end="")
    except CacheloraError as error:
        print(f"ERROR {error}", file=sys.stderr)
        return 1
    return 0


def _data_check(configfile: str, freeze: bool) -> int:
    """Print the report on the corpora; return 1 if it found a problem."""
    from cachelora.config import read_config
    from cachelora.datacheck import check_corpora
    from cachelora.datacheck import freeze as freeze_testsets
    from cachelora.models import load_model

    config = read_config(configfile)
    if freeze:
        for change in freeze_testsets(config) or ["nothing to freeze: every test set is as it was"]:
            print(change, file=sys.stderr)
    report = check_corpora(config, load_model(next(iter(config.base_models.values())), None))
    print(report.markdown(), end="")
    return 1 if report.problems else 0


def _labelled(configfile: str, base: str | None, adapter: str, files: Sequence[str]) -> None:
    """Print what an adapter changes on labelled sets."""
    from cachelora.config import read_config
    from cachelora.errors import ConfigError
    from cachelora.labelled import labelled_markdown, measure_labelled, read_labelled
    from cachelora.models import load_model

    config = read_config(configfile)
    name = base or next(iter(config.base_models))
    if name not in config.base_models:
        raise ConfigError(f"--base {name}", "no such base model", f"Use one of {', '.join(config.base_models)}")
    sets = {file: read_labelled(file) for file in files}
    models = [load_model(config.base_models[name], folder) for folder in (None, adapter)]
    tables = {file: (measure_labelled(pairs, models, config.seed), len(pairs)) for file, pairs in sets.items()}
    print(labelled_markdown(tables), end="")
