"""Optional packages, and files that come inside packages, such as model weights from the package index."""

from importlib.metadata import PackageNotFoundError, files, version
from importlib.util import find_spec
from pathlib import Path

from cachelora.errors import EngineError, ModelError


def package_file(package: str, pattern: str) -> Path:
    """Find the one file of an installed package that fits a pattern.

    Parameters
    ----------
    package : str
        Name of the package, as pip knows it.
    pattern : str
        Pattern of the file's name, such as ``*.gguf``.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ModelError
        If the package is not installed, or holds none or several such files.
    """
    try:
        members = files(package) or []
    except (PackageNotFoundError, ValueError) as error:
        raise ModelError(
            f"package:{package}", "this package is not installed", "Install it here, as the files in requirements/ do"
        ) from error
    found = [Path(member.locate()) for member in members if member.match(pattern)]
    if len(found) != 1:
        raise ModelError(
            f"package:{package}",
            f"it holds {len(found)} files of the form {pattern}",
            "Name another package, or a path",
        )
    return found[0]


def require_packages(engine: str, *packages: str) -> None:
    """Check that the packages of an engine are installed.

    Parameters
    ----------
    engine : str
        Its type.
    *packages : str
        What it needs.

    Raises
    ------
    EngineError
        If one is not installed.
    """
    for package in packages:
        if find_spec(package) is None:
            raise EngineError(
                f"engine {engine}",
                f"the package {package} is not installed here",
                f"Install it with: .venv/bin/pip install -r requirements/{engine}.txt",
            )


def installed_version(*distributions: str) -> str:
    """Return the version of a package that may go by several names.

    Parameters
    ----------
    *distributions : str
        The names that pip knows it by.

    Returns
    -------
    str
        Name and version of the first that is installed, or the first name with ``(not installed)``.
    """
    for name in distributions:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return f"{distributions[0]} (not installed)"
