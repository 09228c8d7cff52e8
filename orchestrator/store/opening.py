"""From what a person writes after `--store` to the store: a folder, or a URL of an object store."""

import os
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from orchestrator.store.base import Store
from orchestrator.store.local import LocalStore
from workers.errors import InvalidInput

READ_ONLY = ("http", "https", "ftp", "ftps", "data", "github", "git", "zip", "tar")
SURROUNDINGS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "LAYERSWEEP_CACHE",
    "LAYERSWEEP_CACHE_GB",
)


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL, and not a folder."""
    return "://" in str(location)


def open_store(location: str | Path, *, new: bool = True) -> Store:
    """The store at a folder or a URL such as `s3://bucket/prefix`.

    A process has one connection to an object store, which remembers what is here and sound.

    Args:
        location: folder or URL.
        new: make a folder that is missing.

    Raises:
        InvalidInput: it cannot be opened or written, or the URL is of a kind that must not be used.
        StoreUnreachable: an object store does not answer.
    """
    if not is_url(location):
        return LocalStore(Path(location), new=new)
    url = urlsplit(str(location))
    if url.scheme == "file":
        return LocalStore(Path(url.path), new=new)
    if "@" in url.netloc:
        bare = urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2]))
        raise InvalidInput(
            "the URL of the store holds a user or password, which would end in logs and artefacts",
            f"--store {bare}",
            "give the credentials by environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or in "
            "~/.aws/credentials",
        )
    if url.query or url.fragment:
        bare = urlunsplit(url._replace(query="", fragment=""))
        raise InvalidInput(
            "the URL of the store has a query or fragment",
            f"--store {bare}",
            "leave out what follows ? or #; an endpoint is given by AWS_ENDPOINT_URL",
        )
    if url.scheme == "memory":
        raise InvalidInput(
            "a store in memory is seen by one process alone",
            f"--store {location}",
            "name a folder or an object store",
        )
    if url.scheme in READ_ONLY or not url.netloc:
        raise InvalidInput(
            "no store can be kept there",
            f"--store {location}",
            "name a folder, or an object store as in s3://bucket/prefix",
        )
    surroundings = tuple(os.environ.get(name) for name in SURROUNDINGS)
    return _connected(str(location).rstrip("/"), surroundings)


@lru_cache(maxsize=8)
def _connected(location: str, surroundings: tuple[str | None, ...]) -> Store:
    del surroundings  # another endpoint or cache is another connection
    from orchestrator.store.remote import RemoteStore

    return RemoteStore(location)
