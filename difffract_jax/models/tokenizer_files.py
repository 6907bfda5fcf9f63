"""Tokenizers from their files, applied as the files say.

1. Files that say all by themselves need nothing else: `file_tokenizers` reads them.
2. Else the class of transformers names the special tokens, from `tokenizer_config.json`. It would rebuild the tokenizer
   from the vocabulary alone, with the normaliser and the pre-tokeniser that the class usually has.
3. Hence the tokenizer that does the work is `tokenizer.json` itself, as `tokenizers` reads it.
4. Files that begin with a byte order mark, as an editor leaves them, are read from copies without: neither library
   takes them.
5. Older releases have T5's SentencePiece model, `spiece.model`, instead. transformers' converter turns it into a
   `tokenizer.json`; it needs protobuf, but not the package sentencepiece. CLIP's may be `vocab.json` and `merges.txt`.

transformers is imported when a file needs it: that takes a second, which most runs of the organism would wait for.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram

from difffract_jax.config import UserError
from difffract_jax.models.chat_prompts import check_chat_tokenizer
from difffract_jax.models.file_tokenizers import CONFIG, NAMED_BESIDE, TOKENIZER, TextTokenizer, plain_tokenizer
from difffract_jax.text_files import MARKS, decoded

SPIECE = "spiece.model"
TEMPLATE = "chat_template.jinja"
TEXTS = (TOKENIZER, "vocab.json", "merges.txt", TEMPLATE, *NAMED_BESIDE)
CLOSING = "</s>"
UNIGRAM = 1
"""SentencePiece's number for this kind of model."""
EXTRA_IDS = 100
"""Sentinel tokens `<extra_id_N>` of a T5 whose configuration does not tell their number."""

MODELS: dict[str, type] = {"CLIPTokenizer": BPE, "T5Tokenizer": Unigram, "Qwen2Tokenizer": BPE}
"""Kind of model in `tokenizer.json` by class of transformers."""


def load_clip(home: Path) -> TextTokenizer:
    """Loads CLIP's tokenizer.

    Args:
        home: holds `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Raises:
        UserError: if files are missing or broken.
    """
    files = _require(home, (TOKENIZER,), ("vocab.json", "merges.txt"))
    with _unmarked(home) as folder:
        if files == (TOKENIZER,):
            return _loaded("CLIPTokenizer", folder, home)
        return _named("CLIPTokenizer", folder, home)


def load_t5(home: Path) -> TextTokenizer:
    """Loads T5's tokenizer.

    Args:
        home: holds `tokenizer.json`, or `spiece.model`.

    Raises:
        UserError: if files are missing or broken.
    """
    found = _require(home, (TOKENIZER,), (SPIECE,))
    with _unmarked(home) as unmarked:
        if found == (TOKENIZER,):
            return _loaded("T5Tokenizer", unmarked, home)
        with tempfile.TemporaryDirectory() as folder:
            for name in NAMED_BESIDE:
                if (unmarked / name).is_file():
                    shutil.copyfile(unmarked / name, Path(folder) / name)
            _from_sentencepiece(home).save(str(Path(folder) / TOKENIZER))
            return _applied("T5Tokenizer", Path(folder), origin=home)


def is_qwen(home: Path) -> bool:
    """Says whether a directory holds the tokenizer of a Qwen language model, by the class that it names."""
    return _class_in(home).startswith("Qwen2")


def is_t5(home: Path) -> bool:
    """Says whether a directory holds a tokenizer of T5, by the class that it names, or else by its model."""
    return _class_in(home).startswith("T5") or (not _class_in(home) and (home / SPIECE).is_file())


def is_clip(home: Path) -> bool:
    """Says whether a directory holds a tokenizer of CLIP, by the class that it names."""
    return _class_in(home).startswith("CLIP")


def _class_in(home: Path) -> str:
    """Returns the class that a tokenizer's directory names; "" where it names none."""
    file = home / CONFIG
    if not file.is_file():
        return ""
    try:
        config = json.loads(decoded(file.read_bytes()))
    except ValueError:
        return ""
    return str(config.get("tokenizer_class", "")) if isinstance(config, dict) else ""


def load_qwen(home: Path) -> TextTokenizer:
    """Loads the tokenizer of a Qwen language model.

    Args:
        home: holds `tokenizer.json`, and the chat template in a file of its own or in `tokenizer_config.json`.

    Raises:
        UserError: if files are missing or broken, or there is no template.
    """
    _require(home, (TOKENIZER,))
    with _unmarked(home) as folder:
        made = _applied("Qwen2Tokenizer", folder, origin=home)
    check_chat_tokenizer(made, home)
    return made


@contextmanager
def _unmarked(home: Path) -> Iterator[Path]:
    """Yields a directory with the same tokenizer and without byte order marks: itself, where it has none."""
    texts = {name: home / name for name in TEXTS if (home / name).is_file()}
    if not any(path.read_bytes().startswith(tuple(mark for mark, _ in MARKS)) for path in texts.values()):
        yield home
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, path in texts.items():
            (Path(folder) / name).write_bytes(decoded(path.read_bytes()).encode())
        yield Path(folder)


