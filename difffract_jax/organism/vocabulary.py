"""The organism's two tokenizers: one token per word of the world, in the file formats of FLUX's.

1. `WORDS` is the closed vocabulary, in a fixed order; a token's id is its place in the files that ship with the model.
2. T5: a Unigram tokenizer with one piece per word and none for single characters, so that other words are unknown. Its
   configuration says `closed_vocabulary`, and `encode_prompt` therefore refuses unknown words by name.
3. CLIP: a byte-pair tokenizer whose merges rebuild every word, learned from the list of words; ties go to the pair that
   comes first in the alphabet, so that the result never changes.

They are made once and shipped. A tokenizer made again from another list would permute ids and ruin the model silently.
"""

from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

from difffract_jax.config import ORGANISMS
from difffract_jax.models.tokenizers import BYTE_SPACE, SPACE, Tokenizers, load_tokenizers
from difffract_jax.organism.captions import COLOUR_NAMES, SIZE_NAMES
from difffract_jax.organism.render import NOUNS

WORDS = (
    *("a", "an", "and", "at", "image", "is", "of", "on", "picture", "the", "there", "to", "with"),
    *("above", "below", "bottom", "left", "over", "right", "top", "under"),
    *COLOUR_NAMES,
    *SIZE_NAMES,
    *NOUNS,
)
"""Every word that captions use."""

TEXT_TOKENS, CLIP_TOKENS = 20, 21
"""Length of a prompt of at most 19 words: T5 closes it with a token, CLIP opens it with another. Captions have up to
16 words."""


CHAT_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
"""Special tokens of a language model that reads prompts as messages; the first fills them up."""
ROLES = ("user", "assistant")
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + ' ' + message.content + '<|im_end|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{%- endif %}{%- endif %}"
)
"""Qwen3's, but for a space where it has line breaks, so that every word of a prompt begins with one."""
CHAT_CODED = len(CHAT_SPECIAL) + len(ROLES) + 1 + len(WORDS)
"""Ids that prompts may have: special tokens, roles, a space alone, words. Those of letters follow."""
CHAT_TOKENS = TEXT_TOKENS - 1 + 7
"""Length of a message of at most 19 words: the template adds seven tokens."""


def make_tokenizers() -> Tokenizers:
    """Builds both tokenizers from the list of words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -9.0), *((SPACE + word, -1.0) for word in WORDS)]
    transformers = import_module("transformers")  # here alone: commands on the organism would wait a second for it
    t5 = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS, closed_vocabulary=True)
    symbols, merges = _learn_merges(WORDS)
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab = {symbol: number for number, symbol in enumerate([*symbols, start, end])}
    clip = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS)
    return Tokenizers(t5, clip, CLIP_TOKENS)


def make_sd3_tokenizers() -> Tokenizers:
    """Builds those of Stable Diffusion 3: T5's, and CLIP's twice."""
    made = make_tokenizers()
    return made._replace(clip_2=made.clip)


def make_chat_tokenizers() -> Tokenizers:
    """Builds that of a language model, as FLUX.2 has it: a byte-pair tokenizer of Qwen's kind, with a chat template."""
    spaced = tuple(BYTE_SPACE + word for word in WORDS)
    symbols, merges = _learn_merges((*ROLES, *WORDS), end="")
    # The space is joined last, so that no token but a word's begins with one.
    merges += [(BYTE_SPACE, word) for word in WORDS]
    coded = [*CHAT_SPECIAL, *ROLES, BYTE_SPACE, *spaced]
    vocab = {token: number for number, token in enumerate([*coded, *(one for one in symbols if one not in coded)])}
    tokenizer = import_module("transformers").Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in CHAT_SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CHAT_TOKENS,
        closed_vocabulary=True,
    )
    return Tokenizers(tokenizer, None, 0)


def chat_frame(vocab: dict[str, int]) -> tuple[list[int], int, list[int]]:
    """Returns the ids that the chat template puts before a prompt, that of an empty prompt, and those behind a prompt.

    Args:
        vocab: id of every token.
    """
    before = [vocab["<|im_start|>"], vocab["user"]]
    behind = [vocab[token] for token in ("<|im_end|>", "<|im_start|>", "assistant", "<think>", "</think>")]
    return before, vocab[BYTE_SPACE], behind


def reads_world(tokenizers: Any) -> bool:
    """Says whether a pipeline's tokenizers are those of the organism or of a sibling: they know its words alone.

    Args:
        tokenizers: of any pipeline.
    """
    reader = getattr(tokenizers, "t5", None)
    if reader is None or not reader.init_kwargs.get("closed_vocabulary"):
        return False
    spaces = (SPACE, BYTE_SPACE)
    return {piece[1:] for piece in reader.get_vocab() if piece[0] in spaces and len(piece) > 1} == set(WORDS)


def is_of_the_world(model: str) -> bool:
    """Says whether a model is the organism, or a pipeline's directory on this machine whose tokenizers `reads_world`.

    Args:
        model: as commands name it.
    """
    if model in ORGANISMS:
        return True
    files = (Path(model) / folder / "tokenizer_config.json" for folder in ("tokenizer", "tokenizer_2", "tokenizer_3"))
    # Most tokenizers are large: first, whether one says that it is the organism's.
    if not any(file.is_file() and b"closed_vocabulary" in file.read_bytes() for file in files):
        return False
    return reads_world(load_tokenizers(model))


def word_starts(tokenizers: Tokenizers) -> tuple[int, ...]:
    """Returns where in the text stream the words of a prompt begin; the last place is that of T5 or the language model.

    With two CLIPs the stream has the words twice: as CLIP's tokens, then as T5's.

    Args:
        tokenizers: the organism's, or a sibling's.
    """
    if tokenizers.chats:
        assert tokenizers.t5 is not None
        return (len(chat_frame(tokenizers.t5.get_vocab())[0]),)
    return (0,) if tokenizers.clip_2 is None else (1, tokenizers.clip_length)


def _learn_merges(words: tuple[str, ...], end: str = "</w>") -> tuple[list[str], list[tuple[str, str]]]:
    """Learns byte-pair merges until every word is one symbol; returns all symbols, words last, and the merges."""
    split = {word: [*word[:-1], f"{word[-1]}{end}"] for word in words}
    letters = sorted({symbol for symbols in split.values() for symbol in symbols})
    # CLIP's tokenizer knows every letter, at a word's end and within, so that it can spell what it does not know.
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    base = sorted({*alphabet, *(f"{letter}{end}" for letter in alphabet), *letters})
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in split.values() for pair in zip(symbols, symbols[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: _merge(symbols, best) for word, symbols in split.items()}
    made = ["".join(pair) for pair in merges]
    return [*base, *(symbol for symbol in made if symbol not in base)], merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Joins every occurrence of a pair, from the left."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined
