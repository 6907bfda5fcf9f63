"""Amazon S3, and whatever speaks its protocol, by `botocore`, which AWS's own clients stand on.

1. One request is one call here, without retries of its own: `bucket` decides what is asked for again.
2. Reads name the ETag of the object, so that blocks of two versions never mix. botocore sends a checksum with every
   write and holds whole reads against the server's; where the ETag is an MD5, it is compared too.
3. Credentials, region and `AWS_ENDPOINT_URL` are found as the `aws` command finds them.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from difffract_jax.config import UserError
from difffract_jax.storage.remote.failures import (
    Answered,
    Damaged,
    NoCredentials,
    StorageError,
    Unreachable,
    missing_extra,
)
from difffract_jax.storage.remote.objects import CONNECT, READ, Stat, check_digests

REGION = "us-east-1"
"""Where none is set; a bucket elsewhere answers with its own."""
CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError")
CREDENTIALS += ("UnauthorizedSSOTokenError", "SSOTokenLoadError", "ProfileNotFound")
GONE = ("NoSuchBucket",)
EXPIRED = ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthFailure")
"""Codes of answers 400 and 403 that mean: these credentials are not accepted."""
DAMAGED = ("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody")
"""Codes of answers 400 that mean: other bytes arrived than were sent."""
LATE = ("RequestTimeout", "RequestTimeoutException")
"""Codes of answers 400 that are those of a connection which took too long."""
SLOW = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded")


class AmazonBucket:
    """One bucket of S3."""

    part = 2**26
    """Bytes of a part of an upload, at least 5 MiB; smaller files go in one request."""

    def __init__(self, bucket: str) -> None:
        """Names the bucket; nothing is asked yet.

        Raises:
            UserError: if the client is not installed.
        """
        try:
            session: Any = import_module("botocore.session").get_session()
            config: Any = import_module("botocore.config").Config
            self._errors: Any = import_module("botocore.exceptions")
        except ImportError:
            raise UserError(missing_extra("s3")) from None
        self.bucket = bucket
        options = config(retries={"total_max_attempts": 1}, connect_timeout=CONNECT, read_timeout=READ)
        with self._translated():
            region = session.get_config_variable("region") or REGION
            self._client: Any = session.create_client("s3", config=options, region_name=region)

    def stat(self, key: str) -> Stat | None:
        """Returns what the bucket says of an object, None if there is none of that key."""
        try:
            with self._translated():
                return _stat(key, self._client.head_object(Bucket=self.bucket, Key=key))
        except Answered as error:
            if error.status != 404:
                raise
        with self._translated(bucket=True):  # of a key or of the bucket: an answer without a body does not say
            self._client.head_bucket(Bucket=self.bucket)
        return None

    def read(self, of: Stat, begin: int, end: int) -> bytes:
        """Returns bytes `begin` to before `end` of an object."""
        if begin == end:
            return b""
        whole = begin == 0 and end == of.size
        part = {} if whole else {"Range": f"bytes={begin}-{end - 1}"}
        with self._translated():
            answer = self._client.get_object(Bucket=self.bucket, Key=of.key, IfMatch=f'"{of.version}"', **part)
            with closing(answer["Body"]) as body:
                content = body.read()
        if len(content) != end - begin:
            raise Damaged(f"{len(content)} bytes came of {end - begin}")
        if whole and of.md5:
            check_digests(of, hashlib.md5(content).hexdigest(), "")
        return content

    def page(self, prefix: str, token: str) -> tuple[list[Stat], str]:
        """Returns some of the objects whose keys begin with a prefix, and the token of the next page, "" at the end."""
        further = {"ContinuationToken": token} if token else {}
        with self._translated(bucket=True):
            listed = self._client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, **further)
        stats = [Stat(one["Key"], one["Size"], one["ETag"].strip('"')) for one in listed.get("Contents", ())]
        return stats, listed.get("NextContinuationToken", "")

    def write(self, key: str, content: bytes, *, over: str | None = None) -> None:
        """Writes an object in one request; with `over` only in place of that version, "" for none: else 412, or 404.

        A version is an ETag, which is that of the content: contents that nobody else writes tell versions apart.
        """
        condition = {} if over is None else {"IfMatch": f'"{over}"'} if over else {"IfNoneMatch": "*"}
        with self._translated(bucket=True):
            self._client.put_object(Bucket=self.bucket, Key=key, Body=content, **condition)

    def upload(self, key: str, file: Path, patiently: Callable[[Callable[[], Any]], Any]) -> None:
        """Writes an object from a file, part by part, each tried again by itself.

        Args:
            key: of the object.
            file: to read.
            patiently: calls a function until it succeeds.
        """
        place = {"Bucket": self.bucket, "Key": key}
        began = patiently(lambda: self._call("create_multipart_upload", place))
        place["UploadId"] = began["UploadId"]
        done = False
        try:
            parts = [
                {"PartNumber": number, "ETag": patiently(lambda made=made: self._call("upload_part", made))["ETag"]}
                for number, made in _parts(file, self.part, place)
            ]
            patiently(lambda: self._complete(place, parts))
            done = True
        finally:
            if not done:  # parts that are not put together would be kept and charged
                with suppress(StorageError):
                    self._call("abort_multipart_upload", place)

    def _complete(self, place: dict[str, Any], parts: list[dict[str, Any]]) -> None:
        """Puts an upload's parts together, unless an earlier try has, whose answer was lost."""
        try:
            self._call("complete_multipart_upload", place | {"MultipartUpload": {"Parts": parts}})
        except Answered as error:
            there = self.stat(place["Key"]) if error.status == 404 and not error.bucket else None
            if there is None or there.version != _tag_of(parts):
                raise

    def delete(self, key: str, *, version: str | None = None) -> None:
        """Removes an object, with `version` only that one: else 412; one that is not there is gone already."""
        condition = {} if version is None else {"IfMatch": f'"{version}"'}
        with self._translated(bucket=True):
            self._client.delete_object(Bucket=self.bucket, Key=key, **condition)

    def _call(self, name: str, given: Any) -> Any:
        with self._translated(bucket=True):
            return getattr(self._client, name)(**given)

    @contextmanager
    def _translated(self, *, bucket: bool = False) -> Iterator[None]:
        """Turns the client's errors into ours; `bucket` says that of an answer 404 the bucket is what is missing."""
        errors = self._errors
        try:
            yield
        except errors.ClientError as error:
            raise _refused(error, bucket) from error
        except errors.FlexibleChecksumError as error:
            raise Damaged(str(error)) from error
        except errors.BotoCoreError as error:
            if type(error).__name__ in CREDENTIALS:
                raise NoCredentials(str(error)) from error
            raise Unreachable(str(error)) from error
        except OSError as error:
            raise Unreachable(str(error)) from error


