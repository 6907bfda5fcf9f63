"""Prompts for a language model that reads them as a message: Qwen3's chat template, with or without thinking.

1. The prompt becomes one message of the user, and the template adds the beginning of an answer, whose thinking is
   empty where there shall be none. Which tokens are the template's own is told by where it puts a prompt.
2. Too long: the first `length` tokens are kept; what is lost of the prompt is reported in its own words. Too short:
   fill up with the tokenizer's padding token, at the end.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from difffract_jax.config import UserError

_MARK = "\u2400"
"""A prompt of one character that stands in no template."""


class ChatPrompt(NamedTuple):
    """One tokenised prompt.

    Attributes:
        ids: token ids.
        mask: False for padding.
        template: True for what the template adds around the prompt.
        cut: the end of the prompt that did not fit; "" if all did.
    """

    ids: Int32[np.ndarray, "txt"]
    mask: Bool[np.ndarray, "txt"]
    template: Bool[np.ndarray, "txt"]
    cut: str


def chat_prompt(tokenizer: Any, prompt: str, text_tokens: int, *, thinking: bool = False) -> ChatPrompt:
    """Tokenises one prompt.

    Args:
        tokenizer: of the language model, with a chat template.
        prompt: any text, also the empty one.
        text_tokens: length of the ids.
        thinking: whether the template leaves room for thinking.
    """
    text = _templated(tokenizer, prompt, thinking)
    begin = _begin(tokenizer, text, prompt, thinking)
    end = begin + len(prompt)
    read = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, places = read.input_ids[:text_tokens], read.offset_mapping[:text_tokens]
    cut = ""
    if len(read.input_ids) > text_tokens:
        cut = text[max(read.offset_mapping[text_tokens][0], begin) : end].strip()
    filled = ids + [tokenizer.pad_token_id] * (text_tokens - len(ids))
    template = np.zeros(text_tokens, bool)
    template[: len(ids)] = [last <= begin or first >= end for first, last in places]
    return ChatPrompt(np.array(filled, np.int32), np.arange(text_tokens) < len(ids), template, cut)


def _templated(tokenizer: Any, prompt: str, thinking: bool) -> str:
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)


def _begin(tokenizer: Any, text: str, prompt: str, thinking: bool) -> int:
    """Returns where the template puts a prompt: behind what stands before any other, or where its words are found."""
    before = _templated(tokenizer, _MARK, thinking).partition(_MARK)[0]
    return len(before) if text.startswith(before + prompt) else max(text.find(prompt), 0)


def check_chat_tokenizer(tokenizer: Any, home: Any) -> None:
    """Refuses a tokenizer that has no chat template, or fills prompts up at their beginning.

    Args:
        tokenizer: of the language model.
        home: its directory, for the message.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer in {home} has no chat template, by which prompts are read; copy chat_template.jinja, or "
            "tokenizer_config.json, from the pipeline."
        )
    if tokenizer.padding_side != "right":
        raise UserError(
            f"The tokenizer in {home} fills prompts up at their beginning (padding_side); only at their end is "
            "supported: set it to right."
        )
