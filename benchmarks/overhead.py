"""What a run costs beside its jobs' own work, from what it leaves behind. See docs/clusters.md.

python benchmarks/overhead.py logs .snakemake/log/2026-01-31T093000.123456.snakemake.log

A job's own work is what lies between the first and the last line of its log: without the start of Python and
Snakemake's part of the job, with the loading of libraries that its stage imports later.
"""

import argparse
import re
from datetime import datetime
from pathlib import Path

from cachelora.jobs import read_jobs


def covered(spans: list[tuple[float, float]]) -> float:
    """Return how many seconds lie in at least one of the spans of time."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, help="the folder of the jobs' logs")
    parser.add_argument("run", type=Path, help="Snakemake's own log of the run")
    arguments = parser.parse_args()
    named = re.match(r"\d{4}-\d\d-\d\dT\d{6}\.\d+", arguments.run.name)
    if named is None:
        parser.error(f"{arguments.run.name}: the name of Snakemake's log begins with the time of the run")
    started = datetime.strptime(named[0], "%Y-%m-%dT%H%M%S.%f").astimezone()
    wall = arguments.run.stat().st_mtime - started.timestamp()
    jobs = read_jobs(arguments.logs, started)
    spans = [(job.started.timestamp(), job.started.timestamp() + job.seconds) for job in jobs]
    work = sum(job.seconds for job in jobs)
    print(f"{len(jobs)} jobs, {wall:.0f} s, of which a job worked in {covered(spans):.0f} s; work in sum {work:.0f} s")


if __name__ == "__main__":
    main()
