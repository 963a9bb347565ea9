"""Files of a shard set on a server: ranges of bytes, with retries, and whole files, with their hash checked.

fsspec speaks the protocols. What a server can do wrong is a range that fails (retried with backoff and jitter),
stalls (a timeout, then retried), is short (retried), or is not there (not retried: FileNotFoundError).
"""

import importlib
import logging
import os
from pathlib import Path
from typing import Any

import fsspec
import stamina

from data_pipelines.extras import install_packages
from data_pipelines.remote.cache import ChangedFileError, UnavailableError
from data_pipelines.shards.hashes import FileHash, hash_name_of

logger = logging.getLogger(__name__)

# Schemes, and the package that speaks each. None that starts programs (`pipe:`) or wraps another (`zip::`).
SCHEMES = {"https": "aiohttp", "http": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "file": None}
_CHUNK_BYTES = 8 * 2**20


class RemoteFolder:
    """The files of one URL. `stall_s` is how long a read may stand still, `attempts` how often it is tried."""

    def __init__(self, url: str, *, stall_s: float, attempts: int) -> None:
        if url.startswith("pipe:"):
            raise ValueError(
                f"{url}: a pipe would start whatever program a text names, and cannot be read from the middle, as an "
                "exact order and restart need: give the address that the program reads, or copy the tars"
            )
        scheme = url.partition("://")[0]
        if scheme not in SCHEMES or "::" in url:
            raise ValueError(f"{url}: expected a folder or a URL of {', '.join(SCHEMES)}")
        _need_package(url, scheme)
        self.url = url.rstrip("/")
        self._attempts = attempts
        # Instances are not shared with other users of fsspec, as these settings are ours.
        options = {"skip_instance_cache": True, **_timeouts(scheme, stall_s)}
        if scheme in ("http", "https"):
            from data_pipelines.remote.http_files import HttpFiles

            self._files, self._path = HttpFiles(**options), self.url
        else:
            self._files, self._path = fsspec.core.url_to_fs(self.url, **options)
        # Files of the hub are read through a buffer that would fetch 5 MiB more than is asked for.
        self._exactly = {"cache_type": "none"} if scheme == "hf" else {}

    def read(self, name: str, start: int, end: int, *, may_be_shorter: bool = False) -> bytes:
        """The bytes of file `name` from `start` to before `end`, or to its end where that may come first."""
        for attempt in stamina.retry_context(
            on=UnavailableError,
            attempts=self._attempts,
            timeout=None,
            wait_initial=0.1,
            wait_max=10.0,
            wait_jitter=1.0,
        ):
            with attempt:
                try:
                    data = bytes(self._files.cat_file(f"{self._path}/{name}", start=start, end=end, **self._exactly))
                    if len(data) != end - start and not may_be_shorter:
                        raise _ShortReadError(f"{len(data)} of {end - start} bytes")
                    return data
                except Exception as error:
                    if _is_missing(error):
                        raise FileNotFoundError(f"{self.url}/{name}: not found") from None
                    # Each protocol's library has its own errors; whatever it was, it is named and tried again.
                    reason = f"{self.url}/{name}: {type(error).__name__}: {error}".rstrip(": ")
                    logger.warning("attempt %d of %d: %s", attempt.num, self._attempts, reason)
                    raise UnavailableError(f"{reason} (given up after {self._attempts} attempts)") from error
        raise AssertionError("a retry loop ends by returning or raising")

    def read_whole(self, name: str, max_bytes: int) -> bytes:
        """All bytes of file `name`. Raises ValueError where they are more than `max_bytes`."""
        data = self.read(name, 0, max_bytes + 1, may_be_shorter=True)
        if len(data) > max_bytes:
            raise ValueError(f"{self.url}/{name}: more than the {max_bytes:,} bytes that it may have")
        return data

    def download_unknown(self, name: str, target: Path) -> None:
        """Writes file `name` to `target`, whatever its size and content."""
        size, num_new = 0, _CHUNK_BYTES
        with target.open("wb") as file:
            while num_new == _CHUNK_BYTES:
                # Again from the last byte that is here: to ask behind the end would be an error.
                known = min(size, 1)
                data = self.read(name, size - known, size + _CHUNK_BYTES, may_be_shorter=True)[known:]
                num_new = file.write(data)
                size += num_new

    def download(self, name: str, target: Path, *, num_bytes: int, file_hash: str) -> None:
        """Writes file `name` to `target`, which must exist with `num_bytes`, and waits until it is on the disk.

        Raises ChangedFileError when the file has other bytes than those of the manifest.
        """
        digest = FileHash(hash_name_of(file_hash))
        with target.open("r+b") as file:
            for start in range(0, num_bytes, _CHUNK_BYTES):
                data = self.read(name, start, min(start + _CHUNK_BYTES, num_bytes))
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if str(digest) != file_hash:
            raise ChangedFileError(f"{self.url}/{name}: has changed: its hash is not that of the manifest")


class _ShortReadError(OSError):
    """Fewer bytes than were asked for."""


def _is_missing(error: Exception) -> bool:
    """Whether a server said that there is no such file; huggingface_hub has an error of its own for that."""
    return isinstance(error, FileNotFoundError) or getattr(getattr(error, "response", None), "status_code", 0) == 404


def _need_package(url: str, scheme: str) -> None:
    """Raises ValueError where the package that speaks `scheme` is not here, or cannot be imported."""
    package = SCHEMES[scheme]
    if package is None:
        return
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{url}: {scheme}:// needs {package} ({error}); {install_packages(package)}") from error


def _timeouts(scheme: str, stall_s: float) -> dict[str, Any]:
    """fsspec's options that bound how long a connection may stand still, where the protocol's library has some."""
    if scheme in ("http", "https", "gs"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
        if scheme == "gs":
            return {"requests_timeout": timeout}
        # The environment's http_proxy, https_proxy and no_proxy, as other programs take them.
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    if scheme == "s3":
        return {"config_kwargs": {"connect_timeout": stall_s, "read_timeout": stall_s}}
    return {}
