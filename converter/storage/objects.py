"""Object stores, through obstore: S3 and what speaks like it, Google's and Azure's.

A key is a path from the bucket, a folder what begins with it and a slash. obstore asks again by itself where a server
is busy or a connection breaks, and goes on where a stream was. Credentials are those that each of these worlds has in
its environment and files; they are looked up in each process, and never are a part of a Place. Where there are none,
that is said at once: only a machine of these clouds is asked for its own.
"""

from __future__ import annotations

import configparser
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from converter.errors import BadFile, BadRequest, OutputRefused, Unreachable, Unsupported, WconvError
from converter.storage.base import FileRef, Info, OpenFile, Place, changed, hold_installed, without_secrets
from converter.storage.far import (
    PART_NBYTES,
    FarFile,
    Publication,
    Receipt,
    WritableStore,
    Writer,
    mark_of,
    nbytes_of,
    tag_of,
)

if TYPE_CHECKING:
    from obstore import WritableFile
    from obstore.store import ObjectStore as Client

_T = TypeVar("_T")
_STREAMED_NBYTES = 1 << 20
_MOST_PARTS = 9_000  # S3 takes 10,000
_PARTS_AT_ONCE = 3
_NOTE = "wconvplan"  # one word of letters: Azure takes no others
# obstore's own limit is 30 s for a whole request, and streams take minutes. A server that says nothing is given up.
_SILENT = timedelta(seconds=60)
_CONNECTING = timedelta(seconds=10)
_FOREVER = timedelta(days=7)
# Some 20 s in all, and 40 at most, for a server that is busy or away; obstore's own steps are over in 3.
_RETRIES = 10
_RETRY_SECONDS = 180
_FIRST_WAIT, _GROWTH, _LONGEST_WAIT = 0.5, 3, 4.0
_BREAKS = 3  # a short answer that breaks off is asked for so often: obstore begins again only before one
_METADATA = "http://169.254.169.254"  # where a machine of a cloud learns who it is
_METADATA_SECONDS = 1


class _Kind(NamedTuple):
    """A kind of object store: obstore's class, what its users have to set, and what says where another server is.

    ``signs`` are the variables that say who asks, or that nobody need say so.
    """

    store: str
    whose: str
    credentials: str
    endpoints: tuple[str, ...]
    signs: str


_KINDS = {
    "s3": _Kind("S3Store", "S3", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile with AWS_PROFILE.",
                ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
                r"AWS_(ACCESS_KEY_ID|WEB_IDENTITY_TOKEN_FILE|CONTAINER_\w+|SKIP_SIGNATURE)"),
    "gs": _Kind("GCSStore", "Google Cloud Storage", "Let GOOGLE_APPLICATION_CREDENTIALS name a key file, or run"
                " 'gcloud auth application-default login'.", ("GOOGLE_BASE_URL",),
                r"GOOGLE_(SERVICE_ACCOUNT\w*|APPLICATION_CREDENTIALS|SKIP_SIGNATURE)"),
    "az": _Kind("AzureStore", "Azure", "Set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or"
                " AZURE_STORAGE_SAS_TOKEN, or run 'az login' and set AZURE_USE_AZURE_CLI=1.",
                ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURITE_BLOB_STORAGE_URL"),
                r"AZURE_\w*(KEY|SAS|TOKEN|SECRET|CLI|SIGNATURE|EMULATOR)\w*|(IDENTITY|MSI)_ENDPOINT"),
}  # fmt: skip
# What servers call it when they do not know who asks, or not any more; S3's status is 400 for some.
_UNKNOWN = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
# What goes into headers, or is signed with them.
_SENT = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION")
_ELSEWHERE = ("PermanentRedirect", "AuthorizationHeaderMalformed")

