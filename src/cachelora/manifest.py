"""Manifests of model folders: what made them, and the proof that they are whole."""

import json
import os
import platform
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cachelora.errors import DamagedError
from cachelora.files import sha256_of, write_json

MANIFEST = "manifest.json"
_PACKAGES = (
    "cachelora",
    "numpy",
    "peft",
    "safetensors",
    "sentence-transformers",
    "tokenizers",
    "torch",
    "transformers",
)
_REMEDY = "Delete the folder and run again, or fetch it again as a binary file"


def write_manifest(folder: str | Path, config: Mapping[str, Any], inputs: Iterable[str | Path], started: float) -> None:
    """Describe and seal a model folder; to be called last.

    Parameters
    ----------
    folder : str or Path
        The folder, its files in place.
    config : mapping
        The settings that made it.
    inputs : iterable of str or Path
        The files that it was made of.
    started : float
        ``time.monotonic()`` at the start of the work, in seconds.
    """
    folder = Path(folder)
    # Names with a dot in front are what a killed job left unfinished.
    members = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    )
    write_json(
        folder / MANIFEST,
        {
            "files": {
                path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
                for path in members
            },
            "config": dict(config),
            "inputs": {str(path): sha256_of(path) for path in inputs},
            "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            "hardware": hardware(),
            "seconds": round(time.monotonic() - started, 1),
            # ru_maxrss is in KiB on Linux.
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        },
    )


def hardware() -> dict[str, Any]:
    """Describe the machine without naming it.

    Returns
    -------
    dict
        System, processor, number of usable CPUs, and the names of the GPUs.
    """
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def _processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def verify(folder: str | Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """Check that a model folder is what its manifest says.

    Parameters
    ----------
    folder : str or Path
        The folder.
    required : sequence of str
        Files that the manifest must list: those that are about to be read.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    DamagedError
        If the manifest or a file is missing or has another size or content, or a safetensors file does not match its
        own header.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DamagedError(str(folder), "no such folder", "Correct the path, or run the workflow that makes it")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in manifest["files"].items()}
        if not files:
            raise ValueError("no files")
    except FileNotFoundError as error:
        raise DamagedError(
            str(path),
            "no such file, so the folder is not finished",
            "Wait for the job that writes it, or run the workflow again",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedError(str(path), "it is no manifest", _REMEDY) from error
    for name in required:
        if name not in files:
            raise DamagedError(str(path), f"it does not list {name}", _REMEDY)
    for name, (sha256, size) in files.items():
        member = folder / name
        if not member.resolve().is_relative_to(folder.resolve()):
            raise DamagedError(str(path), f"it names a file outside its folder: {name}", "Do not use this folder")
        if not member.is_file():
            raise DamagedError(str(member), "no such file, though the manifest lists it", _REMEDY)
        # The header first: it says more about what went wrong than a digest does.
        if member.suffix == ".safetensors":
            check_safetensors(member)
        if member.stat().st_size != size:
            raise DamagedError(
                str(member), f"it holds {member.stat().st_size:,} bytes, the manifest says {size:,}", _REMEDY
            )
        if sha256_of(member) != sha256:
            raise DamagedError(str(member), "its SHA-256 is not the manifest's, so its content changed", _REMEDY)
    return manifest


def check_safetensors(path: str | Path) -> None:
    """Check that a safetensors file is as long as its header promises.

    The adapter that the seeds published fails this: its header promises 596,240 bytes, the file holds 596,235, because
    line-ending conversion removed bytes from it.

    Parameters
    ----------
    path : str or Path
        The file.

    Raises
    ------
    DamagedError
        If the header cannot be read or the file has another size.
    """
    path = Path(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # 100 MB is the format's own limit for a header.
            header = json.loads(stream.read(length)) if 0 < length <= min(size, 100_000_000) else None
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        promised = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DamagedError(str(path), "its safetensors header cannot be read", _REMEDY) from error
    if promised != size:
        raise DamagedError(
            str(path),
            f"its header promises {promised:,} bytes, the file holds {size:,}: it was cut, or a tool such as git "
            "converted line ends in it",
            "Fetch it again as a binary file (in git: '*.safetensors binary' in .gitattributes)",
        )
