"""Time and memory of planning and scheduling very many jobs, which do nothing. See docs/clusters.md.

python benchmarks/scale.py plan --domains 200 --shards 64
python benchmarks/scale.py run --domains 200 --shards 64 --jobs 64

The workflow is copied and the script of every rule replaced by a shell command that writes its outputs: what is left is
the work of Snakemake.
"""

import argparse
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
# A rule's outputs hold something: some rules ensure that.
TRIVIAL = '    shell:\n        "for file in {output:q}; do echo > $file; done"\n'


def copy_workflow(folder: Path, domains: int, shards: int) -> None:
    """Copy the workflow, with so many domains that share one file of queries and one recording."""
    for name in ("config", "data", "envs", "profiles", "workflow"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "Snakefile", folder)
    for path in (folder / "workflow/rules").glob("*.smk"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r'    script:\n        "[^"]+"\n', TRIVIAL, text), encoding="utf-8")
    shipped = yaml.safe_load((ROOT / "config/domains.yaml").read_text(encoding="utf-8"))["domains"]
    # Domains of its own, for a domain's settings are its own too.
    many = dict.fromkeys(shipped) | {f"domain{number:04}": shipped["medical"] for number in range(domains)}
    overlay = {"domains": many, "augment": {"shards": shards}}
    (folder / "many.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "run"))
    parser.add_argument("--domains", type=int, default=200)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=64, help="how many trivial jobs at once, for `run`")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy_workflow(Path(folder), arguments.domains, arguments.shards)
        command = [sys.executable, "-m", "snakemake", "--configfile", "many.yaml"]
        plan, run = ["-n", "--quiet", "all"], ["--cores", str(arguments.jobs), "--scheduler", "greedy"]
        command += plan if arguments.what == "plan" else run
        # All but the deployed folder, which no echo makes.
        command += ["--", "results/benchmark.csv", "results/benchmark.html"]
        started = time.monotonic()
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - started
    if result.returncode:
        sys.exit((result.stdout + result.stderr)[-5000:])
    total = re.search(r"^total +(\d+)", result.stdout + result.stderr, re.MULTILINE)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    size = f"{arguments.domains} domains, {arguments.shards} shards, {total[1]} jobs"
    print(f"{arguments.what}: {size}: {seconds:.0f} s, {peak:.2f} GiB")


if __name__ == "__main__":
    main()