# What follows an address that somebody has signed for others.
_SIGNED = re.compile(r"[?&](sig|signature|x-(amz|goog)-[\w-]+|awsaccesskeyid|googleaccessid)=", re.IGNORECASE)


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
        import obstore

        info = None
        if key not in ("", "."):
            with suppress(FileNotFoundError), self._worded(key):
                info = _info_of(_insist(obstore.head, self._client(), key))
        if info is not None and info.nbytes:
            return info
        # An object of no bytes may be all that a folder of another program is.
        return Info("folder", 0, "") if self._entries("" if key == "." else key) else info

    def look_in(self, key: str) -> dict[str, Info]:
        import obstore

        with self._worded(key):
            found = _insist(obstore.list_with_delimiter, self._client(), key or None)
        folders = (name.rstrip("/").rpartition("/")[2] for name in found["common_prefixes"])
        entries = {name: Info("folder", 0, "") for name in folders if name}
        # What some programs write to have a folder: an object whose name is that of one.
        objects = ((one["path"].rpartition("/")[2], one) for one in found["objects"] if one["path"] != key)
        return entries | {name: _info_of(one) for name, one in objects if name and name not in entries}

    def opened(self, ref: FileRef, tag: str) -> OpenFile:
        return _File(ref, nbytes_of(tag))

    def note_of(self, key: str) -> str:
        """Give the note that a file was written with; nothing for one that has none, or is not there."""
        stored = self.stored(key)
        return stored[1] if stored else ""

    def stored(self, key: str) -> tuple[Info, str] | None:
        import obstore

        try:
            with self._worded(key):
                found = _insist(obstore.get, self._client(), key, options={"head": True})
        except FileNotFoundError:
            return None
        return _info_of(found.meta), found.attributes.get(_NOTE, "")

    @contextmanager
    def writer(self, key: str, nbytes: int, note: str) -> Iterator[Writer]:
        import obstore

        part_nbytes = max(PART_NBYTES, -(-nbytes // _MOST_PARTS))
        with self._worded(key):
            file = obstore.open_writer(
                self._client(), key, attributes={_NOTE: note}, buffer_size=part_nbytes, max_concurrency=_PARTS_AT_ONCE
            )
        writer = _Writer(self, key, file)
        try:
            yield writer
        except BaseException as error:
            writer.abort(error)
            raise
        try:
            with self._worded(key):
                file.close()  # which aborts where it fails
        except (FileNotFoundError, Unreachable) as error:
            # Where only the last answer was lost, all is there, and nothing is left to be aborted.
            if not isinstance(error, FileNotFoundError | _BrokenError) or self.note_of(key) != note:
                raise self._refused(Place(self, key), "") if isinstance(error, FileNotFoundError) else error from None
        writer.receipt = Receipt(key, nbytes)

    def withdraw(self, keys: Sequence[str]) -> None:
        import obstore

        for key in keys:
            with suppress(FileNotFoundError), self._worded(key):
                _insist(obstore.delete, self._client(), key)
        self.snapshot.forget()

    def publish(self, what: Publication) -> str:
        import obstore

        self.withdraw(what.removed)
        for name, content, note in what.texts:
            # What a run of ours that was stopped has written is written again.
            may_replace = what.replaces or self.note_of(name) == note
            mode: Literal["overwrite", "create"] = "overwrite" if may_replace else "create"
            try:
                with self._worded(name):
                    options: dict[str, Any] = {"attributes": {_NOTE: note}, "mode": mode, "use_multipart": False}
                    _insist(obstore.put, self._client(), name, content, **options)
            except OutputRefused:
                if self.note_of(name) != note:  # else it is ours, and the answer was lost
                    raise
        self.snapshot.forget()
        return ""

    def try_to_write(self, key: str) -> None:
        class Stop(Exception):
            """Aborts what was begun."""

        name = f"{'' if key == '.' else key + '/'}.wconv-{os.urandom(8).hex()}"
        with suppress(Stop), self.writer(name, 0, "") as file:
            file.write(memoryview(bytes(PART_NBYTES + 1)))
            raise Stop

    def _client(self) -> Client:
        asked = frozenset(item for item in os.environ.items() if item[0].startswith(("AWS_", "GOOGLE_", "AZUR")))
        return _client(self.scheme, self.bucket, asked)

    @contextmanager
    def _worded(self, key: str) -> Iterator[None]:
        """Say in one line what obstore says in twenty; FileNotFoundError for what is not there."""
        from obstore.exceptions import AlreadyExistsError, BaseError, InvalidPathError, PreconditionError

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
            problem = "holds an object whose name has an empty part or control characters"
            raise BadFile(place, problem, "Rename it, or copy what is meant elsewhere.") from None
        except ValueError as error:
            if "parse path" not in str(error):
                raise
            raise BadRequest(place, "is no name that an object can have", "Name another.") from None
        except FileNotFoundError as error:
            if any(code in str(error) for code in _NO_BUCKET):
                raise self._refused(place, str(error)) from None
            raise FileNotFoundError(str(place)) from None
        except (BaseError, OSError) as error:  # writers raise the latter
            raise self._refused(place, str(error)) from None

    def _refused(self, place: Place, text: str) -> Unreachable:
        """Word what a server has answered; nothing is passed on of the text, which has requests and signatures."""
        kind = _KINDS[self.scheme]
        head = text.partition("Debug source")[0]
        code = re.search(r"<Code>(\w{1,60})</Code>", head)
        status = re.search(r"status code: (\d{3}[ \w]{0,40})", head)
        tries = re.search(r"after (\d+) retries", head)
        known = code[1] if code else status[1].strip() if status else ""
        if known in _NO_BUCKET or (status and status[1][:3] == "404"):
            bucket = f"{self.scheme}://{self.bucket}"
            return Unreachable(bucket, "is not there", "Check its name, and AWS_REGION." if self.scheme == "s3" else "")
        if "MissingAccount" in text or "InstanceCredential" in text or any(host in head for host in _METADATA_HOSTS):
            return self._unsigned(place)
        if known in _ELSEWHERE or "Received redirect" in head:
            advice = "Set AWS_REGION to that of the bucket." if self.scheme == "s3" else "Check the endpoint."
            return Unreachable(place, "is in another region", advice)
        if known in _UNKNOWN or (status and status[1][:3] in ("401", "403")):
            return Unreachable(place, f"is refused by {kind.whose} ({known})", kind.credentials)
        if status:
            what = f"{kind.whose} answers {known}"
        elif _is_broken(text) and "HTTP error" not in head:
            what = f"{kind.whose} gives an answer that cannot be read"
        else:
            what = f"{kind.whose} does not answer"
        after = f", after {int(tries[1]) + 1} tries" if tries else ""
        made = _BrokenError if _is_broken(text) else Unreachable
        return made(place, f"cannot be reached: {what}{after}", "Run this again.")

    def _unsigned(self, place: Place | str) -> Unreachable:
        kind = _KINDS[self.scheme]
        return Unreachable(place, f"needs credentials of {kind.whose}, and there are none", kind.credentials)


class _BrokenError(Unreachable):
    """An answer broke off, and nobody knows what has become of the question."""


_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_METADATA_HOSTS = ("169.254.169.254", "metadata.google")


def _is_broken(text: str) -> bool:
    """Say whether an error is one that obstore takes for the last word, and is none."""
    head = text.partition("Debug source")[0]
    return not any(words in head for words in ("retries", "status code", "Received redirect", "credential"))


def _insist(function: Callable[..., _T], *args: Any, **options: Any) -> _T:
    """Ask what can be asked twice, and again where an answer broke off."""
    from obstore.exceptions import GenericError

    for attempt in range(1, _BREAKS):
        try:
            return function(*args, **options)
        except GenericError as error:
            if not _is_broken(str(error)):
                raise
        time.sleep(_FIRST_WAIT * attempt)
    return function(*args, **options)


class _Writer:
    """Takes the bytes of a file that goes up in parts."""

    receipt: Receipt | None = None

    def __init__(self, store: ObjectStore, key: str, file: WritableFile) -> None:
        self._store = store
        self._key = key
        self._file = file

    def write(self, data: memoryview) -> None:
        with self._store._worded(self._key):
            self._file.write(bytes(data))  # what it is given it keeps, and sends later

    def abort(self, error: BaseException) -> None:
        """Have what was begun forgotten, as far as that can be; what counts is the error that led here."""
        with suppress(Exception):  # a writer that has failed has done so itself
            self._file.__exit__(type(error), error, error.__traceback__)


class _File(FarFile):
    def fetches(self, begin: int, end: int) -> Iterator[memoryview]:
        import obstore

        place = self.ref.place
        store = place.store
        assert isinstance(store, ObjectStore)
        assert isinstance(self.ref.tag, str)
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
    if _SIGNED.search(key):
        raise BadRequest(
            without_secrets(url), "has a signature, which is a secret", f"Leave it out. {_KINDS[scheme].credentials}"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{1,221}", bucket, re.ASCII):
        # Keys have slashes.
        shown = f"{scheme}://{rest.rpartition('@')[2]}" if ":" in bucket else url
        raise BadRequest(shown, "names no bucket", f"It is spelled {scheme}://bucket/folder.")
    if any(part in ("", ".", "..") or not part.isprintable() for part in parts):
        raise BadRequest(url, "has a part that no folder has", "Name it plainly.")
    if scheme == "az" and "\\" in key:  # which would come out as a slash there
        raise BadRequest(url, "has a backslash, which Azure takes for a slash", "Name it plainly.")
    hold_installed(url, "remote", "obstore")
    return Place(ObjectStore(scheme, bucket), "/".join(parts) or ".")


@lru_cache(64)
def _client(scheme: str, bucket: str, _: frozenset[tuple[str, str]]) -> Client:
    """Give what speaks with a bucket; each process makes its own, from what its environment says."""
    from obstore import store
    from obstore.exceptions import BaseError

    kind = _KINDS[scheme]
    config: dict[str, Any] = _profile() if scheme == "s3" else {}
    endpoint = next(filter(None, map(os.environ.get, kind.endpoints)), "") or config.get("endpoint", "")
    _check_settings(kind, endpoint, config)
    is_plain = endpoint.lower().startswith("http://")
    if scheme == "s3":
        # TLS protects what is sent; where there is none, a signature does, for twice the processor time.
        config["unsigned_payload"] = not is_plain
        if endpoint:
            config["endpoint"] = endpoint
    if not _can_sign(scheme, config):
        raise ObjectStore(scheme, bucket)._unsigned(f"{scheme}://{bucket}")
    options = {"allow_http": is_plain, "timeout": _FOREVER, "read_timeout": _SILENT, "connect_timeout": _CONNECTING}
    waits = {"init_backoff": _FIRST_WAIT, "max_backoff": _LONGEST_WAIT}
    backoff = {**{name: timedelta(seconds=seconds) for name, seconds in waits.items()}, "base": _GROWTH}
    retries = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS), "backoff": backoff}
    try:
        made: Client = getattr(store, kind.store)(bucket, config=config, client_options=options, retry_config=retries)
    except BaseError:  # what it says may hold what was set
        problem = (
            f"cannot be asked: of what is set for {kind.whose}, or lies where that says, something is not as it must be"
        )
        raise Unreachable(f"{scheme}://{bucket}", problem, kind.credentials) from None
    return made


def _check_settings(kind: _Kind, endpoint: str, config: Mapping[str, Any]) -> None:
    """Raise Unreachable for what would have obstore panic."""
    if endpoint and not re.match(r"https?://[^\s/]", endpoint, re.IGNORECASE):
        name = next(filter(os.environ.get, kind.endpoints), "endpoint_url")
        raise Unreachable(name, "names no server", "It is spelled https://host.")
    known = {**{name: os.environ.get(name, "") for name in _SENT}, **config}
    for name, value in known.items():
        if isinstance(value, str) and not re.fullmatch("[ -~]*", value):
            raise Unreachable(name, "has characters that no such thing has, such as the end of a line", "Set it anew.")


def _can_sign(scheme: str, config: dict[str, Any]) -> bool:
    """Say whether anything tells who asks: variables, files, or the machine, where it is one of a cloud."""
    if "aws_access_key_id" in config or any(re.fullmatch(_KINDS[scheme].signs, name) for name in os.environ):
        return True
    if scheme == "gs" and any((folder / _GCLOUD_FILE).exists() for folder in _gcloud_folders()):
        return True
    address = urlsplit((scheme == "s3" and os.environ.get("AWS_METADATA_ENDPOINT")) or _METADATA)
    try:
        socket.create_connection((address.hostname or "", address.port or 80), _METADATA_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


_GCLOUD_FILE = "gcloud/application_default_credentials.json"


def _gcloud_folders() -> Iterator[Path]:
    yield Path("~/.config").expanduser()
    if "APPDATA" in os.environ:
        yield Path(os.environ["APPDATA"])


def _profile() -> dict[str, Any]:
    """Give what a profile of AWS says and the environment does not; what is more than keys is left to boto3.

    As in botocore (``create_credential_resolver`` in ``credentials.py``), keys in the environment go before those of a
    profile that ``AWS_PROFILE`` names, and the file of credentials before that of all else.
    """
    where = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
    files = [Path(os.environ.get(name) or usual).expanduser() for name, usual in where.items()]
    named = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE", "")
    name = named or "default"
    found = _section(files[0], f"profile {name}", name if name == "default" else "") | _section(files[1], name)
    has_keys = "AWS_ACCESS_KEY_ID" in os.environ
    if named and not found and not has_keys:
        raise Unreachable(f"profile {name}", "is in none of the files of AWS", f"They are {files[1]} and {files[0]}.")
    known = ("region", "endpoint_url") if has_keys else (*_KEYS, "region", "endpoint_url")
    config: dict[str, Any] = {key.removesuffix("_url"): found[key] for key in known if key in found}
    if "AWS_REGION" in os.environ or "AWS_DEFAULT_REGION" in os.environ:
        config.pop("region", None)
    if not has_keys and "aws_access_key_id" not in found and any(key in found for key in _MORE_THAN_KEYS):
        config |= _by_boto3(name)
    return config


def _section(file: Path, *names: str) -> dict[str, str]:
    """Give what sections of a file of AWS say, the first of them the most."""
    parser = configparser.ConfigParser(interpolation=None, strict=False, default_section="")
    try:
        parser.read(file, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        advice = "Mend it, or set AWS_CONFIG_FILE or AWS_SHARED_CREDENTIALS_FILE."
        raise BadFile(file, "cannot be read as profiles of AWS", advice) from None
    found: dict[str, str] = {}
    for name in reversed(names):
        found |= dict(parser[name]) if parser.has_section(name) else {}
    return found


_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
_MORE_THAN_KEYS = ("sso_session", "sso_start_url", "role_arn", "credential_process", "source_profile")


def _by_boto3(profile: str) -> dict[str, Any]:
    try:
        import boto3  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        problem = "signs in by more than a key, which takes boto3, and that is not installed here"
        raise Unsupported(f"profile {profile}", problem, "pip install boto3") from None
    frozen = boto3.Session(profile_name=profile).get_credentials().get_frozen_credentials()
    return {name: value for name, value in zip(_KEYS, frozen, strict=False) if value}
