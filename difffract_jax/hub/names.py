"""Names of repositories on the Hugging Face Hub, as they are written where a directory could stand (pure Python).

    hf:OWNER/NAME[@REV][/FOLDER]    always the hub; REV is a branch, tag or commit, main when left out
    OWNER/NAME                      the hub, unless a file or folder OWNER/NAME, or a folder OWNER, lies here

A slash within REV is written %2F, but for refs/pr/N and refs/convert/NAME, as in the hub's own `hf://` addresses.
Colons do not occur: `hf:OWNER/NAME:SPLIT:COLUMN` is a data set of prompts, which only the setting `prompts` takes.
"""

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from difffract_jax.config import UserError

PREFIX = "hf:"
_WORD = r"\w(?:[\w.-]*\w)?"
_REPOSITORY = rf"{_WORD}/{_WORD}"
_REVISION = r"refs/(?:pr|convert)/[^/@:]+|[^/@:]+"
_NAME = re.compile(rf"hf:({_REPOSITORY})(?:@({_REVISION}))?(?:/([^@:]+))?", re.ASCII)
_BARE = re.compile(_REPOSITORY, re.ASCII)
# `Path` joins slashes in a row into one, so that an address that went through it has one.
_ADDRESS = re.compile(rf"(?:https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:/+)({_REPOSITORY})(/.*)?", re.ASCII)
FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".npz", ".json", ".yaml", ".yml", ".txt")
"""Suffixes of files; no bare name that ends in one is taken for a repository."""


class HubName(NamedTuple):
    """A repository, or a folder or file in it.

    Attributes:
        repository: OWNER/NAME.
        revision: branch, tag or commit; None for the default branch.
        folder: path within the repository; "" for its root.
    """

    repository: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        """Returns the name as `parse_hub_name` reads it."""
        keep = "/" if (self.revision or "").startswith(("refs/pr/", "refs/convert/")) else ""
        revision = "" if self.revision is None else f"@{quote(self.revision, safe=keep)}"
        return f"{PREFIX}{self.repository}{revision}{'/' * bool(self.folder)}{self.folder}"


def parse_hub_name(text: str, *, revision: str | None = None, subfolder: str | None = None) -> HubName | None:
    """Reads the name of a repository.

    Args:
        text: what stands where a directory could.
        revision: branch, tag or commit, given beside the name.
        subfolder: path within the repository, given beside the name; it follows the name's own.

    Returns:
        The name; None if the text names no repository, but a directory, a file or something embedded.

    Raises:
        UserError: if it begins like a name on the hub and is none, or names two revisions.

    Example:
        >>> parse_hub_name("hf:someone/flux@v1/transcoders")
        HubName(repository='someone/flux', revision='v1', folder='transcoders')
        >>> parse_hub_name("./flux") is None
        True
    """
    address = _ADDRESS.fullmatch(text)
    if address is not None:
        if address[1].startswith(("datasets/", "spaces/")):
            raise UserError(f"{text} is not the address of a model; give a repository of a model as hf:OWNER/NAME.")
        raise UserError(f"{text} is an address; write {PREFIX}{address[1]} for that repository.")
    if text.startswith(PREFIX):
        name = _read(text)
    elif _is_bare(text):
        name = HubName(text)
    else:
        return None
    if revision is not None and name.revision is not None and revision != name.revision:
        raise UserError(f"{text} names a revision, and revision={revision!r} another; give one of them.")
    folders = [folder.strip("/") for folder in (name.folder, subfolder or "")]
    return HubName(name.repository, revision or name.revision, "/".join(filter(None, folders)))


def _read(text: str) -> HubName:
    """Reads a name with its prefix."""
    match = _NAME.fullmatch(text.rstrip("/"))
    if match is None or {"..", "."} & {*(match[3] or "").split("/")}:
        data = f"; {text} would be a data set of prompts" if ":" in text.removeprefix(PREFIX) else ""
        raise UserError(
            f"{text} does not name a model repository on the hub{data}; write hf:OWNER/NAME, "
            "hf:OWNER/NAME@REVISION or hf:OWNER/NAME/FOLDER, as in hf:black-forest-labs/FLUX.1-schnell."
        )
    return HubName(match[1], unquote(match[2]) if match[2] else None, (match[3] or "").strip("/"))


def _is_bare(text: str) -> bool:
    """Says whether a text is OWNER/NAME, and nothing here could be meant by it."""
    if _BARE.fullmatch(text) is None or text.lower().endswith(FILES):
        return False
    return not Path(text).exists() and not Path(text).parent.exists()
