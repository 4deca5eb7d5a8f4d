"""What goes wrong on the way to a bucket, or there: how a run ends, what is left, and that the same command goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support import clusters, tiny

from converter import convert
from converter.errors import OutputRefused
from converter.run import upload
from converter.storage import objects, place_of
from remote import models, stores
from remote.models import Contents
from remote.wire import Answer, Asked, Call, Drop, Fault, Matches, Rule, Shorten

Wconv = Callable[..., Any]
COUNT = 3
SHARDS = [f"model-{number:05d}-of-{COUNT:05d}.safetensors" for number in range(1, COUNT + 1)]
INDEX = "model.safetensors.index.json"
RECAST = ("--dtype", "bf16", "--workers", 1)
PART_NBYTES = 1 << 20  # as small as this S3 has them
NUMEL = (PART_NBYTES >> 1) + 1000  # in bf16 it goes up in two parts
SECRETS = ("testtest", "Signature=", "uploadId", "127.0.0.1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with four shards of one tensor."""
    return models.save_shards(tmp_path_factory.mktemp("faults") / "m", COUNT, NUMEL)


@pytest.fixture(scope="module")
def expected(source: Path, wconv: Wconv, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return expected_of(source, wconv, tmp_path_factory)


def expected_of(source: Path, wconv: Wconv, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """Give what the command makes on this machine."""
    out = tmp_path_factory.mktemp("expected") / "out"
    wconv("recast", source, *RECAST, "-o", out)
    return models.contents(out)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have clients try again at once, and not so often, and send small parts."""
    for module in (objects, upload):
        monkeypatch.setattr(module, "PART_NBYTES", PART_NBYTES)
    monkeypatch.setattr(objects, "_RETRIES", 3)
    monkeypatch.setattr(objects, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(objects, "_LONGEST_WAIT", 0.02)
    objects._client.cache_clear()
    yield
    objects._client.cache_clear()


@pytest.fixture
def s3(s3: stores.S3, hurried: None) -> stores.S3:
    return s3


def of(*methods: str, name: str = "", **query: str) -> Matches:
    """Match requests by their methods, a part of what they are about, and the names in their queries."""

    def matches(asked: Asked) -> bool:
        is_so = asked.method in methods and name in asked.path
        return is_so and all((key in asked.query) is (value == "yes") for key, value in query.items())

    return matches


PART = of("PUT", partNumber="yes")
BEGIN = of("POST", uploads="yes")
COMPLETE = of("POST", uploadId="yes")


def said(outcome: Any) -> str:
    """Give the one line that a run has complained in, which tells no secret."""
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    line: str = outcome.stderr.rstrip("\n")
    assert not any(secret in outcome.stderr + outcome.stdout for secret in SECRETS), line
    return line


def sent(store: stores.Store) -> list[str]:
    """Name the shards of which parts were sent."""
    return sorted({one.path.rpartition("/")[2] for one in store.wire.asked if PART(one)})


@dataclass
class Case:
    """A fault, met by so many requests that match once ``after`` have passed, and what comes of it.

    ``left`` are how many shards are whole there afterwards; None is that all is there, and the run came through.
    """

    fault: Fault
    matches: Matches
    times: int | None = None
    after: int = 0
    words: str = ""
    left: int | None = 0
    code: int = 7
    open_uploads: int = 0


BUSY = "S3 answers {}, after 4 tries. Run this again."
WHOLE = " {} of 3 files are whole there, and are kept by the same command."
GONE = "S3 does not answer"
UNREADABLE = "S3 gives an answer that cannot be read"
KEYS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile with AWS_PROFILE."
EXPIRED = Answer(400, body=b"<Error><Code>ExpiredToken</Code></Error>")
WRITING = {
    "500 a few times": Case(Answer(500), PART, 3, left=None),
    "503 a few times": Case(Answer(503, {"Retry-After": "1"}), PART, 3, left=None),
    "429 a few times": Case(Answer(429), PART, 3, left=None),
    "429 with Retry-After": Case(Answer(429, {"Retry-After": "1"}), of("HEAD"), 3, left=None),
    "500 for ever": Case(Answer(500), PART, after=2, words=BUSY.format("500 Internal Server Error"), left=1),
    "503 for ever": Case(Answer(503), PART, after=5, words=BUSY.format("503 Service Unavailable"), left=2),
    "429 for ever": Case(Answer(429), PART, after=1, words=BUSY.format("429 Too Many Requests"), left=0),
    "500 at the begin": Case(Answer(500), BEGIN, after=1, words=BUSY.format("500 Internal Server Error"), left=1),
    "500 at the end": Case(Answer(500), COMPLETE, after=1, words=BUSY.format("500 Internal Server Error"), left=1),
    "500 at the index": Case(
        Answer(500), of("PUT", name=INDEX), words=BUSY.format("500 Internal Server Error"), left=COUNT
    ),
    "a part is cut": Case(Drop(1 << 19, way="request"), PART, 2, left=None),
    "a part's answer is lost": Case(Drop(None), PART, 2, left=None),
    "the begin's answer is lost": Case(Drop(None), BEGIN, 2, left=None, open_uploads=2),
    "the begin's answer is cut": Case(Drop(0), BEGIN, after=1, times=1, words=GONE, left=1, open_uploads=1),
    "the end's answer is lost": Case(Drop(None), COMPLETE, 2, left=None),
    "the end's answer is cut": Case(Drop(0), COMPLETE, 2, left=None),
    "the end's answer is an error": Case(Answer(500, done=True), COMPLETE, left=None),
    "the index's answer is lost": Case(Drop(None), of("PUT", name=INDEX), 1, left=None),
    "the index's answer is an error": Case(Answer(500, done=True), of("PUT", name=INDEX), 1, left=None),
    "a listing is cut": Case(Drop(0), of("GET", prefix="yes"), 2, left=None),
    "a look is cut": Case(Drop(None), of("HEAD"), 2, left=None),
    "credentials expire": Case(Answer(403), of("PUT", "POST"), after=5, words=f"S3 (403 Forbidden). {KEYS}", left=1),
    "a token expires": Case(EXPIRED, of("PUT", "POST"), after=9, words=f"S3 (ExpiredToken). {KEYS}", left=2),
    "another region": Case(Answer(301), PART, words="is in another region. Set AWS_REGION to that of the bucket."),
    "no answer that is one": Case(Answer(200), PART, words=UNREADABLE),
}


@pytest.mark.parametrize("name", WRITING)
def test_faults_of_writing(name: str, s3: stores.S3, source: Path, expected: Contents, wconv: Wconv) -> None:
    case = WRITING[name]
    url = f"{s3.url}/x"
    rule = s3.wire.fault(case.fault, case.matches, case.times, case.after)
    outcome = wconv("recast", source, *RECAST, "-o", url, exit_code=0 if case.left is None else case.code)
    assert rule.met
    assert len(s3.open_uploads()) == case.open_uploads
    if case.left is None:
        assert outcome.stderr == ""
        assert s3.get_folder("x/") == expected
        return
    line = said(outcome)
    assert case.words in line
    assert (WHOLE.format(case.left) in line) is (case.left > 0)
    there = s3.get_folder("x/")
    assert there.items() <= expected.items()
    whole = [shard for shard in SHARDS if shard in there]
    assert len(whole) == case.left
    assert INDEX not in there
    goes_on(s3, source, expected, wconv, whole)


def goes_on(
    s3: stores.S3, source: Path, expected: Contents, wconv: Wconv, whole: list[str], prefix: str = "x/"
) -> None:
    """Run the command again, with all well: it keeps what is whole, and all is there."""
    s3.wire.heal()
    s3.wire.clear()
    wconv("recast", source, *RECAST, "-o", f"{s3.url}/{prefix.rstrip('/')}")
    assert sent(s3) == sorted(set(SHARDS) - set(whole))
    assert s3.get_folder(prefix) == expected


READ = of("GET", name="from/model", prefix="no")
FIRST = COUNT + 2  # the index and the headers are read first; then each shard takes one
READING = {
    "500 a few times": Case(Answer(500), READ, 3, FIRST, left=None),
    "500 for ever": Case(Answer(500), READ, after=FIRST + 1, words=BUSY.format("500 Internal Server Error"), left=1),
    "cut twice": Case(Drop(1 << 19), READ, 2, FIRST, left=None),
    "cut twice, softly": Case(Drop(1 << 19, reset=False), READ, 2, FIRST, left=None),
    "ends early": Case(Shorten(1 << 19), READ, 1, FIRST + 1, words="ended while it was read", left=1),
    "another by now": Case(Answer(412), READ, 1, FIRST + 2, words="was changed while it was read", code=3),
    "gone by now": Case(Answer(404), READ, 1, FIRST + 1, words="was changed while it was read", code=3),
    "credentials expire": Case(Answer(403), READ, after=FIRST + 2, words=f"S3 (403 Forbidden). {KEYS}", left=2),
    "no range": Case(Answer(200, body=b"x"), READ, after=FIRST + 1, words=UNREADABLE, left=1),
}


@pytest.mark.parametrize("name", READING)
def test_faults_of_reading(name: str, s3: stores.S3, source: Path, expected: Contents, wconv: Wconv) -> None:
    case = READING[name]
    s3.put_folder(source, "from/")
    rule = s3.wire.fault(case.fault, case.matches, case.times, case.after)
    arguments = ("recast", f"{s3.url}/from", *RECAST, "-o", f"{s3.url}/x")
    outcome = wconv(*arguments, exit_code=0 if case.left is None else case.code)
    assert rule.met
    assert s3.open_uploads() == []
    there = s3.get_folder("x/")
    if case.left is not None:
        line = said(outcome)
        assert case.words in line
        assert f"{s3.url}/from/" in line
        assert there.items() <= expected.items()
        assert len(there) == case.left
        assert (WHOLE.format(case.left) in line) is (case.left > 0)
        s3.wire.heal()
        s3.wire.clear()
        wconv(*arguments)
        assert sent(s3) == sorted(set(SHARDS) - set(there))
    assert s3.get_folder("x/") == expected


# Who asks, and of whom.


@dataclass
class Wrong:
    """Variables that are wrong or (None) missing, and what is said to that."""

    words: str
    variables: Mapping[str, str | None]


NO_BUCKET = "s3://no-such: is not there. Check its name, and AWS_REGION."
NO_KEYS = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
WRONG = {
    "a secret": Wrong(f"is refused by S3 (403 Forbidden). {KEYS}", {"AWS_SECRET_ACCESS_KEY": "hidden!"}),
    "a key": Wrong(f"is refused by S3 (403 Forbidden). {KEYS}", {"AWS_ACCESS_KEY_ID": "hidden!"}),
    "no keys": Wrong(f"needs credentials of S3, and there are none. {KEYS}", NO_KEYS),
    "a profile": Wrong("profile nobody: is in none of the files of AWS.", {**NO_KEYS, "AWS_PROFILE": "nobody"}),
}


ODD = {
    "an endpoint without a scheme": ("AWS_ENDPOINT_URL: names no server.", {"AWS_ENDPOINT_URL": "localhost:9000"}),
    "an endpoint without a host": ("AWS_ENDPOINT_URL: names no server.", {"AWS_ENDPOINT_URL": "http://"}),
    "a line too many": ("AWS_ACCESS_KEY_ID: has characters", {"AWS_ACCESS_KEY_ID": "hidden\r"}),
    "an odd token": ("AWS_SESSION_TOKEN: has characters", {"AWS_SESSION_TOKEN": "hiddenü"}),
    "no boolean": ("cannot be asked: of what is set for S3", {"AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "hidden"}),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_set_wrongly_is_said(
    name: str, s3: stores.S3, wconv: Wconv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, variables = ODD[name]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    model = models.save_linear(tmp_path / "m")
    for command in (("inspect", s3.url), ("to-bin", model, "-o", f"{s3.url}/x")):
        line = said(wconv(*command, exit_code=7))
        assert words in line
        assert "hidden" not in line


def test_a_file_of_keys_that_is_not_there_is_said(wconv: Wconv, nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file")
    line = said(wconv("inspect", "gs://bucket/x", exit_code=7))
    assert "something is not as it must be. Let GOOGLE_APPLICATION_CREDENTIALS name a key file" in line


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Give a home without files of AWS."""
    (tmp_path / "home" / ".aws").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("is_source", [True, False], ids=["source", "target"])
@pytest.mark.parametrize("name", WRONG)
def test_who_asks(
    name: str, is_source: bool, s3: stores.S3, wconv: Wconv, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.save_linear(tmp_path / "m")
    s3.put_folder(model, "from/")
    for variable, value in WRONG[name].variables.items():
        if value is None:
            monkeypatch.delenv(variable)
        else:
            monkeypatch.setenv(variable, value)
    ends = (f"{s3.url}/from", tmp_path / "out") if is_source else (model, f"{s3.url}/to")
    outcome = wconv("to-bin", ends[0], "-o", ends[1], exit_code=7)
    assert WRONG[name].words in said(outcome)
    assert "hidden!" not in outcome.stderr
    assert s3.names("to/") == []


@pytest.mark.parametrize("command", ["inspect", "verify", "doctor"])
def test_a_bucket_that_is_not_there(command: str, s3: stores.S3, wconv: Wconv, tmp_path: Path) -> None:
    model = models.save_linear(tmp_path / "m")
    assert said(wconv("to-bin", model, "-o", "s3://no-such/x", exit_code=7)) == NO_BUCKET
    assert said(wconv("to-bin", "s3://no-such/x", "-o", tmp_path / "out", exit_code=7)) == NO_BUCKET
    both = ["s3://no-such/x"] * (2 if command == "verify" else 1)
    assert said(wconv(command, *both, exit_code=7)) == NO_BUCKET
    assert not (tmp_path / "out").exists()


def test_nobody_answers(s3: stores.S3, wconv: Wconv, tmp_path: Path) -> None:
    model = models.save_linear(tmp_path / "m")
    s3.wire.down()
    words = "x: cannot be reached: S3 does not answer, after 4 tries. Run this again."
    assert said(wconv("to-bin", model, "-o", f"{s3.url}/x", exit_code=7)) == f"{s3.url}/{words}"
    assert said(wconv("inspect", f"{s3.url}/x", exit_code=7)) == f"{s3.url}/{words}"
    s3.wire.up()


def test_the_network_goes_away(s3: stores.S3, source: Path, expected: Contents, wconv: Wconv) -> None:
    s3.wire.fault(Call(lambda _: threading.Thread(target=s3.wire.down).start(), None), PART, 1, 3)
    line = said(wconv("recast", source, *RECAST, "-o", f"{s3.url}/x", exit_code=7))
    assert GONE in line
    assert WHOLE.format(1) in line
    s3.wire.up()
    goes_on(s3, source, expected, wconv, SHARDS[:1])


def test_how_long_a_client_goes_on() -> None:
    waits = [objects._FIRST_WAIT]
    for _ in range(objects._RETRIES - 1):
        waits.append(min(waits[-1] * objects._GROWTH, objects._LONGEST_WAIT))
    assert 30 <= sum(waits) <= 40  # at most: by chance it is between the first wait and this, each time


# Somebody else writes there too.


def somebody_comes(s3: stores.S3, name: str, matches: Matches, after: int) -> None:
    """Have an object of somebody else's be there by the time that a request has come."""
    s3.wire.fault(Call(lambda _: s3.put(f"x/{name}", b"another's"), None), matches, 1, after)


def is_refused(s3: stores.S3, name: str, source: Path, wconv: Wconv) -> None:
    """Hold a run to this: it leaves what another has written, and nothing else."""
    line = said(wconv("recast", source, *RECAST, "-o", f"{s3.url}/x", exit_code=5))
    assert line == f"{s3.url}/x/{name}: was made while this ran. Use --overwrite to replace it, or another -o."
    assert s3.get_folder() == {f"x/{name}": b"another's"}
    assert s3.open_uploads() == []


def test_somebody_else_writes_what_is_to_come(s3: stores.S3, source: Path, wconv: Wconv) -> None:
    somebody_comes(s3, SHARDS[1], PART, 0)
    is_refused(s3, SHARDS[1], source, wconv)


def test_somebody_else_writes_the_index(s3: stores.S3, source: Path, wconv: Wconv) -> None:
    somebody_comes(s3, INDEX, COMPLETE, COUNT - 1)
    is_refused(s3, INDEX, source, wconv)


def test_somebody_else_writes_what_goes_up(s3: stores.S3, wconv: Wconv, tmp_path: Path) -> None:
    """Let him come with the first part of a file of more parts than are under way at once."""
    parts = 2 * objects._PARTS_AT_ONCE
    model = models.save_shards(tmp_path / "m", COUNT, parts * (PART_NBYTES >> 1) + 1000)
    somebody_comes(s3, SHARDS[1], PART, parts + 1)
    is_refused(s3, SHARDS[1], model, wconv)


def test_somebody_else_writes_over_what_is_whole(s3: stores.S3, source: Path, wconv: Wconv) -> None:
    s3.wire.fault(Call(lambda _: s3.put(f"x/{SHARDS[0]}", b"another's"), None), COMPLETE, 1, 1)
    for more in ((), ("--overwrite",)):
        line = said(wconv("recast", source, *RECAST, "-o", f"{s3.url}/x", *more, exit_code=5))
        assert line.startswith(f"{s3.url}/x/{SHARDS[0]}: was written over while this ran.")
        assert s3.get_folder() == {f"x/{SHARDS[0]}": b"another's"}
        s3.wire.heal()
        s3.wire.fault(Call(lambda _: s3.put(f"x/{SHARDS[0]}", b"another's"), None), COMPLETE, 1, COUNT - 1)


def test_somebody_else_removes_what_is_whole(s3: stores.S3, source: Path, expected: Contents, wconv: Wconv) -> None:
    s3.wire.fault(Call(lambda _: s3.delete(f"x/{SHARDS[0]}"), None), COMPLETE, 1, 1)
    line = said(wconv("recast", source, *RECAST, "-o", f"{s3.url}/x", exit_code=7))
    assert line.startswith(f"{s3.url}/x/{SHARDS[0]}: was written, and is not there any more.")
    assert WHOLE.format(2) in line
    goes_on(s3, source, expected, wconv, SHARDS[1:])


def test_what_has_changed_between_two_calls_is_seen(s3: stores.S3, tmp_path: Path) -> None:
    for number, model in enumerate(("one", "other")):
        models.save_shards(tmp_path / model, COUNT + number, 100)
        convert(tmp_path / model, tmp_path / f"{model} here", dtype="bf16")
    source, target = place_of(f"{s3.url}/m"), place_of(f"{s3.url}/x")
    s3.put_folder(tmp_path / "one", "m/")
    convert(source, target, dtype="bf16")
    assert s3.get_folder("x/") == models.contents(tmp_path / "one here")
    for name in s3.names():
        s3.delete(name)
    s3.put_folder(tmp_path / "other", "m/")
    s3.put("x/theirs.bin", b"another's")
    with pytest.raises(OutputRefused):
        convert(source, target, dtype="bf16")
    s3.delete("x/theirs.bin")
    convert(source, target, dtype="bf16")
    assert s3.get_folder("x/") == models.contents(tmp_path / "other here")


def test_what_another_command_has_written_stays(s3: stores.S3, source: Path, expected: Contents, wconv: Wconv) -> None:
    """After a run that was stopped its prefix is taken up by the same command alone, and with nothing else in it."""
    url = f"{s3.url}/x"
    s3.wire.fault(Answer(500), PART, None, 2)
    wconv("recast", source, *RECAST, "-o", url, exit_code=7)
    s3.wire.heal()
    begun = s3.get_folder()
    assert list(begun) == [f"x/{SHARDS[0]}"]
    for other in (("recast", source, "--dtype", "fp16"), ("to-safetensors", source), ("to-bin", source)):
        line = said(wconv(*other, "-o", url, exit_code=5))
        assert line.startswith(f"{url}: exists and is not empty, and is not what would be written: ")
        assert s3.get_folder() == begun
    s3.put("x/vae/notes.txt", b"another's")
    line = said(wconv("recast", source, *RECAST, "-o", url, exit_code=5))
    assert "vae/notes.txt is of something else, or of another command" in line
    s3.delete("x/vae/notes.txt")
    # What comes in while it goes on is not replaced either.
    s3.wire.fault(Call(lambda _: s3.put(f"x/{SHARDS[2]}", b"another's"), None), PART, 1)
    assert "was made while this ran" in said(wconv("recast", source, *RECAST, "-o", url, exit_code=5))
    assert s3.get_folder() == {f"x/{SHARDS[2]}": b"another's"}
    s3.delete(f"x/{SHARDS[2]}")
    wconv("recast", source, *RECAST, "-o", url)
    assert s3.get_folder("x/") == expected


def test_a_source_that_is_another_by_now_is_converted_anew(s3: stores.S3, wconv: Wconv, tmp_path: Path) -> None:
    model = models.save_shards(tmp_path / "m", COUNT, 1000)
    s3.wire.fault(Answer(500), of("PUT", name=SHARDS[2]), None)
    wconv("recast", model, *RECAST, "-o", f"{s3.url}/x", exit_code=7)
    s3.wire.heal()
    tiny.save({"layers.0.weight": torch.full((1000,), 9.0)}, model / SHARDS[0])
    assert SHARDS[0] in said(wconv("recast", model, *RECAST, "-o", f"{s3.url}/x", exit_code=5))
    wconv("recast", model, *RECAST, "-o", f"{s3.url}/x", "--overwrite")
    wconv("recast", model, *RECAST, "-o", tmp_path / "out")
    assert s3.get_folder("x/") == models.contents(tmp_path / "out")


# What is wrong with the source.


@pytest.mark.parametrize("workers", [1, 3])
def test_an_overflow_leaves_nothing(workers: int, s3: stores.S3, wconv: Wconv, tmp_path: Path) -> None:
    model = models.save_shards(tmp_path / "m", COUNT, NUMEL)
    tiny.save({"layers.2.weight": torch.full((NUMEL,), 1e6)}, model / SHARDS[2])
    outcome = wconv("recast", model, "--dtype", "fp16", "--workers", workers, "-o", f"{s3.url}/x", exit_code=6)
    assert said(outcome).startswith(f"{s3.url}/x/{SHARDS[2]}: ")
    assert s3.names() == []
    assert s3.open_uploads() == []


def test_what_an_error_leaves_of_what_is_replaced_is_said(s3: stores.S3, wconv: Wconv, tmp_path: Path) -> None:
    model = models.save_shards(tmp_path / "m", COUNT, 1000)
    wconv("recast", model, *RECAST, "-o", f"{s3.url}/x")
    tiny.save({"layers.2.weight": torch.full((1000,), 1e6)}, model / SHARDS[2])
    command = ("recast", model, "--dtype", "fp16", "--workers", 1, "-o", f"{s3.url}/x", "--overwrite")
    assert said(wconv(*command, exit_code=6)).endswith("What was there before may not be whole any more.")
    assert INDEX not in s3.get_folder("x/")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_damaged_source_leaves_nothing(workers: int, s3: stores.S3, wconv: Wconv, tmp_path: Path) -> None:
    state = tiny.make_state()
    index = tiny.save_bin_shards(state, tmp_path / "m")
    tiny.flip_byte(tmp_path / "m" / "pytorch_model-00003-of-00003.bin", tiny.raw_bytes(state["f"]))
    outcome = wconv("to-safetensors", index.parent, "--workers", workers, "-o", f"{s3.url}/x", exit_code=3)
    assert "pytorch_model-00003-of-00003.bin" in said(outcome)
    assert s3.names() == []
    assert s3.open_uploads() == []


# Signals.


class Gate:
    """Holds back the requests that meet it, once so many have passed, until it is opened."""

    def __init__(self, store: stores.Store, matches: Matches, after: int) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.rule: Rule = store.wire.fault(Call(self._hold, None), matches, None, after)

    def wait(self, driver: clusters.Driver) -> None:
        """Wait until a run stands at it."""
        clusters.wait_until(lambda: self.reached.is_set() or driver.process.poll() is not None, "a request")
        assert driver.process.poll() is None, driver.end()

    def _hold(self, _: Asked) -> None:
        self.reached.set()
        self.opened.wait(clusters.HANGS)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder whose shards go up in two parts from a process that takes parts as large as ever."""
    return models.save_shards(tmp_path_factory.mktemp("large") / "m", COUNT, (8 << 19) + 1000)


@pytest.fixture(scope="module")
def expected_large(large: Path, wconv: Wconv, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return expected_of(large, wconv, tmp_path_factory)


@pytest.fixture
def gates() -> Iterator[list[Gate]]:
    """Open all gates in the end, whatever happens."""
    made: list[Gate] = []
    yield made
    for gate in made:
        gate.opened.set()


def test_the_command_is_killed(
    s3: stores.S3, large: Path, expected_large: Contents, wconv: Wconv, gates: list[Gate]
) -> None:
    """Open uploads may stay then: nobody is left who could end them."""
    gates.append(Gate(s3, PART, 3))
    driver = models.drive(s3, "recast", large, *RECAST, "-o", f"{s3.url}/x")
    gates[0].wait(driver)
    clusters.kill(driver.process.pid)
    gates[0].opened.set()
    driver.end()
    there = s3.get_folder("x/")
    assert list(there) == SHARDS[:1]
    goes_on(s3, large, expected_large, wconv, SHARDS[:1])


def test_a_worker_process_is_killed(
    s3: stores.S3, large: Path, expected_large: Contents, wconv: Wconv, gates: list[Gate]
) -> None:
    gates.append(Gate(s3, PART, 3))
    arguments = ("recast", large, "--dtype", "bf16", "--executor", "processes=2", "-o", f"{s3.url}/x")
    driver = models.drive(s3, *arguments)
    gates[0].wait(driver)
    # The last that was started: those before it are the server that forks, and what looks after that.
    workers = [one for one in psutil.Process(driver.process.pid).children(recursive=True) if not one.children()]
    clusters.kill(workers[-1].pid)
    gates[0].opened.set()
    ended = driver.end()
    assert ended.exit_code == 7, ended
    assert "was under way when a worker was killed" in said(ended)
    assert s3.get_folder("x/").items() <= expected_large.items()
    s3.wire.heal()
    wconv(*arguments[:4], *arguments[6:])
    assert s3.get_folder("x/") == expected_large


@pytest.mark.parametrize("executor", ["threads", "processes=2"])
def test_ctrl_c(
    executor: str, s3: stores.S3, large: Path, expected_large: Contents, wconv: Wconv, gates: list[Gate]
) -> None:
    gates.append(Gate(s3, PART, 3))
    arguments = ("recast", large, *RECAST, "-o", f"{s3.url}/x")
    driver = models.drive(s3, *arguments, "--executor", executor)
    gates[0].wait(driver)
    driver.process.send_signal(signal.SIGINT)
    gates[0].opened.set()
    ended = driver.end()
    assert (ended.exit_code, ended.stderr.strip()) == (130, "Interrupted.")
    assert s3.open_uploads() == []
    whole = s3.names("x/")
    assert f"x/{INDEX}" not in whole
    goes_on(s3, large, expected_large, wconv, [name.removeprefix("x/") for name in whole])
