"""Prompts to token ids, as FLUX has them: T5 ids for the text stream, CLIP ids for the pooled vector.

1. Load both tokenizers from a pipeline directory: `tokenizer/` (CLIP: `tokenizer.json`, or `vocab.json` and
   `merges.txt` as the FLUX.1 releases have it) and `tokenizer_2/` (T5: `tokenizer.json`, or `spiece.model`).
2. Tokenise the prompt with each, closing token included.
3. Too long: keep the first `length - 1` tokens and the closing one; what T5 loses is reported in the prompt's own
   words. Too short: fill up with the tokenizer's padding token.

4. A T5 tokenizer whose configuration says `closed_vocabulary` (the organism's) has no token for unknown words: there,
   capitals and punctuation are dropped, and any other word is refused by name.

Everything here is NumPy; PyTorch is not needed and not loaded.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32
from transformers import CLIPTokenizer, T5Tokenizer

from difffract_jax.config import UserError, nearest
from difffract_jax.models.tokenizer_files import load_clip, load_t5
from difffract_jax.text_files import unicode_problem

SPACE = "\u2581"
"""What a T5 piece begins with that begins a word."""
LONGEST_CLIP = 10_000
"""transformers says 1e30 where a tokenizer names no length of its own; no CLIP has as many positions as this."""


class Tokenizers(NamedTuple):
    """The two tokenizers of a pipeline.

    Attributes:
        t5: tokenizer of the text stream.
        clip: tokenizer of the pooled vector.
        clip_length: tokens every CLIP prompt is padded to.
    """

    t5: T5Tokenizer
    clip: CLIPTokenizer
    clip_length: int


class TokenIds(NamedTuple):
    """One tokenised prompt.

    Attributes:
        t5_ids: ids for T5, padded to the text length.
        t5_mask: True for the prompt's own tokens, the closing `</s>` included; False for padding.
        clip_ids: ids for CLIP, padded to its length.
        cut: the end of the prompt that did not fit into the T5 ids; empty where all did.
    """

    t5_ids: Int32[np.ndarray, "txt"]
    t5_mask: Bool[np.ndarray, "txt"]
    clip_ids: Int32[np.ndarray, "clip"]
    cut: str


def load_tokenizers(directory: str | Path) -> Tokenizers:
    """Loads both tokenizers of a pipeline directory, from its files alone.

    Args:
        directory: holds `tokenizer/` (CLIP) and `tokenizer_2/` (T5).

    Returns:
        The tokenizers and CLIP's length.

    Raises:
        UserError: if files are missing or broken, or CLIP's tokenizer names no length.
    """
    clip_home, t5_home = Path(directory) / "tokenizer", Path(directory) / "tokenizer_2"
    clip, t5 = load_clip(clip_home), load_t5(t5_home)
    if not 2 <= clip.model_max_length <= LONGEST_CLIP:
        raise UserError(
            f"{clip_home} does not say how long CLIP's prompts are; "
            "a tokenizer_config.json with model_max_length (77 in FLUX.1) is needed there."
        )
    return Tokenizers(t5, clip, clip.model_max_length)


def encode_prompt(tokenizers: Tokenizers, prompt: str, text_tokens: int) -> TokenIds:
    """Tokenises one prompt for both encoders.

    Args:
        tokenizers: from `load_tokenizers`.
        prompt: any text, also the empty one.
        text_tokens: length of the T5 ids, padding and closing token included.

    Returns:
        The ids, which of the T5 ids are the prompt's, and what had to be cut off.

    Raises:
        UserError: if `text_tokens` leaves no room for a token, the prompt holds lone surrogates, or a closed vocabulary
            lacks a word.
    """
    if text_tokens < 1:
        raise UserError(f"text_tokens must be at least 1, but got {text_tokens}; FLUX.1 was trained with 256 or 512.")
    problem = unicode_problem(prompt)
    if problem:
        raise UserError(f"The prompt is not valid Unicode: it {problem}.")
    if tokenizers.t5.init_kwargs.get("closed_vocabulary"):
        prompt = _known_words(tokenizers.t5, prompt)
    # verbose=False: a prompt longer than the tokenizer's own length is reported below, not in transformers' log.
    t5 = tokenizers.t5(prompt, return_offsets_mapping=True, verbose=False)
    clip = tokenizers.clip(prompt, verbose=False)
    return TokenIds(
        _fit(t5.input_ids, text_tokens, tokenizers.t5.pad_token_id),
        np.arange(text_tokens) < len(t5.input_ids),
        _fit(clip.input_ids, tokenizers.clip_length, tokenizers.clip.pad_token_id),
        "" if len(t5.input_ids) <= text_tokens else prompt[t5.offset_mapping[text_tokens - 1][0] :].strip(),
    )


def _fit(ids: list[int], length: int, padding: Any) -> Int32[np.ndarray, "length"]:
    """Cuts before the closing token, or pads after it."""
    kept = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
    return np.array(kept + [padding] * (length - len(kept)), np.int32)


def _known_words(t5: T5Tokenizer, prompt: str) -> str:
    """Returns a prompt in lower case without punctuation; refuses it if a closed vocabulary lacks one of its words."""
    words = re.sub(r"[^\w\s]", " ", prompt.lower()).split()
    known = sorted(piece[1:] for piece in t5.get_vocab() if piece[0] == SPACE and len(piece) > 1)
    unknown = [word for word in dict.fromkeys(words) if word not in known]
    if unknown:
        problems = "; ".join(f"`{word}`{nearest(word, known)}".rstrip(".") for word in unknown)
        raise UserError(f"The model's vocabulary of {len(known)} words lacks {problems}.")
    return " ".join(words)
