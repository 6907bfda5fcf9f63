"""Tokenizers read without transformers do what transformers makes of the same files; of others it is asked."""

import json
import shutil
from pathlib import Path

import pytest

import difffract_jax
from difffract_jax.models.file_tokenizers import FileTokenizer
from difffract_jax.models.tokenizer_files import load_clip, load_t5

SHIPPED = Path(difffract_jax.__file__).parent / "organism" / "weights"
TEXTS = ("", "a red circle left of a blue square", "A Red, ring!", "a  yellow lemon </s>", "<|endoftext|> " + "a " * 30)

CUT = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(("load", "folder"), [(load_clip, "tokenizer"), (load_t5, "tokenizer_2")])
def test_a_plain_tokenizer_is_what_transformers_makes_of_its_files(load, folder, tmp_path) -> None:
    plain = load(SHIPPED / folder)
    assert isinstance(plain, FileTokenizer)
    theirs = plain._full()
    for text in TEXTS:
        ours, expected = (one(text, return_offsets_mapping=True, verbose=False) for one in (plain, theirs))
        assert ours.input_ids == expected.input_ids and ours.offset_mapping == expected.offset_mapping
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "model_max_length"):
        assert getattr(plain, name) == getattr(theirs, name)
    assert len(plain) == len(theirs) and plain.get_vocab() == theirs.get_vocab()
    ids = list(range(len(plain)))
    assert plain.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert plain.convert_ids_to_tokens(5) == theirs.convert_ids_to_tokens(5)
    # What only transformers can do is left to it.
    assert plain(TEXTS[1], padding="max_length", max_length=20).input_ids[-1] == plain.pad_token_id
    plain.save_pretrained(tmp_path)
    assert load(tmp_path).get_vocab() == plain.get_vocab()


@pytest.fixture
def home(tmp_path) -> Path:
    """A copy of the shipped T5 tokenizer."""
    return Path(shutil.copytree(SHIPPED / "tokenizer_2", tmp_path / "t5"))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"unk_token": None}),
        ("tokenizer_config.json", {"cls_token": "<unk>"}),
        ("tokenizer_config.json", {"extra_special_tokens": ["<unk>"]}),
        ("tokenizer_config.json", {"model_max_length": None}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("special_tokens_map.json", {"pad_token": "<pad>"}),
        ("tokenizer.json", {"post_processor": None}),
        (
            "tokenizer.json",
            {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}},
        ),
    ],
    ids=[
        *("a token not named", "a further token", "extra tokens", "no length", "a setting that changes tokens"),
        *("a file beside", "no closing", "cuts"),
    ],
)
def test_of_what_is_less_plain_transformers_is_asked(home, file, changes) -> None:
    path = home / file
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = {name: value for name, value in (content | changes).items() if value is not None or name == "post_processor"}
    path.write_text(json.dumps(kept), encoding="utf-8")
    made = load_t5(home)
    assert not isinstance(made, FileTokenizer)
    assert made("a red ring").input_ids == load_t5(SHIPPED / "tokenizer_2")("a red ring").input_ids
