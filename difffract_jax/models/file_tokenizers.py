"""Tokenizers of `tokenizer.json` alone, where a configuration says all that transformers' classes would add.

1. `tokenizers`, in Rust, applies the file. What a class of transformers adds are the names of special tokens and the
   longest prompt; to import it takes as long as to draw an image of the organism.
2. Where `tokenizer_config.json` names all of them, and the file knows each as a special token, nothing is left to add:
   `plain_tokenizer` reads both files. Of anything less plain it says None, and transformers is asked as ever.
3. What only transformers can do, as to save a tokenizer, a `FileTokenizer` leaves to it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
NAMED_BESIDE = (CONFIG, "special_tokens_map.json", "added_tokens.json")
"""Files beside the vocabulary that name special tokens."""
SPECIAL = {
    "CLIPTokenizer": {"bos_token", "eos_token", "pad_token", "unk_token"},
    "T5Tokenizer": {"eos_token", "pad_token", "unk_token"},
}
"""Class of transformers -> the special tokens that it has."""
WITHOUT_EFFECT = {
    *("added_tokens_decoder", "backend", "clean_up_tokenization_spaces", "closed_vocabulary", "extra_ids"),
    *("extra_special_tokens", "is_local", "local_files_only", "model_max_length", "tokenizer_class"),
}
"""What a configuration may hold besides: nothing of it changes the tokens of a text, `split_special_tokens` would."""


class Encoded(NamedTuple):
    """One tokenised text.

    Attributes:
        input_ids: ids of its tokens, closing token included.
        offset_mapping: begin and end of each in the text.
    """

    input_ids: list[int]
    offset_mapping: list[tuple[int, int]]


@runtime_checkable
class TextTokenizer(Protocol):
    """What this package asks of a tokenizer: of transformers, or a `FileTokenizer`."""

    init_kwargs: dict[str, Any]
    model_max_length: Any
    pad_token_id: Any

    def __call__(self, *texts: Any, **options: Any) -> Any:
        """Returns a text's `input_ids`, and its `offset_mapping` with `return_offsets_mapping`."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Returns the id of every token."""
        ...

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Returns tokens by their ids."""
        ...


class FileTokenizer:
    """A tokenizer that its two files describe.

    Attributes:
        init_kwargs: its configuration.
        model_max_length: tokens of the longest text.
        pad_token_id: id of the token that fills texts up.
        bos_token_id: of the one that begins them; None where there is none.
        eos_token_id: of the one that closes them.
        unk_token_id: of the one for what the vocabulary lacks.
    """

    def __init__(self, backend: Tokenizer, config: dict[str, Any], full: Callable[[], Any]) -> None:
        """Takes what the files say.

        Args:
            backend: that applies the file.
            config: its configuration; it names every special token.
            full: returns the same as a class of transformers.
        """
        self.init_kwargs, self._backend, self._load, self._loaded = config, backend, full, None
        self.model_max_length: int = config["model_max_length"]
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        ids = [backend.token_to_id(config[name]) if name in config else None for name in names]
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.unk_token_id = ids

    def __call__(self, *texts: Any, return_offsets_mapping: bool = False, verbose: bool = True, **options: Any) -> Any:
        """Returns what transformers would: of one text its ids and offsets, as `Encoded`."""
        if len(texts) != 1 or not isinstance(texts[0], str) or options:
            return self._full()(*texts, return_offsets_mapping=return_offsets_mapping, verbose=verbose, **options)
        encoded = self._backend.encode(texts[0])
        return Encoded(encoded.ids, encoded.offsets)

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """Returns the id of every token."""
        return self._backend.get_vocab()

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """Returns a token by its id, or several."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        return [self._backend.id_to_token(one) for one in ids]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._full(), name)

    def _full(self) -> Any:
        """Returns the same as a class of transformers."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded


def plain_tokenizer(kind: str, model: type, home: Path, full: Callable[[], Any]) -> FileTokenizer | None:
    """Returns the tokenizer of a directory, if its two files say all there is to it; else None.

    Args:
        kind: class of transformers, one of `SPECIAL`.
        model: kind of model that its file must hold, of `tokenizers.models`.
        home: holds `tokenizer.json`.
        full: returns the same as that class.
    """
    if not (home / CONFIG).is_file() or any((home / name).is_file() for name in NAMED_BESIDE if name != CONFIG):
        return None
    try:
        config = json.loads((home / CONFIG).read_bytes())
        backend = Tokenizer.from_buffer((home / TOKENIZER).read_bytes())
    except ValueError:
        return None  # where transformers is asked, a sentence tells what is wrong
    return FileTokenizer(backend, config, full) if _is_plain(kind, model, config, backend) else None


def _is_plain(kind: str, model: type, config: Any, backend: Tokenizer) -> bool:
    """Says whether a class of transformers would add nothing to a tokenizer's file and its configuration."""
    if not isinstance(config, dict) or config.get("tokenizer_class") not in (kind, f"{kind}Fast"):
        return False
    tokens = {name: token for name, token in config.items() if name.endswith("_token")}
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    return (
        isinstance(backend.model, model)
        and backend.post_processor is not None
        and backend.truncation is None
        and backend.padding is None
        and tokens.keys() == SPECIAL[kind]
        and config.keys() <= tokens.keys() | WITHOUT_EFFECT
        and all(isinstance(token, str) and token in known for token in tokens.values())
        and not config.get("extra_special_tokens")
        and type(config.get("model_max_length")) is int
    )
