"""Object stores, through obstore: S3 and what speaks like it, Google's and Azure's.

A key is a path from the bucket, a folder what begins with it and a slash. obstore asks again by itself where a server
is busy or a connection breaks, and goes on where a stream was. Credentials are those that each of these worlds has in
its environment and files; they are looked up in each process, and never are a part of a Place.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from converter.errors import BadFile, BadRequest, OutputRefused, SystemRefused, Unsupported, WconvError
from converter.storage.base import FileRef, Info, OpenFile, Place, Tag, changed
from converter.storage.far import PART_NBYTES, FarFile, Receipt, WritableStore, Writer, mark_of, nbytes_of, tag_of

if TYPE_CHECKING:
    from obstore import WritableFile
    from obstore.store import ObjectStore as Client

_STREAMED_NBYTES = 1 << 20
_MOST_PARTS = 9_000  # S3 takes 10,000
_PARTS_AT_ONCE = 3
_NOTE = "wconv-plan"
# obstore's own limit is 30 s for a whole request, and streams take minutes. A server that says nothing is given up.
_SILENT = timedelta(seconds=60)
_FOREVER = timedelta(days=7)
_RETRIES = 10
_RETRY_SECONDS = 180


class _Kind(NamedTuple):
    """A kind of object store: obstore's class, what its users have to set, and what says where another server is."""

    store: str
    whose: str
    credentials: str
    endpoints: tuple[str, ...]


