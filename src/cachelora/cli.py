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
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "verify":
            from cachelora.manifest import verify as verify_folder

            for folder in chosen.folder:
                print(f"{folder}: {len(verify_folder(folder)['files'])} files as the manifest says")
        else:
            from cachelora.config import json_schema
            from cachelora.reference import config_reference, contracts_reference

            pages = {"schema": json_schema, "config": config_reference, "contracts": contracts_reference}
            print(pages[chosen.page](), end="")
    except CacheloraError as error:
        print(f"ERROR {error}", file=sys.stderr)
        return 1
    return 0
