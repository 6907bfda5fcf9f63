"""A directory's weights are found under every name that libraries give them; else one sentence says what is there."""

import json

import pytest

from converters.weight_files import locate, variants
from difffract_jax.config import UserError

SHARDS = [f"-0000{number}-of-00002" for number in (1, 2)]


def fill(directory, *names):
    """Makes files; an index lists the shards of its variant and stem, as diffusers names them."""
    for name in names:
        content = ""
        if ".index" in name:
            stem, variant = name.split(".safetensors.index")
            dotted = variant.removesuffix(".json")
            content = json.dumps(
                {"weight_map": {f"k{i}": f"{stem}{dotted}{shard}.safetensors" for i, shard in enumerate(SHARDS)}}
            )
        (directory / name).write_text(content)
    return directory


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (["model.fp16.safetensors"], ["model.fp16.safetensors"]),
        (["model.fp8-e4m3fn.safetensors"], ["model.fp8-e4m3fn.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (
            ["diffusion_pytorch_model.bf16.safetensors", "other.safetensors"],
            ["diffusion_pytorch_model.bf16.safetensors"],
        ),
        ([f"model{shard}.safetensors" for shard in SHARDS], [f"model{shard}.safetensors" for shard in SHARDS]),
        (
            [f"model.bf16{shard}.safetensors" for shard in SHARDS],
            [f"model.bf16{shard}.safetensors" for shard in SHARDS],
        ),
        (
            [f"model{shard}.bf16.safetensors" for shard in SHARDS],
            [f"model{shard}.bf16.safetensors" for shard in SHARDS],
        ),
        (
            ["model-1-of-2.safetensors", "model-2-of-2.safetensors"],
            ["model-1-of-2.safetensors", "model-2-of-2.safetensors"],
        ),
        (["t5xxl_fp8_e4m3fn.safetensors", "config.json"], ["t5xxl_fp8_e4m3fn.safetensors"]),
        (["v1.5-pruned.ema.safetensors", "._v1.5-pruned.ema.safetensors"], ["v1.5-pruned.ema.safetensors"]),
        # An index without any of its shards came along with the variant.
        (["model.safetensors.index.json", "model.fp16.safetensors"], ["model.fp16.safetensors"]),
        (["model.safetensors.index.json", "model.safetensors"], ["model.safetensors"]),
    ],
)
def test_names_are_understood(tmp_path, names, taken):
    files = locate(fill(tmp_path, *names))
    assert list(files.names) == taken and not files.index


@pytest.mark.parametrize("variant", ["", ".bf16"])
def test_an_index_comes_before_a_single_file(tmp_path, variant):
    shards = [f"model{variant}{shard}.safetensors" for shard in SHARDS]
    fill(tmp_path, f"model.safetensors.index{variant}.json", f"model{variant}.safetensors", *shards)
    files = locate(tmp_path)
    assert list(files.names) == shards and list(files.listed.values()) == shards


def test_the_variant_that_is_asked_for_is_taken(tmp_path):
    fill(tmp_path, "model.safetensors", "model.fp16.safetensors", "model.bf16.safetensors")
    assert locate(tmp_path, "bf16").names == ("model.bf16.safetensors",)
    assert locate(tmp_path, "fp8").names == ("model.safetensors",)
    assert variants(tmp_path) == {"fp16", "bf16"} and variants(tmp_path / "nowhere") == set()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r'in the variants bf16 and fp16; choose one with --variant bf16 .*variant="bf16"'
    ):
        locate(tmp_path)
    with pytest.raises(UserError, match="no weights of the variant fp8, only of bf16, fp16"):
        locate(tmp_path, "fp8")


def test_a_missing_shard_is_named_also_without_an_index(tmp_path):
    fill(tmp_path, f"model{SHARDS[1]}.safetensors")
    with pytest.raises(UserError, match="lacks model-00001-of-00002.safetensors of 2 numbered shards"):
        locate(tmp_path)
    with pytest.raises(UserError, match="lacks model-00001-of-00002.safetensors"):
        locate(tmp_path / f"model{SHARDS[1]}.safetensors")
    # The same weights, saved in another number of shards, are whole.
    fill(tmp_path, *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)))
    assert len(locate(tmp_path).names) == 3
    assert len(locate(tmp_path / "model-00003-of-00003.safetensors").names) == 3


def test_pickles_are_told_with_what_saves_them_as_safetensors(tmp_path):
    fill(tmp_path, "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"architectures": ["T5EncoderModel"]}')
    with pytest.raises(
        UserError, match=r"PyTorch's pytorch_model.bin .* transformers.T5EncoderModel.from_pretrained\("
    ):
        locate(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match=r"diffusers.AutoencoderKL.from_pretrained\("):
        locate(tmp_path)


def test_a_gguf_file_in_a_directory_is_told_with_where_to_find_bf16(tmp_path):
    with pytest.raises(UserError, match=r"holds t5-Q8_0.gguf, quantised .* in bf16"):
        locate(fill(tmp_path, "t5-Q8_0.gguf"))


def test_several_checkpoints_of_other_names_are_listed(tmp_path):
    with pytest.raises(UserError, match=r"several checkpoints \(flux1-dev.safetensors, t5xxl.safetensors\)"):
        locate(fill(tmp_path, "flux1-dev.safetensors", "t5xxl.safetensors"))
