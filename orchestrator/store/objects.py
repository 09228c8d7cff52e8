"""Objects under a URL, through fsspec: whole reads and writes, tried again while nobody answers.

`s3://` goes through Arrow's own client, which comes with pyarrow; other schemes through the package
that fsspec names for them. Errors say what to do, and never hold a credential.
"""

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from orchestrator.store.base import StoreUnreachable
from workers.errors import InvalidInput

CHUNK_BYTES = 8 * 2**20
CONNECT_SECONDS = 10
ANSWER_SECONDS = 60
"""Arrow's own 3 s are little for a busy server."""
PAUSES_SECONDS = (1.0, 3.0, 9.0)
"""Between tries of a request that nobody answered; the client itself tries three times each."""
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")

_REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN|SIGNATURE_DOES_NOT_MATCH|"
    r"MISSING_AUTHENTICATION|UNRECOGNIZED_CLIENT|EXPIRED|credential|HTTP status 40[013]|Forbidden",
    re.IGNORECASE,
)
_OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|bucket does not exist", re.IGNORECASE)
_CREDENTIALS = (
    "give credentials by environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), in "
    "~/.aws/credentials or by the machine's role, on every node; they must allow reading, "
    "writing, listing and deleting"
)

Answer = TypeVar("Answer")


class Objects:
    """The objects under a URL.

    Args:
        url: scheme, bucket and prefix, without a slash at the end.
        pauses: seconds between tries while nobody answers.

    Raises:
        InvalidInput: fsspec lacks a package for the scheme, or there is no such scheme.
    """

    def __init__(self, url: str, pauses: tuple[float, ...] = PAUSES_SECONDS) -> None:
        self.url, self.pauses = url, pauses
        self._files, self._prefix = _file_system(url)

    def read(self, name: str) -> bytes:
        """An object's bytes.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._ask(lambda: bytes(self._files.cat_file(self._place(name))))

    def write(self, name: str, content: bytes) -> None:
        """Make or replace an object, whole or not at all."""

        def write() -> None:
            with self._files.open(self._place(name), "wb") as target:
                target.write(content)

        self._ask(write)

    def upload(self, file: Path, name: str) -> None:
        """Make or replace an object from a file of this machine."""

        def upload() -> None:
            with file.open("rb") as source, self._files.open(self._place(name), "wb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)

        self._ask(upload)

    def download(self, name: str, file: Path) -> str:
        """Write an object to a file of this machine.

        Returns:
            SHA-256 of what arrived, as hex.

        Raises:
            FileNotFoundError: there is no such object.
        """

        def download() -> str:
            digest = hashlib.sha256()
            with self._files.open(self._place(name), "rb") as source, file.open("wb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
            return digest.hexdigest()

        return self._ask(download)

    def exists(self, name: str) -> bool:
        """Whether there is such an object, asked anew each time."""

        def exists() -> bool:
            self._files.invalidate_cache()
            return bool(self._files.exists(self._place(name)))

        return self._ask(exists)

    def names(self, folder: str) -> list[str]:
        """Names of the objects directly in a folder, asked anew each time."""

        def names() -> list[str]:
            self._files.invalidate_cache()
            found = self._files.ls(self._place(folder), detail=True)
            return [e["name"].rpartition("/")[2] for e in found if e["type"] == "file"]

        try:
            return self._ask(names)
        except FileNotFoundError:
            return []

    def delete(self, name: str) -> None:
        """Remove an object, if there is one."""
        try:
            self._ask(lambda: self._files.rm_file(self._place(name)))
        except FileNotFoundError:
            return

    def delete_folder(self, folder: str) -> None:
        """Remove every object under a folder."""
        try:
            self._ask(lambda: self._files.rm(self._place(folder), recursive=True))
        except FileNotFoundError:
            return

    def _place(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _ask(self, request: Callable[[], Answer]) -> Answer:
        for pause in (*self.pauses, None):
            try:
                return request()
            except FileNotFoundError:
                raise
            except (OSError, TimeoutError) as error:
                if error.filename is not None or error.errno in _OF_THIS_MACHINE:
                    raise
                if isinstance(error, PermissionError) or _REFUSED.search(str(error)):
                    raise InvalidInput(
                        f"the store {self.url} refuses us: {_brief(error)}",
                        remedy=_CREDENTIALS,
                    ) from None
                if _NO_BUCKET.search(str(error)):
                    raise InvalidInput(
                        f"the store {self.url} lies in a bucket that does not exist",
                        remedy="make the bucket, or mend the URL or AWS_ENDPOINT_URL",
                    ) from None
                if pause is None:
                    raise StoreUnreachable(
                        f"the store {self.url} does not answer{_endpoint_hint(self.url)}: "
                        f"{_brief(error)}"
                    ) from None
                time.sleep(pause)
        raise AssertionError("every way out of the last try is taken")


def endpoint(url: str) -> str:
    """The endpoint that answers for a URL, where the environment names one; else empty."""
    if urlsplit(url).scheme != "s3":
        return ""
    return next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")


def _file_system(url: str) -> tuple[Any, str]:
    scheme, _, place = url.partition("://")
    if scheme == "s3":
        return _arrow_s3(url), place
    import fsspec

    try:
        files, prefix = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InvalidInput(
            f"{scheme}:// needs a package that is not installed", f"--store {url}", str(error)
        ) from None
    except ValueError as error:
        raise InvalidInput(
            f"no store can be kept there: {error}",
            f"--store {url}",
            "name a folder, or an object store as in s3://bucket/prefix",
        ) from None
    return files, str(prefix).rstrip("/")


def _arrow_s3(url: str) -> Any:
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    options: dict[str, Any] = {}
    region = next((os.environ[name] for name in REGIONS if os.environ.get(name)), None)
    if own := endpoint(url):
        split = urlsplit(own if "://" in own else f"https://{own}")
        options = {"scheme": split.scheme, "endpoint_override": split.netloc}
        region = region or "us-east-1"
    elif region is None:
        try:
            region = resolve_s3_region(urlsplit(url).netloc)
        except OSError as error:
            if _NO_BUCKET.search(str(error)) or "not found" in str(error):
                raise InvalidInput(
                    f"there is no bucket {urlsplit(url).netloc}",
                    f"--store {url}",
                    "make the bucket, or name the endpoint of your own store in AWS_ENDPOINT_URL",
                ) from None
            raise StoreUnreachable(
                f"the store {url} does not answer{_endpoint_hint(url)}: {_brief(error)}"
            ) from None
    # Without delayed opening a small object takes three requests to write in place of one.
    files = S3FileSystem(
        region=region,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=ANSWER_SECONDS,
        allow_delayed_open=True,
        **options,
    )
    return ArrowFSWrapper(files)


def _endpoint_hint(url: str) -> str:
    own = endpoint(url)
    if own:
        host = urlsplit(own if "://" in own else f"https://{own}").netloc.rpartition("@")[2]
        return f" at {host} (AWS_ENDPOINT_URL)"
    return " (for a store of your own, name its endpoint in AWS_ENDPOINT_URL)"


def _brief(error: BaseException) -> str:
    """The first line of an error, without the object's name and the request's id."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"^When .*?: (?=AWS Error)|\s*\(Request ID: [^)]*\)", "", text.splitlines()[0])
