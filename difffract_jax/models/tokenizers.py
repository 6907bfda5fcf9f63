"""Prompts to token ids, as FLUX has them: T5 ids for the text stream, CLIP ids for the pooled vector.

1. Load both tokenizers from a pipeline directory: `tokenizer/` (CLIP: `tokenizer.json`, or `vocab.json` and
   `merges.txt` as the FLUX.1 releases have it) and `tokenizer_2/` (T5: `tokenizer.json`, or `spiece.model`).
2. Tokenise the prompt with each, closing token included.
3. Too long: keep the first `length - 1` tokens and the closing one; what T5 loses is reported in the prompt's own
   words. Too short: fill up with the tokenizer's padding token.

4. Stable Diffusion 3 has two CLIPs: `tokenizer/` and `tokenizer_2/`, and T5's in `tokenizer_3/` if it has T5. The text
   stream begins with the first CLIP's tokens, and T5's follow.
5. A model without pooled text has one tokenizer, in `tokenizer/`: T5's, or a language model's, which `chat_prompts`
   applies. The tokens that its template adds are told apart from the prompt's own: they are written <|...|>.
6. A tokenizer of the text stream whose configuration says `closed_vocabulary` (the organism's) has no token for unknown
   words: there, capitals and punctuation are dropped, and any other word is refused by name.

Everything here is NumPy; PyTorch is not needed and not loaded.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from difffract_jax.config import UserError, nearest, told_together
from difffract_jax.models.chat_prompts import chat_prompt
from difffract_jax.models.file_tokenizers import TextTokenizer
from difffract_jax.models.tokenizer_files import is_clip, is_qwen, is_t5, load_clip, load_qwen, load_t5
from difffract_jax.text_files import unicode_problem

SPACE = "\u2581"
"""What a T5 piece begins with that begins a word."""
BYTE_SPACE = "\u0120"
"""What a token of a byte-level tokenizer, as Qwen's, begins with that begins a word."""
WORD_END = "</w>"
"""What a token of CLIP ends with that ends a word."""
PADDING = "<pad>"
"""T5's padding."""
LONGEST_CLIP = 10_000
"""transformers says 1e30 where a tokenizer names no length of its own; no CLIP has as many positions as this."""


