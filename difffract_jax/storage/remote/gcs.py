"""Google Cloud Storage by its JSON API, over `requests`; credentials are those of `google.auth`.

1. One request is one call here, without retries of its own: `bucket` decides what is asked for again.
2. Reads name the generation of the object, so that blocks of two versions never mix; a read of a whole object and
   every write is held against the server's MD5 or CRC32C.
3. `STORAGE_EMULATOR_HOST` names another server, as for Google's own clients; it is asked without credentials. Where
   there are none, public buckets can still be read.
"""

import base64
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote

from difffract_jax.config import UserError
from difffract_jax.storage.remote.failures import Answered, Damaged, NoCredentials, Unreachable, missing_extra
from difffract_jax.storage.remote.objects import CONNECT, READ, Stat, check_digests, check_sums

ENDPOINT = "https://storage.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
FIELDS = "name,size,generation,md5Hash,crc32c"


@dataclass
class _Part:
    """A part of an upload: where it goes, of which object, its bytes and their place, and whether it was sent."""

    session: str
    key: str
    block: bytes
    begin: int
    size: int
    sent: bool = False


class GoogleBucket:
    """One bucket of Google Cloud Storage."""

    part = 2**26
    """Bytes of a part of an upload, a multiple of 256 KiB; smaller files go in one request."""

    def __init__(self, bucket: str) -> None:
        """Names the bucket; nothing is asked yet.

        Raises:
            UserError: if the client is not installed.
        """
        self.bucket = bucket
        host = os.environ.get("STORAGE_EMULATOR_HOST", "")
        self._endpoint = (host if "://" in host else f"http://{host}") if host else ENDPOINT
        self._local = threading.local()
        try:
            self._requests: Any = import_module("requests")
            self._auth: Any = None if host else import_module("google.auth")
            self._failures: Any = None if host else import_module("google.auth.exceptions")
            self._transport: Any = None if host else import_module("google.auth.transport.requests")
        except ImportError:
            raise UserError(missing_extra("gs")) from None
        self._credentials: Any = None
        if not host:
            self._credentials = self._found_credentials()

    def stat(self, key: str) -> Stat | None:
        """Returns what the bucket says of an object, None if there is none of that key."""
        try:
            answer = self._ask("GET", self._object(key), params={"fields": FIELDS})
        except Answered as error:
            if error.status != 404:
                raise
            self._check_bucket()
            return None
        return _stat(_parsed(answer))

    def read(self, of: Stat, begin: int, end: int) -> bytes:
        """Returns bytes `begin` to before `end` of an object."""
        if begin == end:
            return b""
        whole = begin == 0 and end == of.size
        headers = {"Accept-Encoding": "identity"} | ({} if whole else {"Range": f"bytes={begin}-{end - 1}"})
        params = {"alt": "media", "generation": of.version}
        try:
            content = self._ask("GET", self._object(of.key), params=params, headers=headers).content
        except Answered as error:
            raise Answered(412) if error.status == 404 else error from error
        if len(content) != end - begin:
            raise Damaged(f"{len(content)} bytes came of {end - begin}")
        if whole:
            check_sums(content, of)
        return content

    def page(self, prefix: str, token: str) -> tuple[list[Stat], str]:
        """Returns some of the objects whose keys begin with a prefix, and the token of the next page, "" at the end."""
        params = {"prefix": prefix, "fields": f"items({FIELDS}),nextPageToken", "maxResults": 1000}
        answer = self._ask("GET", self._objects(), params=params | ({"pageToken": token} if token else {}), bucket=True)
        listed = _parsed(answer)
        return [_stat(item) for item in listed.get("items", ())], listed.get("nextPageToken", "")

    def write(self, key: str, content: bytes, *, over: str | None = None) -> None:
        """Writes an object in one request; with `over` only in place of that version, "" for none: else 412."""
        md5 = hashlib.md5(content)
        about = {"name": key, "md5Hash": base64.b64encode(md5.digest()).decode()}
        params = {"uploadType": "multipart", "fields": FIELDS} | _only_if(over)
        kind, body = _in_two_parts(about, content)
        given = {"params": params, "headers": {"Content-Type": kind}, "data": body}
        answer = self._ask("POST", f"/upload{self._objects()}", bucket=True, **given)
        _check_written(_stat(_parsed(answer)), len(content), md5.hexdigest())

    def upload(self, key: str, file: Path, patiently: Callable[[Callable[[], Any]], Any]) -> None:
        """Writes an object from a file, part by part, each tried again by itself.

        Args:
            key: of the object.
            file: to read.
            patiently: calls a function until it succeeds.
        """
        size, digest, done = file.stat().st_size, hashlib.md5(), None
        session = patiently(lambda: self._session_of(key, size))
        with file.open("rb") as stream:
            for begin in range(0, size, self.part):
                part = _Part(session, key, stream.read(self.part), begin, size)
                digest.update(part.block)
                done = patiently(lambda part=part: self._put(part))
        if done is None:
            raise Damaged("the server still waits for bytes")
        _check_written(done, size, digest.hexdigest())

    def delete(self, key: str, *, version: str | None = None) -> None:
        """Removes an object, with `version` only that one: else 412; one that is not there is gone already."""
        try:
            self._ask("DELETE", self._object(key), params=_only_if(version))
        except Answered as error:
            if error.status != 404 or error.bucket:
                raise

    def _session_of(self, key: str, size: int) -> str:
        params = {"uploadType": "resumable", "name": key}
        headers = {"X-Upload-Content-Type": "application/octet-stream", "X-Upload-Content-Length": str(size)}
        answer = self._ask("POST", f"/upload{self._objects()}", params=params, headers=headers, json={}, bucket=True)
        return answer.headers["Location"]

    def _put(self, part: "_Part") -> Stat | None:
        """Sends a part; when it is sent again, what the server has of it is left out. Returns the object when whole."""
        begin = part.begin
        if part.sent:
            try:
                answer = self._ask("PUT", part.session, headers={"Content-Range": f"bytes */{part.size}"}, data=b"")
            except Answered as error:
                # A server may forget an upload once it is whole, though its last answer was lost.
                whole = self.stat(part.key) if error.status in (404, 410) else None
                if whole is None:
                    raise
                return whole
            if answer.status_code != 308:
                return _stat(_parsed(answer))
            begin = max(begin, int(answer.headers["Range"].rpartition("-")[2]) + 1 if "Range" in answer.headers else 0)
        part.sent = True
        rest = part.block[begin - part.begin :]
        if not rest:
            return None
        place = f"bytes {begin}-{begin + len(rest) - 1}/{part.size}"
        answer = self._ask("PUT", part.session, headers={"Content-Range": place}, data=rest)
        return None if answer.status_code == 308 else _stat(_parsed(answer))

    def _check_bucket(self) -> None:
        """Raises the answer 404 of a bucket that does not exist; who may not list it is not told."""
        try:
            self._ask("GET", self._objects(), params={"maxResults": 1, "fields": "nextPageToken"}, bucket=True)
        except Answered as error:
            if error.status != 403:
                raise

    def _objects(self) -> str:
        return f"/storage/v1/b/{quote(self.bucket, safe='')}/o"

    def _object(self, key: str) -> str:
        return f"{self._objects()}/{quote(key, safe='')}"

    def _ask(self, method: str, path: str, *, bucket: bool = False, **given: Any) -> Any:
        """Makes one request; `bucket` says that of an answer 404 the bucket is what is missing."""
        url = path if "://" in path else f"{self._endpoint}{path}"
        headers = dict(given.pop("headers", {}))
        errors = self._requests.exceptions
        try:
            if self._credentials is not None:
                self._credentials.before_request(self._transport.Request(), method, url, headers)
            answer = self._session().request(
                method, url, headers=headers, allow_redirects=False, timeout=(CONNECT, READ), **given
            )
        except (errors.RequestException, OSError) as error:
            raise Unreachable(_brief(error)) from error
        except self._auth_errors() as error:
            if "Transport" in type(error).__name__:
                raise Unreachable(_brief(error)) from error
            raise NoCredentials(_brief(error)) from error
        if answer.status_code < 400:
            return answer
        raise self._refused(answer, bucket)

    def _refused(self, answer: Any, bucket: bool) -> Exception:
        words, status, after = _words(answer), answer.status_code, answer.headers.get("Retry-After", "")
        if status == 400 and "hash" in words.lower() and "match" in words.lower():
            return Damaged(words)  # of bytes that changed on their way there
        anonymous = self._credentials is None and self._endpoint == ENDPOINT
        if status == 401 and anonymous:
            return NoCredentials("none were found on this machine, and the bucket is not public")
        gone = status == 404 and (bucket or "bucket" in words.lower()) and "no such object" not in words.lower()
        return Answered(status, words, float(after) if after.isdigit() else None, bucket=gone)

    def _session(self) -> Any:
        """Returns this thread's connections."""
        if not hasattr(self._local, "session"):
            self._local.session = self._requests.Session()
        return self._local.session

    def _found_credentials(self) -> Any:
        try:
            return self._auth.default(scopes=[SCOPE])[0]
        except self._failures.DefaultCredentialsError:
            return None

    def _auth_errors(self) -> tuple[type[Exception], ...]:
        return () if self._auth is None else (self._failures.GoogleAuthError,)