_KINDS = {
    "s3": _Kind("S3Store", "S3", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile with AWS_PROFILE.",
                ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")),
    "gs": _Kind("GCSStore", "Google Cloud Storage", "Let GOOGLE_APPLICATION_CREDENTIALS name a key file, or run"
                " 'gcloud auth application-default login'.", ("GOOGLE_BASE_URL",)),
    "az": _Kind("AzureStore", "Azure", "Set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or"
                " AZURE_STORAGE_SAS_TOKEN, or run 'az login' and set AZURE_USE_AZURE_CLI=1.",
                ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURITE_BLOB_STORAGE_URL")),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ObjectStore(WritableStore):
    """A bucket, or a container of Azure's."""

    scheme: str
    bucket: str

    keeps_notes = True

    def spell(self, key: str) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{key}" if key not in ("", ".") else "")

    def look(self, key: str) -> Info | None:
        """Ask for an object, and where there is none, whether names of others begin so."""
        found = self.look_at_file(key) if key not in ("", ".") else None
        return found or (Info("folder", 0, "") if self._entries("" if key == "." else key) else None)

    def look_at_file(self, key: str) -> Info | None:
        """Ask for an object, and for nothing else."""
        import obstore

        try:
            with self._worded(key):
                return _info_of(obstore.head(self._client(), key))
        except FileNotFoundError:
            return None

    def look_in(self, key: str) -> dict[str, Info]:
        import obstore

        with self._worded(key):
            found = obstore.list_with_delimiter(self._client(), key or None)
        entries = {name.rstrip("/").rpartition("/")[2]: Info("folder", 0, "") for name in found["common_prefixes"]}
        # What some programs write to have a folder: an object whose name is that of one.
        objects = ((one["path"].rpartition("/")[2], one) for one in found["objects"] if one["path"] != key)
        return entries | {name: _info_of(one) for name, one in objects if name and name not in entries}

    def open(self, place: Place, tag: Tag | None) -> OpenFile:
        if tag is None:
            tag = self.found(place).tag
        assert isinstance(tag, str)
        return _File(FileRef(place, tag), nbytes_of(tag))

    def note_of(self, key: str) -> str:
        """Give the note that a file was written with; nothing for one that has none, or is not there."""
        import obstore

        try:
            with self._worded(key):
                return obstore.get(self._client(), key, options={"head": True}).attributes.get(_NOTE, "")
        except FileNotFoundError:
            return ""

    @contextmanager
    def writer(self, key: str, nbytes: int, note: str) -> Iterator[Writer]:
        import obstore

        part_nbytes = max(PART_NBYTES, -(-nbytes // _MOST_PARTS))
        with self._worded(key), obstore.open_writer(
            self._client(), key, attributes={_NOTE: note}, buffer_size=part_nbytes, max_concurrency=_PARTS_AT_ONCE
        ) as file:  # aborts what it has begun after an error
            writer = _Writer(file)
            yield writer
        writer.receipt = Receipt(key, nbytes)

    def withdraw(self, keys: Sequence[str]) -> None:
        import obstore

        for key in keys:
            try:
                with self._worded(key):
                    obstore.delete(self._client(), key)
            except FileNotFoundError:
                pass
        self.snapshot.forget()

    def publish(
        self,
        key: str,
        written: Sequence[Receipt],
        texts: Sequence[tuple[str, bytes, str]],
        removed: Sequence[str],
        message: str,
        replaces: bool,
    ) -> str:
        import obstore

        self.withdraw(removed)
        for name, content, note in texts:
            # What a run of ours that was stopped has written is written again.
            may_replace = replaces or self.note_of(name) == note
            mode: Literal["overwrite", "create"] = "overwrite" if may_replace else "create"
            with self._worded(name):
                obstore.put(self._client(), name, content, attributes={_NOTE: note}, mode=mode, use_multipart=False)
        self.snapshot.forget()
        return ""

    def try_to_write(self, key: str) -> None:
        import obstore

        class Stop(Exception):
            """Aborts what was begun."""

        name = f"{key}/.wconv-{os.urandom(8).hex()}"
        try:
            with self._worded(key), obstore.open_writer(self._client(), name, buffer_size=PART_NBYTES) as file:
                file.write(bytes(PART_NBYTES + 1))
                file.flush()
                raise Stop
        except Stop:
            pass

    def _client(self) -> Client:
        asked = frozenset(item for item in os.environ.items() if item[0].startswith(("AWS_", "GOOGLE_", "AZUR")))
        return _client(self.scheme, self.bucket, asked)

    @contextmanager
    def _worded(self, key: str) -> Iterator[None]:
        """Say in one line what obstore says in twenty; FileNotFoundError for what is not there."""
        from obstore.exceptions import AlreadyExistsError, BaseError, InvalidPathError, NotFoundError, PreconditionError

        place = Place(self, key)
        try:
            yield
        except WconvError:
            raise
        except PreconditionError:
            raise changed(place) from None
        except AlreadyExistsError:
            problem = "was made while this ran"
            raise OutputRefused(place, problem, "Use --overwrite to replace it, or another -o.") from None
        except InvalidPathError:
            raise BadRequest(place, "is no name that an object can have", "Name another.") from None
        except NotFoundError as error:
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                raise self._refused(place, str(error)) from None
            raise FileNotFoundError(str(place)) from None
        except BaseError as error:
            raise self._refused(place, str(error)) from None

    def _refused(self, place: Place, text: str) -> SystemRefused:
        """Word what a server has answered. The text has requests, keys and signatures, of which nothing is passed on."""
        kind = _KINDS[self.scheme]
        head = text.partition("Debug source")[0]
        code = re.search(r"<Code>(\w{1,60})</Code>", head)
        status = re.search(r"status code: (\d{3}[ \w]{0,40})", head)
        tries = re.search(r"after (\d+) retries", head)
        known = code[1] if code else status[1].strip() if status else ""
        if known in ("NoSuchBucket", "ContainerNotFound") or (status and status[1][:3] == "404"):
            bucket = f"{self.scheme}://{self.bucket}"
            return SystemRefused(bucket, "is not there", "Check its name, and AWS_REGION." if self.scheme == "s3" else "")
        if "169.254.169.254" in head or "metadata.google" in head or "MissingAccount" in text:
            return SystemRefused(place, f"needs credentials of {kind.whose}, and there are none", kind.credentials)
        if status and status[1][:3] in ("401", "403"):
            return SystemRefused(place, f"is refused by {kind.whose} ({known})", kind.credentials)
        if status:
            what = f"{kind.whose} answers {known}"
        else:
            what = f"{kind.whose} does not answer"
        after = f", after {int(tries[1]) + 1} tries" if tries else ""
        return SystemRefused(place, f"cannot be reached: {what}{after}", "Run this again; what is whole is kept.")


class _Writer:
    """Takes the bytes of a file that goes up in parts."""

    receipt: Receipt | None = None

    def __init__(self, file: WritableFile) -> None:
        self._file = file

    def write(self, data: memoryview) -> None:
        self._file.write(bytes(data))  # what it is given it keeps, and sends later


class _File(FarFile):
    def fetches(self, begin: int, end: int) -> Iterator[memoryview]:
        import obstore

        place = self.ref.place
        store = place.store
        assert isinstance(store, ObjectStore) and isinstance(self.ref.tag, str)
        options: dict[str, Any] = {"range": (begin, end)}
        if mark := mark_of(self.ref.tag):
            options["if_match"] = mark
        try:
            with store._worded(place.key):
                for chunk in obstore.get(store._client(), place.key, options=options).stream(_STREAMED_NBYTES):  # type: ignore[arg-type]
                    yield memoryview(chunk)
        except FileNotFoundError:
            raise changed(place) from None


def _info_of(meta: Any) -> Info:
    nbytes = int(meta["size"])
    when = int(meta["last_modified"].timestamp() * 1e9)
    return Info("file", nbytes, tag_of(nbytes, meta["e_tag"]), when, when)


def open_url(url: str) -> Place:
    """Give the place that a URL of a bucket names. Raises BadRequest for one that names none."""
    scheme, _, rest = url.partition("://")
    scheme = {"s3a": "s3", "gcs": "gs", "abfs": "az", "azure": "az"}.get(scheme.lower(), scheme.lower())
    bucket, _, key = rest.partition("/")
    parts = key.rstrip("/").split("/") if key.rstrip("/") else []
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{1,221}", bucket):
        raise BadRequest(url, "names no bucket", f"It is spelled {scheme}://bucket/folder.")
    if any(part in ("", ".", "..") or not part.isprintable() for part in parts):
        raise BadRequest(url, "has a part that no folder has", "Name it plainly.")
    check_installed(url)
    return Place(ObjectStore(scheme, bucket), "/".join(parts) or ".")


def check_installed(url: str) -> None:
    """Raise Unsupported where the library is missing."""
    try:
        import obstore  # noqa: F401
    except ImportError:
        raise Unsupported(url, "needs obstore, which is not installed here", "pip install 'wconv[remote]'") from None


@lru_cache(64)
def _client(scheme: str, bucket: str, _: frozenset[tuple[str, str]]) -> Client:
    """Give what speaks with a bucket; each process makes its own, from what its environment says."""
    from obstore import store

    kind = _KINDS[scheme]
    endpoint = next(filter(None, map(os.environ.get, kind.endpoints)), "")
    is_plain = endpoint.lower().startswith("http://")
    config: dict[str, Any] = {}
    if scheme == "s3":
        # TLS protects what is sent; where there is none, a signature does, for twice the processor time.
        config = {"unsigned_payload": not is_plain, **_profile()}
        if endpoint:
            config["endpoint"] = endpoint
    options = {"allow_http": is_plain, "timeout": _FOREVER, "read_timeout": _SILENT, "connect_timeout": _SILENT}
    retries = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)}
    made: Client = getattr(store, kind.store)(bucket, config=config, client_options=options, retry_config=retries)
    return made


def _profile() -> dict[str, Any]:
    """Give the keys of a profile of AWS, where the environment has none; what is more than keys is left to boto3.

    As in boto3 (``credentials.py`` of botocore), the environment goes before files unless a profile is named.
    """
    named = os.environ.get("AWS_PROFILE", "")
    if "AWS_ACCESS_KEY_ID" in os.environ and not named:
        return {}
    where = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
    files = [Path(os.environ.get(name, usual)).expanduser() for name, usual in where.items()]
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read(files, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        raise BadFile(files[0], "cannot be read as profiles of AWS", "Mend it, or set AWS_ACCESS_KEY_ID.") from None
    name = named or "default"
    found: dict[str, str] = {}
    for section in (name, f"profile {name}"):
        found |= dict(parser[section]) if parser.has_section(section) else {}
    if named and not found:
        raise SystemRefused(f"profile {name}", "is in none of the files of AWS", f"They are {files[0]} and {files[1]}.")
    known = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token", "region", "endpoint_url")
    config = {key.removesuffix("_url"): found[key] for key in known if key in found}
    if "AWS_REGION" in os.environ or "AWS_DEFAULT_REGION" in os.environ:
        config.pop("region", None)
    if found and "aws_access_key_id" not in found and any(key in found for key in _MORE_THAN_KEYS):
        config |= _by_boto3(name)
    return config


_MORE_THAN_KEYS = ("sso_session", "sso_start_url", "role_arn", "credential_process", "source_profile")


def _by_boto3(profile: str) -> dict[str, Any]:
    try:
        import boto3
    except ImportError:
        problem = "signs in by more than a key, which takes boto3, and that is not installed here"
        raise Unsupported(f"profile {profile}", problem, "pip install boto3") from None
    frozen = boto3.Session(profile_name=profile).get_credentials().get_frozen_credentials()
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    return {name: value for name, value in zip(names, frozen, strict=False) if value}