def _parts(file: Path, size: int, place: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the parts of a file with their numbers, each as the arguments of a request."""
    with file.open("rb") as stream:
        for number in range(1, -(-file.stat().st_size // size) + 1):
            yield number, place | {"PartNumber": number, "Body": stream.read(size)}


def _tag_of(parts: list[dict[str, Any]]) -> str:
    """Returns the ETag of an object of these parts, where theirs are MD5 sums; "" where they are not."""
    try:
        sums = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
    except ValueError:
        return ""
    return f"{hashlib.md5(sums).hexdigest()}-{len(parts)}"


def _stat(key: str, head: Any) -> Stat:
    tag = head["ETag"].strip('"')
    # Of several parts, or encrypted with a key of one's own, the ETag is no MD5.
    plain = "-" not in tag and head.get("ServerSideEncryption", "AES256") == "AES256"
    return Stat(key, head["ContentLength"], tag, tag if plain and len(tag) == 32 else "")


def _refused(error: Any, bucket: bool) -> Exception:
    """Returns what an answer with an error means."""
    said = error.response.get("Error", {})
    told = error.response.get("ResponseMetadata", {})
    status, code = int(told.get("HTTPStatusCode", 0)), str(said.get("Code", ""))
    words = str(said.get("Message", "")) or code
    after = str(told.get("HTTPHeaders", {}).get("retry-after", ""))
    if code in DAMAGED:
        return Damaged(words)
    status = 401 if code in EXPIRED else 429 if code in SLOW else 408 if code in LATE else status
    gone = code in GONE or (status == 404 and bucket and code not in ("NoSuchKey", "NoSuchUpload"))
    return Answered(status, words, float(after) if after.isdigit() else None, bucket=gone)
