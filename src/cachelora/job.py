"""What every script of the workflow does around its work: a log, and errors that a person can use."""

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachelora.errors import CacheloraError


@contextmanager
def logged(log: str | Path) -> Iterator[None]:
    """Send everything that a job says to its log file, and end it with a message where it fails.

    An error that the user can mend ends the process with exit code 1 and one line on the terminal and in the log; any
    other error also leaves its traceback in the log.

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
        faulthandler.enable(stream)
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
            return
        finally:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            faulthandler.disable()
    sys.exit(1)


def _tell(terminal: int, line: str) -> None:
    """Write a line to where the job was started from, without what a terminal would take for a command."""
    shown = "".join(character if character.isprintable() else " " for character in line[:2000])
    os.write(terminal, f"{shown}\n".encode("utf-8", "replace"))


def _end_with_snakemake() -> None:
    """End this process soon after the Snakemake that started it, which a ``kill -9`` of Snakemake alone would not do.

    An orphan would go on writing while the next run works on the same files. Needs /proc; elsewhere it does nothing.
    """
    starter = os.getppid()
    while starter > 1 and b"snakemake" not in {
        Path(os.fsdecode(word)).name.encode() for word in _command_line(starter)
    }:
        starter = _parent(starter)
    if starter <= 1:
        return

    def watch() -> None:
        while Path(f"/proc/{starter}").exists():
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _command_line(pid: int) -> list[bytes]:
    """Return the words of a process's command line; none if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _parent(pid: int) -> int:
    """Return the parent of a process; 0 if it cannot be read."""
    try:
        # After the name, which is in brackets and may hold anything: the state and the parent.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
