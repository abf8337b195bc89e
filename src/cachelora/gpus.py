"""A lease on GPUs: two processes of one machine never compute on the same device by accident.

A device is locked by its UUID, since a scheduler may number the devices of each job from 0. The lock is the kernel's
(flock), so it ends with the process, however that ends. Three calls of the standard library do it; a lock library would
have to be pinned in the environment of each engine.
"""

import fcntl
import getpass
import logging
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cachelora.errors import EngineError
from cachelora.text import on_one_line

LOCKS = "/tmp/cachelora-gpus"
"""One folder for all users of the machine. Not $TMPDIR, which schedulers and users set to folders of their own."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_log = logging.getLogger(__name__)


@contextmanager
def lease(number: int, locks: str | Path = LOCKS) -> Iterator[list[str]]:
    """Hold GPUs that no other lease on this machine holds, and show only these to CUDA.

    It takes all or none, and waits for as long as too few are free. On a machine without a GPU, or where
    CUDA_VISIBLE_DEVICES hides them all, nothing is leased. It must be entered before CUDA is used, for CUDA reads
    CUDA_VISIBLE_DEVICES once.

    Parameters
    ----------
    number : int
        How many; with 0 none is shown to CUDA.
    locks : str or Path
        The folder of the locks, the same for all processes of the machine.

    Yields
    ------
    list of str
        The names of the devices, as CUDA_VISIBLE_DEVICES has them: UUIDs.

    Raises
    ------
    EngineError
        If fewer GPUs may be used than are asked for, or CUDA_VISIBLE_DEVICES names one that there is not.
    """
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        raise RuntimeError("the lease on GPUs must be taken before CUDA is used")
    devices = usable_devices() if number else []
    if devices and len(devices) < number:
        seen = os.environ.get(_VISIBLE, "not set")
        raise EngineError(
            "GPUs", f"{number} are asked for, {len(devices)} may be used ({_VISIBLE}: {seen})", "Ask for fewer"
        )
    if number and not devices:
        yield []
        return
    before = os.environ.get(_VISIBLE)
    try:
        held = _wait_for(devices, number, Path(locks)) if number else {}
    except OSError as error:
        raise EngineError(
            str(locks),
            f"no GPU can be locked ({error})",
            "Let all users write there, and remove what is no file of theirs",
        ) from error
    try:
        os.environ[_VISIBLE] = ",".join(held)
        if held:
            _log.info("leased %s", ",".join(held))
        yield [*held]
    finally:
        if before is None:
            os.environ.pop(_VISIBLE, None)
        else:
            os.environ[_VISIBLE] = before
        _let_go(held)


def usable_devices() -> list[str]:
    """List the GPUs that this process may use: what nvidia-smi lists, narrowed by CUDA_VISIBLE_DEVICES.

    Returns
    -------
    list of str
        UUIDs, or names of MIG instances; none without an NVIDIA driver.

    Raises
    ------
    EngineError
        If CUDA_VISIBLE_DEVICES names a device that there is not.
    """
    wanted = os.environ.get(_VISIBLE)
    names = [] if wanted is None else [name.strip() for name in wanted.split(",")]
    # CUDA ends the list at the first such entry; with it in front, people hide all devices.
    for hidden in ("", "-1", "NoDevFiles"):
        names = names[: names.index(hidden)] if hidden in names else names
    if wanted is not None and not names:
        return []
    present = _present_devices()
    if wanted is None or not present:
        return [*dict.fromkeys(present.values())]
    return [*dict.fromkeys(_find(name, present) for name in names)]


def _present_devices() -> dict[str, str]:
    """Return the UUID of each device that the driver shows to this process, by its index."""
    command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=120)
    except FileNotFoundError:
        return {}
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning("no GPU is leased: %s", on_one_line(str(error)))
        return {}
    if result.returncode:
        _log.warning("no GPU is leased, nvidia-smi says: %s", on_one_line(result.stdout + result.stderr)[:500])
        return {}
    return dict(re.findall(r"^\s*(\d+)\s*,\s*(GPU-[\w-]+)\s*$", result.stdout, flags=re.MULTILINE))


def _find(name: str, present: dict[str, str]) -> str:
    """Return the UUID that an entry of CUDA_VISIBLE_DEVICES means."""
    if name.startswith("MIG-"):
        # A part of a device, which nvidia-smi does not list here.
        return name
    # As in CUDA, the beginning of a UUID is enough if no other begins like it.
    found = [present[name]] if name in present else [uuid for uuid in present.values() if uuid.startswith(name)]
    if len(found) != 1 or not (name.isdigit() or name.startswith("GPU-")):
        known = ", ".join(f"{index} ({uuid})" for index, uuid in present.items())
        what = f"{on_one_line(name)!r} is {'more than one device' if len(found) > 1 else 'no device'}"
        raise EngineError(_VISIBLE, what, f"Use some of {known}, or unset it")
    return found[0]


def _wait_for(devices: Sequence[str], number: int, folder: Path) -> dict[str, int]:
    """Return the descriptors of the locks on so many of the devices, by device, as soon as so many are free."""
    _make_folder(folder)
    told = False
    while True:
        held, busy = _try(devices, number, folder)
        if held:
            return held
        if not told:
            holders = "; ".join(f"{device} is held by {_holder(folder / _file_name(device))}" for device in busy)
            _log.info("waiting for %d of %d GPUs: %s", number, len(devices), holders)
            told = True
        # Of random length, so that two processes that let go for each other do not meet again.
        time.sleep(random.uniform(0.2, 1.0))


def _try(devices: Sequence[str], number: int, folder: Path) -> tuple[dict[str, int], list[str]]:
    """Lock so many of the devices, or none: who holds one while it waits for another may wait for ever.

    Returns the descriptors by device, and the devices that were found locked.
    """
    held: dict[str, int] = {}
    busy: list[str] = []
    try:
        # In one order for all processes, so that of two that want the same devices one gets them.
        for device in sorted(devices):
            descriptor = _lock(folder / _file_name(device))
            if descriptor is None:
                busy.append(device)
            else:
                held[device] = descriptor
            if len(held) == number or len(devices) - len(busy) < number:
                break
        if len(held) == number:
            return {device: held[device] for device in devices if device in held}, busy
    except BaseException:
        _let_go(held)
        raise
    _let_go(held)
    return {}, busy


def _let_go(held: dict[str, int]) -> None:
    """Close the files that are locked, which unlocks them."""
    for descriptor in held.values():
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Lock a file and write into it who holds it; return its descriptor, None if another process holds it."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    # Other users lock it too.
    mask = os.umask(0)
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        # Without O_CREAT, with which Linux refuses a file of another user in a shared folder.
        descriptor = os.open(path, flags)
    finally:
        os.umask(mask)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} of {_user()}".encode())
    return descriptor


def _user() -> str:
    """Return the name of the user, or their number where they have no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _make_folder(folder: Path) -> None:
    """Make the folder of the locks, in which every user may make files and none may remove another's."""
    try:
        folder.mkdir()
        folder.chmod(0o1777)
    except FileExistsError:
        if folder.is_symlink() or not folder.is_dir():
            raise EngineError(str(folder), "it is no folder", "Remove it: locks on GPUs lie there") from None


def _file_name(device: str) -> str:
    """Return the name of a device's lock; names of MIG instances may hold slashes."""
    return re.sub(r"[^\w-]", "_", device)


def _holder(path: Path) -> str:
    """Say who holds a lock, as they wrote it."""
    try:
        return on_one_line(path.read_text(encoding="utf-8", errors="replace")[:200]) or "another process"
    except OSError:
        return "another process"