def _only_if(version: str | None) -> dict[str, str]:
    """Returns the condition that an object is of a version, "" for no object; none for None."""
    return {} if version is None else {"ifGenerationMatch": version or "0"}


def _in_two_parts(about: dict[str, str], content: bytes) -> tuple[str, bytes]:
    """Returns the type and the body of a request that holds an object's description and its bytes."""
    boundary = secrets.token_hex(16)  # random, so that no content holds it
    head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(about)}\r\n"
    head += f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
    return f"multipart/related; boundary={boundary}", head.encode() + content + f"\r\n--{boundary}--".encode()


def _check_written(stat: Stat, size: int, md5: str) -> None:
    if stat.size != size:
        raise Damaged(f"{stat.size} bytes arrived of {size}")
    check_digests(stat, md5, "")


def _stat(item: Any) -> Stat:
    md5 = base64.b64decode(item.get("md5Hash", "")).hex()
    return Stat(item["name"], int(item["size"]), str(item.get("generation", "")), md5, item.get("crc32c", ""))


def _parsed(answer: Any) -> Any:
    """Returns what an answer says; it comes without a checksum, and a wrong byte shows as what is no JSON."""
    try:
        return answer.json()
    except ValueError:
        raise Damaged("the server's answer is not JSON") from None


def _words(answer: Any) -> str:
    """Returns what an answer says is wrong."""
    try:
        error = json.loads(answer.text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        return "" if answer.text.lstrip().startswith("<") else answer.text[:200]


def _brief(error: Exception) -> str:
    """Returns an error in a few words."""
    return " ".join(str(error).split())[:160] or type(error).__name__
