"""What went wrong with a repository on the hub, in one sentence that says what to do.

`explained` turns every error that the client raises into a `UserError`. Errors that have another error as their cause
are explained by that cause: the client wraps a connection that failed into "the file is not in the cache".
"""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from difffract_jax.config import UserError
from difffract_jax.hub.names import HubName

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def client(module: str = "") -> Any:
    """Imports `huggingface_hub`, or a module of it; raises `UserError` where it is not installed."""
    try:
        return import_module(f"huggingface_hub{'.' * bool(module)}{module}")
    except ImportError:
        raise UserError(
            "Names on the Hugging Face Hub need the extra `hub`; install it with pip install 'difffract_jax[hub]'."
        ) from None


def client_errors() -> tuple[type[Exception], ...]:
    """Returns what the client raises: answers of the hub, connections, disks, Xet's own, and answers not of the hub."""
    errors = client("errors")
    return (
        *(errors.HTTPError, OSError, RuntimeError, json.JSONDecodeError, errors.HFValidationError),
        *(errors.EntryNotFoundError, errors.XetDownloadError, errors.RevisionResolutionError),
    )


@contextmanager
def explained(name: HubName, *, downloading: bool = False) -> Iterator[None]:
    """Turns the client's errors within the context into a `UserError`.

    Args:
        name: the repository that is asked for.
        downloading: whether files are fetched, and the hub has answered before.
    """
    try:
        yield
    except client_errors() as error:
        raise UserError(sentence(error, name, downloading)) from error


def is_unreachable(error: BaseException) -> bool:
    """Says whether an error means that the hub cannot be reached or does not work now, not that it refuses."""
    errors = client("errors")
    if isinstance(error, errors.HfHubHTTPError):
        status = _response(error).status_code
        return status >= 500 or status == 429
    return isinstance(error, errors.HTTPError | ConnectionError | TimeoutError | json.JSONDecodeError)


def sentence(error: BaseException, name: HubName, downloading: bool) -> str:
    """Says in one sentence what happened and what to do.

    Args:
        error: what the client raised.
        name: the repository.
        downloading: whether files were being fetched.
    """
    errors, repository = client("errors"), name.repository
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return sentence(error.__cause__, name, downloading)
    if isinstance(error, errors.GatedRepoError):
        return _gated(repository)
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{repository} has no revision {name.revision or 'main'}; its branches and tags are listed at "
            f"https://huggingface.co/{repository}/tree/main."
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        path = str(_response(error).url).partition("/resolve/")[2].partition("/")[2].partition("?")[0]
        return f"{repository} has no file {path or name.folder}, though the hub lists it; give another revision."
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, repository)
    if isinstance(error, errors.HFValidationError):
        return f"{repository} is not a possible name of a repository ({_brief(error)}); write hf:OWNER/NAME."
    return _broken(error, repository, downloading)


def _response(error: Any) -> Any:
    """Returns the hub's answer; type checkers do not know the client, which is optional."""
    return error.response


def _gated(repository: str) -> str:
    """Returns the steps to a gated repository."""
    token = client().get_token()
    login = (
        "log in with `hf auth login`, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens"
        if token is None
        else "make sure that the token in use (`hf auth whoami`) is of the account that accepted it, and may read "
        "gated repositories (https://huggingface.co/settings/tokens)"
    )
    return (
        f"{repository} is gated, and access was refused: (1) sign in and accept its licence at "
        f"https://huggingface.co/{repository}, (2) {login}, (3) run this again."
    )


def _refused(error: Any, repository: str) -> str:
    """Says what an answer of the hub means that has no class of its own."""
    status, words = error.response.status_code, error.response.headers.get("X-Error-Message", "")
    if status == 401 and "credentials" in words:
        return (
            "The hub does not accept the access token in use; log in again with `hf auth login`, or set HF_TOKEN to a "
            "token from https://huggingface.co/settings/tokens, or unset it for what is public."
        )
    if isinstance(error, client("errors").RepositoryNotFoundError) or status in (401, 404):
        return (
            f"There is no model repository {repository} on the hub, or no access to it; check the name, write a folder "
            f"of this machine as ./{repository}, and for a private or gated repository open "
            f"https://huggingface.co/{repository}, signed in, and log in here with `hf auth login` or HF_TOKEN."
        )
    if status == 403:
        return (
            f"The hub refuses access to {repository} (403); if it is gated, sign in and accept its licence at "
            f"https://huggingface.co/{repository}, check at https://huggingface.co/settings/tokens that the token in "
            "use may read it, log in again with `hf auth login` or HF_TOKEN, and run this again."
        )
    return f"The hub answered {status} for {repository}; it is overloaded or down, so run this again later."


def _broken(error: BaseException, repository: str, downloading: bool) -> str:
    """Says what a connection, a disk or an answer means that failed."""
    cache = client("constants").HF_HUB_CACHE
    number = getattr(error, "errno", None)
    if number in FULL:
        return (
            f"The disk of {cache} is full; free some space, or keep the cache elsewhere with HF_HOME=FOLDER, and run "
            "this again: files that are complete are not downloaded again."
        )
    if number in REFUSED:
        return f"The cache {cache} cannot be written ({_brief(error)}); give a folder that can with HF_HOME=FOLDER."
    if isinstance(error, json.JSONDecodeError):
        return (
            f"What answered at {client('constants').ENDPOINT} is not the hub (its answer on {repository} is not JSON); "
            "check the network's login page or proxy, and HF_ENDPOINT."
        )
    if downloading:
        return (
            f"The download of {repository} broke off ({_brief(error)}); run this again: files that are complete are "
            "not downloaded again."
        )
    return (
        f"The hub cannot be reached ({_brief(error)}), and the cache {cache} holds no copy of {repository}; check the "
        f"network, or on a machine that has one run `hf download {repository}`, bring the folder here, and give it in "
        "place of the name."
    )


def _brief(error: BaseException) -> str:
    """Returns an error in a few words, on one line."""
    words = " ".join(str(error).split()).rstrip(".")
    return words[:160] if words else type(error).__name__
