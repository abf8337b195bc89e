"""What jobs are doing, and which have failed: read from their logs, which `cachelora.job` begins and ends."""

import logging
import os
import re
import socket
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cachelora.errors import InputError
from cachelora.files import read_json, write_json
from cachelora.job import process_start
from cachelora.terminal import plain

_log = logging.getLogger(__name__)

DONE, FAILED, KILLED, RUNNING, UNKNOWN = "done", "failed", "killed", "running", "running or killed"
STATES = (RUNNING, UNKNOWN, FAILED, KILLED, DONE)
STAGES_HEAD = ("stage", "planned", *STATES, "time left")
JOBS_HEAD = ("state", "where", "since", "for", "log", "last line")
_PART = 1 << 20
"""Bytes that are read of a log's beginning and of its end; logs of trainings grow long."""
_WIDEST = 300
PLAN = "plan.json"
"""What :func:`write_plan` calls its file."""
_MOST = 10**9
"""Jobs; a plan of more is none."""
_MARK = re.compile(r"\[job\] (\w+) (\S+) (.*)")
_LEASED = re.compile(r"^.* INFO cachelora\.gpus: leased (\S+)$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Job:
    """What a log says of its job.

    Parameters
    ----------
    log : Path
        The log.
    stage : str
        The first folder under the folder of the logs, or the log's name without one.
    state : str
        One of `STATES`; a job without a last line on another machine may be running or killed.
    where : str
        Host, the scheduler's id of the job, and its GPUs, as far as there are any.
    started : datetime
        By the clock of the job's machine.
    seconds : float
        How long it took; up to now for one that runs; up to the last line for one that was killed.
    silent : float
        Seconds since the log was last written to.
    lines : list of str
        The last lines that the job wrote, printable.
    """

    log: Path
    stage: str
    state: str
    where: str
    started: datetime
    seconds: float
    silent: float
    lines: list[str]

    @property
    def failed(self) -> bool:
        """Whether it ended before its end."""
        return self.state in (FAILED, KILLED)


@dataclass(frozen=True)
class Plan:
    """What a run set out to do.

    Parameters
    ----------
    started : datetime
        When the run began.
    stages : dict of str to int
        How many jobs of each stage it has.
    """

    started: datetime
    stages: dict[str, int]


def write_plan(folder: str | Path, started: datetime, rules: Iterable[str]) -> None:
    """Note what a run is about to do, for :func:`read_plan`.

    Parameters
    ----------
    folder : str or Path
        The folder of the logs.
    started : datetime
        When the run began, with its time zone.
    rules : iterable of str
        The rule of each of its jobs. A rule is named after its stage, with a word behind it for variants.
    """
    stages = Counter(rule.partition("_")[0] for rule in rules)
    write_json(Path(folder, PLAN), {"started": started.isoformat(), "stages": dict(stages)})


def read_plan(folder: str | Path) -> Plan | None:
    """Read what the last run in a folder of logs set out to do.

    Parameters
    ----------
    folder : str or Path
        The folder of the logs.

    Returns
    -------
    Plan or None
        None if no run has noted it there.

    Raises
    ------
    InputError
        If what is noted cannot be read.
    """
    path = Path(folder, PLAN)
    if not path.is_file():
        return None
    damaged = InputError(str(path), "it does not hold the plan of a run", "Delete it")
    try:
        noted = read_json(path)
        plan = Plan(datetime.fromisoformat(noted["started"]), dict(noted["stages"]))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise damaged from error
    if plan.started.tzinfo is None or not all(type(n) is int and 0 <= n < _MOST for n in plan.stages.values()):
        raise damaged
    return plan


def read_jobs(folder: str | Path, since: datetime | None = None) -> list[Job]:
    """Read the logs of a folder.

    Parameters
    ----------
    folder : str or Path
        The folder of the logs, with a folder for each stage.
    since : datetime, optional
        Leave out jobs that were started earlier, to the second.

    Returns
    -------
    list of Job
        By the order in which they were started. Files that no job has begun are left out.

    Raises
    ------
    InputError
        If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            str(folder),
            "no such folder",
            "Name the folder of the logs: logs/tiny for the preset tiny, else what the config's `pathvars` says",
        )
    jobs = [job for path in folder.rglob("*.log") if (job := _read(path, folder)) is not None]
    if since is not None:
        jobs = [job for job in jobs if job.started >= since.replace(microsecond=0)]
    return sorted(jobs, key=lambda job: (job.started, job.log))


def stage_rows(jobs: Sequence[Job], plan: Plan | None) -> list[list[str]]:
    """Count the jobs of each stage by state, and guess how long the rest takes.

    Parameters
    ----------
    jobs : sequence of Job
        In any order; stages are listed in the plan's.
    plan : Plan or None
        What the run set out to do; without it there is nothing to say of the rest.

    Returns
    -------
    list of list of str
        Rows under `STAGES_HEAD`. What is left of a stage is the mean time of its jobs that are done, times those that
        are not, over the mean number of jobs at once so far: a guess, which knows nothing of what waits for what. The
        last row, of the whole run, is left out without a plan, and says "at least" while some stage has no job done.
    """
    counts: dict[str, Counter[str]] = {}
    for job in jobs:
        counts.setdefault(job.stage, Counter())[job.state] += 1
    planned = plan.stages if plan else {}
    elapsed = (datetime.now(UTC) - plan.started).total_seconds() if plan else 0.0
    at_once = max(1.0, sum(job.seconds for job in jobs) / elapsed) if elapsed > 0 else 1.0
    rows, whole, unknown = [], 0.0, False
    for stage in dict.fromkeys([*planned, *counts]):
        found = counts.get(stage, Counter())
        rest = planned.get(stage, 0) - found[DONE]
        took = [job.seconds for job in jobs if job.stage == stage and job.state == DONE]
        left = "unknown" if rest > 0 else ""
        if rest > 0 and took:
            seconds = rest * sum(took) / len(took) / at_once
            whole += seconds
            left = _duration(seconds)
        unknown |= rest > 0 and not took
        rows.append([stage, str(planned.get(stage, "")), *(str(found[state]) for state in STATES), left])
    if plan:
        total = sum(counts.values(), Counter())
        left = ("at least " if unknown else "") + _duration(whole) if whole else "unknown" if unknown else ""
        rows.append(["all", str(sum(planned.values())), *(str(total[state]) for state in STATES), left])
    return rows


def job_rows(jobs: Iterable[Job]) -> list[list[str]]:
    """Describe the jobs that are not done.

    Parameters
    ----------
    jobs : iterable of Job
        Those that are done are left out.

    Returns
    -------
    list of list of str
        Rows under `JOBS_HEAD`.
    """
    rows = []
    for job in jobs:
        if job.state == DONE:
            continue
        last = job.lines[-1] if job.lines else ""
        if job.state in (RUNNING, UNKNOWN):
            last = f"{last} ({_duration(job.silent)} ago)".strip()
        since = job.started.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        rows.append([job.state, job.where, since, _duration(job.seconds), str(job.log), last])
    return rows


def failure_lines(jobs: Sequence[Job], number: int) -> list[str]:
    """Tell of the jobs that failed or were killed, each once, with the last lines of its log.

    Parameters
    ----------
    jobs : sequence of Job
        All jobs.
    number : int
        How many lines of each log.

    Returns
    -------
    list of str
        Lines to print, the first with the number of failures; it stands alone if there are none.
    """
    failures = [job for job in jobs if job.failed]
    shown = [f"{len(failures)} of {len(jobs)} jobs failed"]
    for job in failures:
        shown += ["", f"{plain(job.log)}: {job.state} after {_duration(job.seconds)} on {job.where}"]
        shown += [f"    {line}" for line in job.lines[-number:]]
    return shown


def _read(path: Path, folder: Path) -> Job | None:
    """Read a log; None if no job has begun it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None
        with path.open("rb") as stream:
            head = stream.read(_PART)
            stream.seek(max(0, path.stat().st_size - _PART))
            tail = stream.read()
        written = path.stat().st_mtime
    except FileNotFoundError:
        # Removed since it was listed, as Snakemake does before a job runs again.
        return None
    except OSError as error:
        _log.warning("%s: it cannot be read (%s)", plain(path), error.strerror)
        return None
    beginning = head.decode("utf-8", "replace")
    first = _marked(beginning.partition("\n")[0])
    if first is None or first[0] != "started":
        return None
    _, started, about = first
    # A progress bar goes back to the start of its line, which splits it here.
    lines = tail.decode("utf-8", "replace").splitlines()
    # Libraries write after the last line, so it may not be the last of the file. A text that looks like it does not
    # hold the number of the process.
    ends = [
        found
        for found in map(_marked, lines)
        if found and found[0] in (DONE, FAILED) and found[2].get("process") == about.get("process")
    ]
    silent = max(0.0, datetime.now(UTC).timestamp() - written)
    if ends:
        state, ended, _ = ends[-1]
    elif about.get("host") != socket.gethostname():
        state, ended = UNKNOWN, datetime.now(UTC)
    elif _lives(about.get("process", "")):
        state, ended = RUNNING, datetime.now(UTC)
    else:
        state, ended = KILLED, datetime.fromtimestamp(written, UTC)
    leased = _LEASED.search(beginning)
    devices = leased[1] if leased else about.get("devices", "")
    inside = path.relative_to(folder)
    places = [about.get("host", ""), about.get("scheduler", "")]
    places += [] if devices in ("not-set", "none", "") else [f"GPU {devices}"]
    said = [shown[:_WIDEST] for line in lines if _marked(line) is None and (shown := plain(line))]
    return Job(
        log=path,
        stage=inside.parts[0] if len(inside.parts) > 1 else inside.stem,
        state=state,
        where=plain(", ".join(place for place in places if place not in ("none", ""))),
        started=started,
        seconds=max(0.0, (ended - started).total_seconds()),
        silent=silent,
        lines=said,
    )


def _marked(line: str) -> tuple[str, datetime, dict[str, str]] | None:
    """Read one of the lines that `cachelora.job` writes: what happens, when, and what it says of it."""
    found = _MARK.fullmatch(line)
    if found is None:
        return None
    try:
        when = datetime.fromisoformat(found[2])
    except ValueError:
        return None
    # Beyond these years no time zone can be told.
    if when.tzinfo is None or not 1970 < when.year < 9999:
        return None
    return found[1], when, dict(word.partition("=")[::2] for word in found[3].split())


def _lives(process: str) -> bool:
    """Say whether a process of this machine is the one that has begun a log, not a later one with its number."""
    number, _, start = process.partition(".")
    if not number.isdecimal() or len(number) > 10 or int(number) == 0:
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        # Of another user; or no number of a process at all.
        pass
    return process_start(int(number)) == start


def _duration(seconds: float) -> str:
    """Write a time span in its two largest units."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"
