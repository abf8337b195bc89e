"""What is said before a run on S3 starts: whether the store answers, lets us in, and holds the inputs."""

import posixpath
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from cachelora.errors import ConfigError, InputError, StorageError

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

CONNECT_SECONDS = 5
READ_SECONDS = 10
"""A store that takes longer is reported; the patience of the jobs' own transfers is Snakemake's."""

_KEYS = "SNAKEMAKE_STORAGE_S3_ACCESS_KEY and SNAKEMAKE_STORAGE_S3_SECRET_KEY (or what AWS's client reads)"
_WRONG_KEY = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "InvalidClientTokenId")
_MISSING = ("404", "NoSuchKey", "NotFound")


class StoreSettings(Protocol):
    """How a store is reached, as Snakemake's S3 plugin holds it; what is None is the AWS client's default."""

    endpoint_url: str | None
    region: str | None
    access_key: str | None
    secret_key: str | None
    token: str | None
    signature_version: str | None


def object_address(prefix: str, path: str) -> tuple[str, str]:
    """Say where Snakemake looks for a file.

    Parameters
    ----------
    prefix : str
        ``s3://BUCKET`` or ``s3://BUCKET/PREFIX``.
    path : str
        The file's path in the configuration.

    Returns
    -------
    bucket : str
        The bucket.
    key : str
        The object's key in it.
    """
    parts = urlsplit(prefix)
    return parts.netloc, posixpath.normpath(f"{parts.path}/{path}").lstrip("/")


def check_inputs(prefix: str, inputs: Mapping[str, str], settings: StoreSettings) -> None:
    """Check that a store can be used and holds the inputs of a run, within seconds.

    Parameters
    ----------
    prefix : str
        ``s3://BUCKET`` or ``s3://BUCKET/PREFIX``.
    inputs : mapping
        Keys of the configuration, and the paths that they name.
    settings : StoreSettings
        How the store is reached.

    Raises
    ------
    ConfigError
        If the prefix names no bucket.
    StorageError
        If the store does not answer, or refuses.
    InputError
        If an input is not there.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    bucket, start = object_address(prefix, "")
    if urlsplit(prefix).scheme != "s3" or not bucket:
        raise ConfigError("--default-storage-prefix", f"'{prefix}' names no bucket", "Give s3://BUCKET/PREFIX")
    address = settings.endpoint_url
    if address is not None and "@" in urlsplit(address).netloc:
        # Not shown: it would stand in logs.
        raise ConfigError("--storage-s3-endpoint-url", "it holds a user or a password", f"Set {_KEYS} instead")
    where = f"s3://{bucket}"
    try:
        client = boto3.client(
            "s3",
            endpoint_url=settings.endpoint_url,
            region_name=settings.region,
            aws_access_key_id=settings.access_key,
            aws_secret_access_key=settings.secret_key,
            aws_session_token=settings.token,
            config=Config(
                signature_version=settings.signature_version,
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                retries={"total_max_attempts": 2, "mode": "standard"},
            ),
        )
        where += f" at {client.meta.endpoint_url}"
        # Not HEAD: its answers have no body, and so no reason.
        listed = client.list_objects_v2(Bucket=bucket, Prefix=start, MaxKeys=1)
        # The client takes a page of a portal or a proxy for an empty list.
        if not listed.keys() & {"Name", "KeyCount", "IsTruncated"}:
            raise StorageError(
                where, "it answers, but not as S3 does", "Correct the address: --storage-s3-endpoint-url"
            )
        missing = {key: path for key, path in inputs.items() if not _holds(client, *object_address(prefix, path))}
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise StorageError(where, f"no credentials ({error})", f"Set {_KEYS}") from None
    except ClientError as error:
        raise _refusal(where, error) from None
    except RecursionError:
        # The client follows an endless redirect.
        raise StorageError(
            where, "it answers with redirects", "Use the address that it redirects to, https://"
        ) from None
    except BotoCoreError as error:
        raise StorageError(
            where,
            f"it does not answer ({error})",
            "Start it, or correct the address: --storage-s3-endpoint-url or SNAKEMAKE_STORAGE_S3_ENDPOINT_URL",
        ) from None
    if missing:
        key, path = next(iter(missing.items()))
        address = "s3://" + "/".join(object_address(prefix, path))
        others = f" (and {len(missing) - 1} more of {len(inputs)} inputs)" if len(missing) > 1 else ""
        raise InputError(
            key, f"no such object: {address}{others}", f"Put it there (aws s3 cp {path} {address}), or correct the path"
        )


def _holds(client: Any, bucket: str, key: str) -> bool:
    """Ask whether a store holds an object."""
    from botocore.exceptions import ClientError

    try:
        client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in _MISSING:
            return False
        raise
    return True


def _refusal(where: str, error: "ClientError") -> StorageError:
    """Say why a store refuses."""
    code, said = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
    if code == "NoSuchBucket":
        return StorageError(where, "no such bucket", "Make it and put the inputs there, or correct the prefix")
    what = f"it refuses with {code or 'an answer that is not S3'}" + (f" ({said.rstrip('.')})" if said else "")
    if code in _WRONG_KEY:
        return StorageError(where, what, f"Correct {_KEYS}")
    if code in ("AccessDenied", "403", "Forbidden"):
        return StorageError(where, what, "Give this key the right to list, read and write there, or use another")
    return StorageError(where, what, "Correct the address, the region and the keys of --storage-s3-*")
