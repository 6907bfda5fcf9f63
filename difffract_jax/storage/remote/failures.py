"""What can go wrong with a bucket, in words that do not hang on whose it is, and the sentence for each.

1. `gcs` and `s3` turn what their clients raise into the errors below.
2. `StorageError.passes` says whether the same request may succeed when it is made again: the answers 408, 429 and 5xx,
   lost connections, and bytes that differ from their checksum.
3. `sentence` says what happened to which path, and what to do; `explained` raises it as a `UserError`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from difffract_jax.config import UserError
from difffract_jax.storage.remote.addresses import EXTRAS, Address

PASSING = (408, 429, 500, 502, 503, 504)
"""Answers of HTTP after which the same request may succeed."""
LOGIN = {
    "gs": "log in with `gcloud auth application-default login`, or name a key file in GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, as `aws configure` does",
}
"""How to give credentials, by scheme."""
ROLES = {
    "gs": "roles/storage.objectViewer to read, roles/storage.objectUser to write",
    "s3": "s3:GetObject and s3:ListBucket to read, s3:PutObject and s3:DeleteObject to write",
}
"""What credentials must allow, by scheme."""


class StorageError(Exception):
    """Something went wrong between this process and a bucket.

    Attributes:
        passes: whether the same request may succeed when it is made again.
    """

    passes = False


class Answered(StorageError):
    """The bucket's server answered with an error."""

    def __init__(self, status: int, words: str = "", after: float | None = None, *, bucket: bool = False) -> None:
        """Keeps the answer.

        Args:
            status: of HTTP.
            words: the server's own, if any.
            after: seconds after which it wants to be asked again, if it says so.
            bucket: whether it says that the bucket itself does not exist.
        """
        super().__init__(f"{status} {words}".strip())
        self.status, self.words, self.after, self.bucket = status, words, after, bucket

    @property
    def passes(self) -> bool:
        """Whether the same request may succeed when it is made again."""
        return self.status in PASSING


class Unreachable(StorageError):
    """No connection, or one that broke off or took too long."""

    passes = True


class Damaged(StorageError):
    """Bytes came that differ from their checksum, or fewer than there are."""

    passes = True


class NoCredentials(StorageError):
    """There are no credentials on this machine, or none that work."""


@contextmanager
def explained(address: Address, doing: str) -> Iterator[None]:
    """Turns a `StorageError` within the context into a `UserError`.

    Args:
        address: what is read or written.
        doing: "read", "written", "listed" or "deleted".
    """
    try:
        yield
    except StorageError as error:
        raise UserError(sentence(error, address, doing)) from error


def sentence(error: StorageError, address: Address, doing: str) -> str:
    """Says in one sentence what happened to a path and what to do.

    Args:
        error: the last of all tries.
        address: what was to be read or written.
        doing: "read", "written", "listed" or "deleted".
    """
    if isinstance(error, NoCredentials):
        return f"{address} cannot be {doing} without credentials{_said(str(error))}; {LOGIN[address.scheme]}."
    if isinstance(error, Answered):
        return _answered(error, address, doing)
    if isinstance(error, Damaged):
        done = "read" if doing == "read" else "sent"
        return (
            f"{address} was {done}, but its bytes differ from its checksum each time{_said(str(error))}; check that "
            "nothing writes it meanwhile, and copy it to the bucket again."
        )
    return (
        f"{address} cannot be {doing}, since the network is lost or the server does not answer{_said(str(error))}; "
        "check the network, a proxy, and the endpoint if one is set, and run this again."
    )


def missing_extra(scheme: str) -> str:
    """Returns the sentence for a scheme whose client is not installed."""
    extra = EXTRAS[scheme]
    return f"Paths {scheme}:// need the extra `{extra}`; install it with pip install 'difffract_jax[{extra}]'."


def absent(address: Address) -> str:
    """Returns the sentence for what is not in its bucket."""
    return f"{address} does not exist; check the name, of which upper and lower case count."


def _answered(error: Answered, address: Address, doing: str) -> str:
    """Says what an answer of the server means."""
    scheme, said = address.scheme, _said(error.words)
    match error.status:
        case 401:
            return (
                f"{address} cannot be {doing}, since the server does not accept the credentials (401{said}); "
                f"{LOGIN[scheme]}."
            )
        case 403:
            return (
                f"{address} cannot be {doing}, since the credentials in use do not allow it (403{said}); ask the "
                f"bucket's owner for {ROLES[scheme]}, or use others: {LOGIN[scheme]}."
            )
        case 404 if error.bucket:
            return (
                f"There is no bucket {scheme}://{address.bucket} (404); check its name, or create it: buckets are not "
                "made on the way."
            )
        case 404:
            return absent(address)
        case 412 if doing == "read":
            return f"{address} was changed by another process while it was read; run this again."
        case 412:
            return f"{address} was changed by another process meanwhile; name another output."
        case 429:
            return (
                f"{address} cannot be {doing}, since the bucket's quota of requests is used up (429{said}); wait, run "
                "fewer processes on it at a time, or ask for a larger quota."
            )
        case status if status >= 500:
            return f"{address} cannot be {doing}, since the server fails ({status}{said}); run this again later."
        case status:
            return f"{address} cannot be {doing}: the server refuses the request ({status}{said})."


def _said(words: str) -> str:
    """Returns the server's words in brackets of their own, on one line and not too long."""
    text = " ".join(words.split()).rstrip(".")
    return f": {text[:160]}" if text else ""
