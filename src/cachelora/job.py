"""What every script of the workflow does around its work: a log, and errors that a person can use."""

import faulthandler
import logging
import os
import sys
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
        for name in ("httpx", "filelock", "fsspec", "urllib3"):
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
    """Write a line to where the job was started from."""
    os.write(terminal, f"{line}\n".encode("utf-8", "replace"))
