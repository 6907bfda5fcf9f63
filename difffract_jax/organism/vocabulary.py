"""The organism's two tokenizers: one token per word of the world, in the file formats of FLUX's.

1. `WORDS` is the closed vocabulary, in a fixed order; a token's id is its place in the files that ship with the model.
2. T5: a Unigram tokenizer with one piece per word and none for single characters, so that other words are unknown. Its
   configuration says `closed_vocabulary`, and `encode_prompt` therefore refuses unknown words by name.
3. CLIP: a byte-pair tokenizer whose merges rebuild every word, learned from the list of words; ties go to the pair that
   comes first in the alphabet, so that the result never changes.

They are made once and shipped. A tokenizer made again from another list would permute ids and ruin the model silently.
"""

from collections import Counter

from transformers import CLIPTokenizer, T5Tokenizer

from difffract_jax.models.tokenizers import SPACE, Tokenizers
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


def make_tokenizers() -> Tokenizers:
    """Builds both tokenizers from the list of words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -9.0), *((SPACE + word, -1.0) for word in WORDS)]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS, closed_vocabulary=True)
    symbols, merges = _learn_merges(WORDS)
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab = {symbol: number for number, symbol in enumerate([*symbols, start, end])}
    # The annotation says list[str], but a list holds pairs.
    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS)  # pyright: ignore[reportArgumentType]
    return Tokenizers(t5, clip, CLIP_TOKENS)


def _learn_merges(words: tuple[str, ...]) -> tuple[list[str], list[tuple[str, str]]]:
    """Learns byte-pair merges until every word is one symbol; returns all symbols, words last, and the merges."""
    split = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    letters = sorted({symbol for symbols in split.values() for symbol in symbols})
    # CLIP's tokenizer knows every letter, at a word's end and within, so that it can spell what it does not know.
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    base = sorted({*alphabet, *(f"{letter}</w>" for letter in alphabet), *letters})
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
