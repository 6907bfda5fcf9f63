"""A bucket of either kind, over HTTP: what is written is read, faults that pass change nothing, others are told."""

import base64
import itertools
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from bucket_servers import Clock, Proxy, fresh_clients
from difffract_jax.config import UserError
from difffract_jax.storage.remote import bucket as buckets
from difffract_jax.storage.remote import gcs
from difffract_jax.storage.remote.addresses import Address
from difffract_jax.storage.remote.bucket import Bucket, open_bucket
from difffract_jax.storage.remote.failures import LOGIN, Answered, Damaged, Unreachable
from difffract_jax.storage.remote.gcs import _Part
from difffract_jax.storage.remote.s3 import _refused

Either = tuple[str, Proxy]


def opened(scheme: str) -> Bucket:
    return open_bucket(Address(scheme, "bucket", ""))


def test_what_is_written_is_read_whole_and_by_range(either: Either) -> None:
    bucket, key = opened(either[0]), "a folder/x+y%20 é.txt"
    bucket.write(key, b"hello world")
    stat = bucket.known(key)
    assert bucket.read(key) == b"hello world" and stat.size == 11
    assert bucket.read_range(stat, 3, 7) == b"lo w" and bucket.read_range(stat, 4, 4) == b""
    bucket.write("a folder/empty", b"")
    assert bucket.read("a folder/empty") == b""
    assert [one.key for one in bucket.below("a folder")] == ["a folder/empty", key]
    assert bucket.below("a") == []
    for name in ("empty", "x+y%20 é.txt", "x+y%20 é.txt"):  # one that is gone is gone already
        bucket.delete(f"a folder/{name}")
    assert bucket.stat(key) is None and bucket.below("a folder") == []


def test_large_files_go_up_and_come_down_in_parts(
    either: Either, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = opened(either[0]), either[1]
    monkeypatch.setattr(bucket.client, "part", 5 * 2**20)  # the least that S3 takes
    monkeypatch.setattr(buckets, "BLOCK", 2**22)
    content = np.random.default_rng(0).bytes(12 * 2**20 + 7)
    (tmp_path / "large").write_bytes(content)
    sent: set[str] = set()

    def fault(method: str, path: str) -> str | None:
        # The first try of every part, and of what begins and ends the upload, is lost. Of parts of the emulated Google
        # storage none is: it does not know how to tell what it has of an upload.
        first = path not in sent and (method == "POST" or (method == "PUT" and either[0] == "s3"))
        sent.add(path)
        return "drop" if first else None

    proxy.fault = fault
    bucket.upload("large", tmp_path / "large")
    proxy.fault = lambda method, path: None
    proxy.log.clear()
    assert bucket.read("large") == content
    assert sum(ranged.startswith("bytes=") for _, _, ranged in proxy.log) == 4
    bucket.delete("large")


def test_a_part_that_is_sent_again_leaves_out_what_arrived(gs: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    client = opened("gs").client
    sent: list[tuple[str, bytes]] = []

    class Incomplete(NamedTuple):
        """An answer to a part of an upload."""

        headers: dict[str, str]
        status_code: int = 308

    def ask(method: str, path: str, *, headers: dict[str, str], data: bytes) -> Incomplete:
        sent.append((headers["Content-Range"], data))
        if len(sent) == 1:
            raise Unreachable("the answer is lost")
        return Incomplete({"Range": "bytes=0-13"} if not data else {})

    monkeypatch.setattr(client, "_ask", ask)
    part = _Part("session", "key", b"0123456789", 10, 30)
    with pytest.raises(Unreachable):
        client._put(part)
    assert client._put(part) is None
    assert sent == [("bytes 10-19/30", b"0123456789"), ("bytes */30", b""), ("bytes 14-19/30", b"456789")]


def test_an_object_is_created_once(either: Either) -> None:
    bucket = opened(either[0])
    bucket.delete("once")
    assert bucket.create("once", b"mine") and not bucket.create("once", b"theirs") and bucket.read("once") == b"mine"
    assert bucket.create("once", b"mine"), "a first try whose answer was lost is ours"


def test_a_version_is_replaced_and_removed_once(either: Either) -> None:
    bucket = opened(either[0])
    bucket.write("versions", b"first")
    first = bucket.known("versions")
    others: list[bool] = []
    writers = [threading.Thread(target=lambda n=n: others.append(bucket.replace(first, b"%d" % n))) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(others) == [False] * 7 + [True], "of several at once one wins"
    now = bucket.known("versions")
    assert not bucket.replace(first, b"late") and not bucket.delete_version(first)
    assert bucket.replace(now, bucket.read("versions")), "a first try whose answer was lost is ours"
    now = bucket.known("versions")
    assert bucket.delete_version(now) and bucket.delete_version(now) and bucket.stat("versions") is None
    assert not bucket.replace(now, b"of one that is gone") and bucket.stat("versions") is None


def test_an_object_that_changes_while_it_is_read_is_refused(either: Either) -> None:
    bucket = opened(either[0])
    bucket.write("changing", b"before it")
    stat = bucket.known("changing")
    bucket.write("changing", b"afterwards")
    with pytest.raises(UserError, match="changing was changed by another process while it was read; run this again"):
        bucket.read_range(stat, 0, 4)


def test_objects_without_an_md5_are_held_against_their_crc32c(gs: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    # Composed objects have none. A sum of bytes stands for the checksum, which the extra `gcs` brings.
    monkeypatch.setitem(sys.modules, "google_crc32c", SimpleNamespace(extend=lambda start, block: start + sum(block)))
    monkeypatch.setattr(buckets, "BLOCK", 4)
    bucket = opened("gs")
    for content in (b"abc", b"abcdefghij"):
        bucket.write("composed", content)
        right = base64.b64encode(sum(content).to_bytes(4, "big")).decode()
        stat = bucket.known("composed")._replace(md5="", crc32c=right)
        assert b"".join(bucket.blocks(stat)) == content
        with pytest.raises((Damaged, UserError), match="CRC32C is "):
            b"".join(bucket.blocks(stat._replace(crc32c="AAAAAQ==")))


def test_waits_double_are_shortened_at_random_and_end(gs: Proxy, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "PATIENCE", clock.patience(tries=9, chance=lambda: 1.0))
    fresh_clients()
    gs.fault = lambda method, path: 503
    with pytest.raises(UserError, match=r"gs://bucket/x cannot be read, since the server fails \(503: injected\)"):
        opened("gs").read("x")
    assert clock.waits == [0.5, 1, 2, 4, 8, 16, 32, 32]
    clock.waits.clear()
    monkeypatch.setattr(buckets, "PATIENCE", clock.patience(tries=3, chance=iter([0.5, 0.25]).__next__))
    fresh_clients()
    with pytest.raises(UserError):
        opened("gs").read("x")
    assert clock.waits == [0.25, 0.25]


def test_a_server_that_says_when_to_come_back_is_obeyed(gs: Proxy, clock: Clock) -> None:
    gs.fault = lambda method, path: 429
    with pytest.raises(UserError, match="quota"):
        opened("gs").read("x")
    assert set(clock.waits[:4]) == {7.0} and max(clock.waits) <= 32


def test_an_answer_that_takes_too_long_is_asked_for_again(
    gs: Proxy, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened("gs").write("slow", b"content")
    monkeypatch.setattr(gcs, "READ", 0.1)
    late = iter(["slow", "slow"])
    gs.fault = lambda method, path: next(late, None)
    assert opened("gs").read("slow") == b"content" and len(clock.waits) == 2


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "does not accept the credentials"),
        (403, "do not allow it"),
        (429, "quota of requests is used up"),
        (500, "server fails"),
        (418, "refuses the request"),
    ],
)
def test_every_answer_is_one_sentence(either: Either, status: int, said: str) -> None:
    scheme, proxy = either
    bucket = opened(scheme)
    proxy.log.clear()
    proxy.fault = lambda method, path: status
    with pytest.raises(UserError) as caught:
        bucket.write("x", b"1")
    sentence = str(caught.value)
    assert sentence.startswith(f"{scheme}://bucket/x cannot be written") and said in sentence
    assert str(status) in sentence and sentence.endswith(".") and "\n" not in sentence
    assert (LOGIN[scheme] in sentence) == (status in (401, 403))
    assert len(proxy.log) == (1 if status in (401, 403, 418) else bucket.patience.tries)


@pytest.mark.s3
def test_an_upload_that_is_whole_though_its_last_answer_was_lost_is_done(
    s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = opened("s3")
    monkeypatch.setattr(bucket.client, "part", 5 * 2**20)
    (tmp_path / "large").write_bytes(bytes(6 * 2**20))
    call, tries = bucket.client._call, []

    def lost(name: str, given: dict) -> dict:
        if name == "complete_multipart_upload":
            tries.append(name)
            if len(tries) != 1:
                raise Answered(404, "The specified upload does not exist")
            call(name, given)
            raise Unreachable("the answer is lost")
        return call(name, given)

    monkeypatch.setattr(bucket.client, "_call", lost)
    bucket.upload("large", tmp_path / "large")
    assert bucket.known("large").size == 6 * 2**20 and len(tries) == 2
    (tmp_path / "large").write_bytes(bytes(6 * 2**20 - 1) + b"1")
    with pytest.raises(UserError, match="large does not exist"):  # what is there is the former object
        bucket.upload("large", tmp_path / "large")
    bucket.delete("large")


@pytest.mark.parametrize(
    ("code", "kind"), [("BadDigest", Damaged), ("RequestTimeout", Answered), ("SlowDown", Answered)]
)
def test_answers_400_that_pass_are_asked_for_again(code: str, kind: type) -> None:
    class Refused(NamedTuple):
        response: dict

    answer = {"Error": {"Code": code, "Message": "said"}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    error = _refused(Refused(answer), True)
    assert isinstance(error, kind) and error.passes
    missing = {"Error": {"Code": "NoSuchUpload"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
    assert not _refused(Refused(missing), True).bucket, "the upload is what is missing"


def test_bytes_that_changed_on_their_way_there_are_sent_again(gs: Proxy) -> None:
    class Answer(NamedTuple):
        text: str
        status_code: int = 400
        headers: dict[str, str] = {}

    words = 'Provided MD5 hash "AA==" doesn\'t match calculated MD5 hash "BB==".'
    error = opened("gs").client._refused(Answer(json.dumps({"error": {"message": words}})), False)
    assert isinstance(error, Damaged) and error.passes


def test_what_is_not_there_is_told_apart_from_its_bucket(either: Either) -> None:
    scheme, _ = either
    with pytest.raises(UserError, match=f"{scheme}://bucket/nothing does not exist"):
        opened(scheme).read("nothing")
    elsewhere = open_bucket(Address(scheme, "no-such-bucket", ""))
    for ask in (
        lambda: elsewhere.read("x"),
        lambda: elsewhere.below("x"),
        lambda: elsewhere.write("x", b""),
        lambda: elsewhere.stat("x"),
    ):
        with pytest.raises(UserError, match=rf"There is no bucket {scheme}://no-such-bucket \(404\)"):
            ask()


def test_a_lost_network_is_one_sentence(either: Either, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, _ = either
    for name in ("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens
    fresh_clients()
    with pytest.raises(UserError, match=f"{scheme}://bucket/x cannot be read, since the network is lost") as caught:
        opened(scheme).read("x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.s3
def test_no_credentials_are_told(s3: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fresh_clients()
    with pytest.raises(UserError, match="s3://bucket/x cannot be read without credentials.*AWS_PROFILE"):
        opened("s3").read("x")


@pytest.mark.parametrize("public", [True, False])
def test_without_google_s_credentials_public_buckets_are_read_and_others_told(
    gs: Proxy, monkeypatch: pytest.MonkeyPatch, public: bool
) -> None:
    class DefaultCredentialsError(Exception):
        """What google.auth raises where it finds none."""

    def default(scopes: list[str]) -> None:
        raise DefaultCredentialsError

    opened("gs").write("x", b"1")
    failures = SimpleNamespace(DefaultCredentialsError=DefaultCredentialsError, GoogleAuthError=ZeroDivisionError)
    for name, module in (
        ("google.auth", SimpleNamespace(default=default)),
        ("google.auth.exceptions", failures),
        ("google.auth.transport.requests", SimpleNamespace()),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setattr(gcs, "ENDPOINT", gs.url)
    fresh_clients()
    if public:
        assert opened("gs").read("x") == b"1"
        return
    gs.fault = lambda method, path: 401
    with pytest.raises(UserError) as caught:
        opened("gs").read("x")
    assert str(caught.value) == (
        "gs://bucket/x cannot be read without credentials: none were found on this machine, and the bucket is not "
        f"public; {LOGIN['gs']}."
    )


@pytest.mark.parametrize(("scheme", "absent", "extra"), [("gs", "requests", "gcs"), ("s3", "botocore.session", "s3")])
def test_a_missing_extra_is_named(scheme: str, absent: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    fresh_clients()
    with pytest.raises(UserError, match=rf"need the extra `{extra}`; install .*'difffract_jax\[{extra}\]'"):
        opened(scheme)


@pytest.mark.parametrize("kind", ["gs", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_thousand_faults_change_nothing(kind: str, request: pytest.FixtureRequest, clock: Clock) -> None:
    # Every request fails up to three times before it is let through, each time in another way.
    proxy: Proxy = request.getfixturevalue(kind)
    bucket, draw = opened(kind), np.random.default_rng(0)
    faults, most = itertools.count(1), 1000 if kind == "gs" else 200
    injected, failed = 0, 0

    def fault(method: str, path: str) -> int | str | None:
        nonlocal injected, failed
        if injected >= most or failed >= 3 or draw.random() < 0.1:
            failed = 0
            return None
        failed += 1
        injected = next(faults)
        # Bytes of an answer that has a checksum are changed; others have none.
        content = method == "GET" and ("alt=media" in path or path.startswith("/bucket/faults/"))
        passing = [503, 429, "drop"] + (["cut", "flip"] if content else [])
        return passing[injected % len(passing)]

    proxy.fault = fault
    contents: dict[str, bytes] = {}
    for number in itertools.count():
        if injected >= most:
            break
        key, content = f"faults/{number % 17}", draw.bytes(int(draw.integers(1, 4000)))
        bucket.write(key, content)
        contents[key] = content
        assert bucket.read(key) == content
    assert {stat.key: stat.size for stat in bucket.below("faults")} == {key: len(one) for key, one in contents.items()}
    proxy.fault = lambda method, path: None
    assert {key: bucket.read(key) for key in contents} == contents
    assert injected == most and len(clock.waits) == most