class Tokenizers(NamedTuple):
    """The tokenizers of a pipeline.

    Attributes:
        t5: tokenizer of the text stream: T5's, or a language model's; None for two CLIPs without T5.
        clip: tokenizer of the pooled vector; None for models without.
        clip_length: tokens every CLIP prompt is padded to.
        clip_2: of the second CLIP; None for models without.
        thinking: whether a language model's chat template leaves room for thinking.
    """

    t5: TextTokenizer | None
    clip: TextTokenizer | None
    clip_length: int
    clip_2: TextTokenizer | None = None
    thinking: bool = False

    @property
    def chats(self) -> bool:
        """Whether prompts are messages to a language model, whose template stands around them."""
        return self.clip is None and getattr(self.t5, "chat_template", None) is not None

    def folders(self) -> dict[str, Any]:
        """Returns folder of a pipeline's directory -> the tokenizer that lies there."""
        if self.clip_2 is not None:
            clips = {"tokenizer": self.clip, "tokenizer_2": self.clip_2}
            return clips if self.t5 is None else clips | {"tokenizer_3": self.t5}
        return {"tokenizer": self.t5} if self.clip is None else {"tokenizer": self.clip, "tokenizer_2": self.t5}

    def pieces(self, ids: Int32[np.ndarray, "token"]) -> list[str]:
        """Returns tokens of the text stream as T5 writes them: a space is `SPACE`, padding is `PADDING`.

        Args:
            ids: of the tokens; with two CLIPs, of the whole stream.
        """
        numbers = ids.tolist()
        if self.clip_2 is not None:
            return [*self._clip_pieces(numbers[: self.clip_length]), *self._t5_pieces(numbers[self.clip_length :])]
        assert self.t5 is not None
        if not self.chats:
            return self.t5.convert_ids_to_tokens(numbers)
        padding = self.t5.pad_token_id
        return [PADDING if one == padding else str(self.t5.decode([one])).replace(" ", SPACE) for one in numbers]

    def _t5_pieces(self, numbers: list[int]) -> list[str]:
        return [PADDING] * len(numbers) if self.t5 is None else self.t5.convert_ids_to_tokens(numbers)

    def _clip_pieces(self, numbers: list[int]) -> list[str]:
        """Writes CLIP's tokens, which mark where a word ends, as T5's, which mark where one begins."""
        assert self.clip is not None
        written, begins = [], False
        for token in self.clip.convert_ids_to_tokens(numbers):
            if token == self.clip.eos_token:
                return [*written, token, *[PADDING] * (len(numbers) - len(written) - 1)]
            written.append((SPACE if begins else "") + token.removesuffix(WORD_END))
            begins = token.endswith(WORD_END) or token == self.clip.bos_token
        return written

    def encode(self, prompt: str, text_tokens: int) -> "TokenIds":
        """Tokenises one prompt; arguments and errors as for `encode_prompt`."""
        if self.t5 is not None and self.t5.init_kwargs.get("closed_vocabulary"):
            prompt = _known_words(self.t5, prompt)
        if self.clip_2 is not None:
            return _two_clips(self, prompt, text_tokens)
        assert self.t5 is not None
        if self.chats:
            chat = chat_prompt(self.t5, prompt, text_tokens, thinking=self.thinking)
            return TokenIds(chat.ids, chat.mask, np.zeros(0, np.int32), chat.cut, chat.template)
        # verbose=False: a prompt longer than the tokenizer's own length is reported below, not in transformers' log.
        t5 = self.t5(prompt, return_offsets_mapping=True, verbose=False)
        clip = None if self.clip is None else self.clip(prompt, verbose=False)
        return TokenIds(
            _fit(t5.input_ids, text_tokens, self.t5.pad_token_id),
            np.arange(text_tokens) < len(t5.input_ids),
            np.zeros(0, np.int32) if clip is None else _fit(clip.input_ids, self.clip_length, self.clip.pad_token_id),
            "" if len(t5.input_ids) <= text_tokens else prompt[t5.offset_mapping[text_tokens - 1][0] :].strip(),
        )


@runtime_checkable
class PromptReader(Protocol):
    """What a pipeline's `tokenizers` must offer where it is run from Python; `Tokenizers` does."""

    def encode(self, prompt: str, text_tokens: int) -> "TokenIds":
        """Returns the ids of one prompt, `text_tokens` of them."""
        ...

    def pieces(self, ids: Int32[np.ndarray, "token"]) -> list[str]:
        """Returns the tokens of the text stream as words: a space before one is `SPACE`, padding is `PADDING`."""
        ...


class TokenIds(NamedTuple):
    """One tokenised prompt.

    Attributes:
        t5_ids: ids for T5, padded to the text length; behind those for the first of two CLIPs.
        t5_mask: True for the prompt's own tokens, the closing `</s>` included; False for padding.
        clip_ids: ids for CLIP, padded to its length; with two CLIPs those for the first, then those for the second.
        cut: the end of the prompt that did not fit into the T5 ids; empty where all did.
        template: True for tokens that a chat template adds around the prompt; None where there is none.
    """

    t5_ids: Int32[np.ndarray, "txt"]
    t5_mask: Bool[np.ndarray, "txt"]
    clip_ids: Int32[np.ndarray, "clip"]
    cut: str
    template: Bool[np.ndarray, "txt"] | None = None


def load_tokenizers(directory: str | Path, *, thinking: bool = False) -> Tokenizers:
    """Loads the tokenizers of a pipeline directory, from its files alone.

    Args:
        directory: holds `tokenizer/` (CLIP) and `tokenizer_2/` (T5, or a second CLIP, with T5 in `tokenizer_3/` if
            there is T5), or `tokenizer/` alone (Qwen, or T5).
        thinking: see `Tokenizers`.

    Returns:
        The tokenizers and CLIP's length.

    Raises:
        UserError: if files are missing or broken, or CLIP's tokenizer names no length.
    """
    clip_home, t5_home = Path(directory) / "tokenizer", Path(directory) / "tokenizer_2"
    if is_qwen(clip_home) or is_t5(clip_home):
        return Tokenizers((load_qwen if is_qwen(clip_home) else load_t5)(clip_home), None, 0, thinking=thinking)
    two = is_clip(t5_home)  # the second of two CLIPs stands where T5 is elsewhere
    clip, last = load_clip(clip_home), Path(directory) / "tokenizer_3"
    t5 = load_t5(last if two else t5_home) if last.is_dir() or not two else None
    if not 2 <= clip.model_max_length <= LONGEST_CLIP:
        raise UserError(
            f"{clip_home} does not say how long CLIP's prompts are; "
            "a tokenizer_config.json with model_max_length (77 in FLUX.1) is needed there."
        )
    return Tokenizers(t5, clip, clip.model_max_length, load_clip(t5_home) if two else None)


