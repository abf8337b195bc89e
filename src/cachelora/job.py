"""What every script of the workflow does around its work: a log, and errors that a person can use."""

import faulthandler
import logging
import os
import re
import resource
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cachelora.errors import CacheloraError

# The job's id in what started it, by the variable that says it.
_SCHEDULERS = {
    "slurm": "SLURM_JOB_ID",
    "aws-batch": "AWS_BATCH_JOB_ID",
    "google-batch": "BATCH_JOB_ID",
    "lsf": "LSB_JOBID",
    "pbs": "PBS_JOBID",
    "sge": "JOB_ID",
}


@contextmanager
def logged(log: str | Path) -> Iterator[None]:
    """Send everything that a job says to its log file, and end it with a message where it fails.

    An error that the user can mend ends the process with exit code 1 and one line on the terminal and in the log; any
    other error also leaves its traceback in the log. The log's first line says where the job runs, its last one how it
    ended, both in a form that :mod:`cachelora.jobs` reads; a job that was killed has no last line.

    Parameters
    ----------
    log : str or Path
        The log file.
    """
    path = Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_with_snakemake()
    terminal = os.dup(sys.stderr.fileno())
    # On the level of file descriptors, so that what C++ libraries print arrives there too.
    with path.open("w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
        # Into a file it would be written in blocks, after what the standard error has said since.
        sys.stdout.reconfigure(line_buffering=True)
        faulthandler.enable(stream)
        started, process, ending = time.monotonic(), f"{os.getpid()}.{process_start(os.getpid())}", "failed"
        places = {name: os.environ[variable] for name, variable in _SCHEDULERS.items() if os.environ.get(variable)}
        _mark(
            "started",
            host=socket.gethostname(),
            process=process,
            scheduler=",".join(f"{name}:{number}" for name, number in places.items()) or "none",
            devices=os.environ.get("CUDA_VISIBLE_DEVICES", "not-set") or "none",
        )
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True
        )
        # These write a line for each file they open or each request they make.
        for name in ("httpx", "httpx2", "filelock", "fsspec", "urllib3"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            yield
        except CacheloraError as error:
            _tell(terminal, f"ERROR {error}")
            logging.getLogger(__name__).error("%s", error)
        except Exception as error:
            _tell(terminal, f"ERROR {type(error).__name__}: {error} (the traceback is in {path})")
            traceback.print_exc()
        else:
            ending = "done"
            return
        finally:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            faulthandler.disable()
            _mark(
                ending,
                process=process,
                after=f"{time.monotonic() - started:.1f}s",
                peak_memory=f"{_peak_memory_mb()}MiB",
            )
    sys.exit(1)


def process_start(pid: int) -> str:
    """Return when a process started, in a form that only says whether two processes with one id are the same.

    Parameters
    ----------
    pid : int
        The number of a process of this machine.

    Returns
    -------
    str
        Clock ticks since the machine's start; "0" if there is no such process, or no /proc to ask.
    """
    fields = _stat(pid)
    # A zombie has ended; only its parent has not asked yet.
    return fields[19] if fields and fields[0] != "Z" else "0"


def _mark(event: str, **about: str) -> None:
    """Write a line that people and :mod:`cachelora.jobs` read."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    # What the environment says is data: no blank or control character of it may end a value.
    words = " ".join(f"{key}={re.sub(r'[^!-~]', '_', value)}" for key, value in about.items())
    print(f"[job] {event} {now} {words}", flush=True)


def _peak_memory_mb() -> int:
    """Return the most memory in MiB that this process or one that it waited for has held."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    try:
        status = Path("/proc/self/status").read_text()
        own = int(re.search(r"^VmHWM:\s+(\d+) kB$", status, flags=re.MULTILINE)[1])
    except (OSError, TypeError):
        # On Linux it would also count what the process held that started this one.
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Both in KiB.
    return round(max(own, children) / 1024)


def _tell(terminal: int, line: str) -> None:
    """Write a line to where the job was started from, without what a terminal would take for a command."""
    shown = "".join(character if character.isprintable() else " " for character in line[:2000])
    os.write(terminal, f"{shown}\n".encode("utf-8", "replace"))


def _end_with_snakemake() -> None:
    """End this process soon after the Snakemake that started it, which a ``kill -9`` of Snakemake alone would not do.

    An orphan would go on writing while the next run works on the same files. Needs /proc; elsewhere it does nothing.
    """
    starter = os.getppid()
    while starter > 0 and not _is_snakemake(starter):
        starter = _parent(starter)
    if starter == 0:
        # Killed while this job was still importing what it needs.
        if Path("/proc/self/stat").exists() and Path(sys.argv[0]).parent.parts[-2:] == (".snakemake", "scripts"):
            print("The Snakemake that started this job has ended, so it ends too.", file=sys.stderr)
            sys.exit(1)
        return

    def watch() -> None:
        while Path(f"/proc/{starter}").exists():
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_snakemake(pid: int) -> bool:
    """Say whether a process is Snakemake, by the words of its command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return "snakemake" in {Path(os.fsdecode(word)).name for word in words}


def _parent(pid: int) -> int:
    """Return the parent of a process; 0 if it cannot be read."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """Return what the kernel says of a process from its state on; nothing if it cannot be read."""
    try:
        # After the name, which is in brackets and may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