def _loaded(kind: str, folder: Path, home: Path) -> TextTokenizer:
    """Returns a tokenizer of `tokenizer.json`: without transformers, where that would add nothing.

    Args:
        kind: class of transformers.
        folder: holds the files without byte order marks.
        home: where they come from.
    """
    if folder == home:
        plain = plain_tokenizer(kind, MODELS[kind], home, lambda: _applied(kind, home))
        if plain is not None:
            return plain
    return _applied(kind, folder, origin=home)


def _applied(kind: str, home: Path, *, origin: Path | None = None) -> Any:
    """Returns a tokenizer of a class of transformers that does what `tokenizer.json` says.

    Args:
        kind: the class.
        home: holds `tokenizer.json` and what names its special tokens.
        origin: directory that errors name, where it is another one.
    """
    file, read = (origin or home) / TOKENIZER, (home / TOKENIZER).read_bytes()
    try:
        backend = Tokenizer.from_buffer(read)
    except ValueError as error:
        raise UserError(f"{file} is not a tokenizer ({_brief(error)}); copy it again from the pipeline.") from None
    if not isinstance(backend.model, MODELS[kind]):
        raise UserError(
            f"{file} holds a {type(backend.model).__name__} model, but that of a {kind} is "
            f"{MODELS[kind].__name__}; copy it again from the pipeline."
        )
    made = _named(kind, home, origin or home)
    tokens = {name: str(token) for name, token in made.special_tokens_map.items() if isinstance(token, str)}
    absent = [f"{token} ({name})" for name, token in tokens.items() if backend.token_to_id(token) is None]
    if absent:
        raise UserError(
            f"The tokenizer in {origin or home} lacks tokens that its {CONFIG} names: {', '.join(absent)}; copy the "
            "files again from the pipeline."
        )
    # As transformers has it, special tokens are found in a prompt whether the file lists them or not.
    listed = {token.content for token in backend.get_added_tokens_decoder().values()}
    unlisted = [token for token in dict.fromkeys(tokens.values()) if token not in listed]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unlisted])
    if backend.post_processor is None:
        backend.post_processor = made.backend_tokenizer.post_processor
    made._tokenizer = backend
    return made


def _named(kind: str, home: Path, origin: Path) -> Any:
    """Returns what transformers makes of a directory."""
    try:
        made = getattr(import_module("transformers"), kind).from_pretrained(home, local_files_only=True)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise UserError(f"transformers cannot load {origin} as a {kind} ({_brief(error)}); copy it again.") from None
    if made.pad_token_id is None:
        raise UserError(f"The tokenizer in {origin} names no token for padding in its {CONFIG}; copy it again.")
    if not isinstance(made.model_max_length, int | float):
        raise UserError(
            f"{origin / CONFIG} has model_max_length={made.model_max_length!r} instead of a number; copy it again."
        )
    return made


def _from_sentencepiece(home: Path) -> Tokenizer:
    """Converts T5's SentencePiece model."""
    config = json.loads(decoded((home / CONFIG).read_bytes())) if (home / CONFIG).is_file() else {}
    file, extra_ids = home / SPIECE, config.get("extra_ids", EXTRA_IDS)
    if type(extra_ids) is not int:
        raise UserError(f"{home / CONFIG} has extra_ids={extra_ids!r} instead of a whole number; copy it again.")
    # What the converter asks of a tokenizer; T5 closes a text with a token that its model has.
    stand_in = SimpleNamespace(vocab_file=str(file), _extra_ids=extra_ids)
    try:
        converter: Any = import_module("transformers.convert_slow_tokenizer").T5Converter(stand_in)
    except DecodeError:
        raise UserError(f"{file} is not a SentencePiece model; copy it again from the pipeline.") from None
    ids = {piece.piece: number for number, piece in enumerate(converter.proto.pieces)}
    if converter.proto.trainer_spec.model_type != UNIGRAM or CLOSING not in ids:
        raise UserError(f"{file} is not T5's: that is a Unigram model with the token {CLOSING}; copy it again.")
    stand_in.convert_tokens_to_ids = ids.__getitem__
    return converter.converted()


def _require(home: Path, *choices: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the first complete choice of files; refuses a directory that has none, or broken JSON.

    transformers would make up a tokenizer of four words instead.
    """
    complete = [files for files in choices if all((home / name).is_file() for name in files)]
    if not complete:
        wanted = ", or ".join(" and ".join(files) for files in choices)
        raise UserError(f"{home} lacks the files of a tokenizer: it must hold {wanted}; copy them from the pipeline.")
    read = [*complete[0], *(name for name in NAMED_BESIDE if (home / name).is_file())]
    for path in (home / name for name in read if name.endswith(".json")):
        try:
            content = json.loads(decoded(path.read_bytes()))
        except ValueError as error:
            raise UserError(f"{path} is not readable as JSON ({error}); copy it again from the pipeline.") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no JSON object; copy it again from the pipeline.")
    return complete[0]


def _brief(error: Any) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