def encode_prompt(tokenizers: PromptReader, prompt: str, text_tokens: int) -> TokenIds:
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
        raise UserError(f"text_tokens must be at least 1, but got {text_tokens}; FLUX was trained with 256 or 512.")
    problem = unicode_problem(prompt)
    if problem:
        raise UserError(f"The prompt is not valid Unicode: it {problem}.")
    return tokenizers.encode(prompt, text_tokens)


def written_tokens(tokenizers: PromptReader, ids: TokenIds) -> list[str]:
    """Returns the tokens of the text stream as graphs and pages write them: those of a chat template as <|...|>.

    Args:
        tokenizers: that made the ids.
        ids: of one prompt.
    """
    pieces = tokenizers.pieces(ids.t5_ids)
    if ids.template is None:
        return pieces
    return [_bracketed(one) if added else one for one, added in zip(pieces, ids.template, strict=True)]


def _bracketed(piece: str) -> str:
    """Writes a template's token as chat models write their special ones, such as <|im_start|>."""
    return piece if piece.startswith("<|") and piece.endswith("|>") else f"<|{piece}|>"


def _two_clips(tokenizers: Tokenizers, prompt: str, text_tokens: int) -> TokenIds:
    """Tokenises one prompt for two CLIPs and, behind the first one's tokens, for T5 if there is one."""
    first, second, length = tokenizers.clip, tokenizers.clip_2, tokenizers.clip_length
    assert first is not None and second is not None
    if text_tokens <= length:
        raise UserError(
            f"text_tokens must be above {length}, as many as CLIP gives, but got {text_tokens}; "
            f"{length + 256} leave T5 256, as is usual."
        )
    read = [one(prompt, return_offsets_mapping=True, verbose=False) for one in (first, second)]
    clips = [_fit(ids.input_ids, length, one.pad_token_id) for ids, one in zip(read, (first, second), strict=True)]
    ids, own, behind = np.zeros(text_tokens - length, np.int32), 0, text_tokens - length
    longest, size = read[0], length
    if tokenizers.t5 is not None:
        longest, size = tokenizers.t5(prompt, return_offsets_mapping=True, verbose=False), behind
        ids, own = _fit(longest.input_ids, behind, tokenizers.t5.pad_token_id), len(longest.input_ids)
    mask = np.concatenate([np.arange(length) < len(read[0].input_ids), np.arange(behind) < own])
    cut = "" if len(longest.input_ids) <= size else prompt[longest.offset_mapping[size - 1][0] :].strip()
    return TokenIds(np.concatenate([clips[0], ids]), mask, np.concatenate(clips), cut)


def _fit(ids: list[int], length: int, padding: Any) -> Int32[np.ndarray, "length"]:
    """Cuts before the closing token, or pads after it."""
    kept = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
    return np.array(kept + [padding] * (length - len(kept)), np.int32)


def _known_words(t5: TextTokenizer, prompt: str) -> str:
    """Returns a prompt in lower case without punctuation; refuses it if a closed vocabulary lacks one of its words."""
    words = re.sub(r"[^\w\s]", " ", prompt.lower()).split()
    known = sorted(piece[1:] for piece in t5.get_vocab() if piece[0] in (SPACE, BYTE_SPACE) and len(piece) > 1)
    unknown = [word for word in dict.fromkeys(words) if word not in known]
    if unknown:
        problems = told_together([f"`{word}`{nearest(word, known)}" for word in unknown])
        raise UserError(f"The model's vocabulary of {len(known)} words lacks {problems}")
    return " ".join(words)
