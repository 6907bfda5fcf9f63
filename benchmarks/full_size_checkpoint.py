"""A fake FLUX.1[schnell] in its published layout, and one site of transcoders: random weights that compute sanely.

1. `diffusers/` is the published directory: the same folders, shards, keys, shapes and bfloat16; its own tokenizers, of
   as many tokens, which split text into characters and pairs of them. `transcoders/` holds one site, img/0, in this
   package's format and float32, as wide as the published ones.
2. Numbers are slices of one pool of normal numbers. A tensor's place in the pool is drawn from its name, so that no two
   blocks are alike: who reads the wrong one gets another result.
3. Matrices have variance 1 / inputs, as have convolutions; norms' scales are near 1 and biases near 0, so that
   activations neither vanish nor grow beyond what residual streams do.
4. The features' biases leave a share of them active where the MLPs' inputs have the variance that modulation gives
   them (about 1.7); what that is exactly, whoever runs them measures.
5. A file that is there in its full length is kept: an interrupted call is continued by the same call.
   `full_size.json`, beside the two directories, is written last and says what was made.
"""

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, T5Tokenizer

from converters.autoencoder import AUTOENCODER_DIFFUSERS
from converters.descriptions import descriptions
from converters.export import write_json
from converters.flux import FLUX_DIFFUSERS
from converters.mapping import Rule, source_shapes
from converters.text_encoders import CLIP_PREFIX, T5_TRANSFORMERS, clip_tables
from converters.transcoders import stacked_transcoders
from difffract_jax.models.autoencoder import FLUX_VAE, Autoencoder, AutoencoderConfig
from difffract_jax.models.clip import CLIP_L, CLIPConfig, CLIPTextEncoder
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.presets import PRESETS
from difffract_jax.models.runs import GenerationDefaults, PipelineConfig
from difffract_jax.models.sampler import SchedulerConfig
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.t5 import T5_XXL, T5Config, T5Encoder
from difffract_jax.models.tiny import CHARACTERS, TINY
from difffract_jax.models.tokenizers import SPACE
from difffract_jax.storage.checkpoint import FORMAT_VERSION, content_hash, leaf_paths, tree_hash
from difffract_jax.storage.files import TensorFile, write_tensors
from difffract_jax.storage.shards import shard
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.transcoder import TranscoderConfig

Shapes = Mapping[str, tuple[int, ...]]
RECORD = "full_size.json"
BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
CHUNK = 2**22
"""Numbers that are made and written together."""
NORM_SPREAD, BIAS_SPREAD, POSITIONS_SPREAD = 0.1, 0.05, 0.1
INPUT_RMS = 1.3
"""Root of the mean square of an MLP's inputs: normalised, scaled by 1 + 0.6 n and shifted by 0.6 n."""
ROLL = 331
"""By how many features the stored site is to be rolled, once for every site, to stand for another."""


class Size(NamedTuple):
    """What is made.

    Attributes:
        config: of the pipeline.
        transcoder: of each site.
        active: share of the features that are to be active.
        t5_extra: of T5's ids, those that its tokenizer does not have.
        pool: numbers in the pool; a prime, so that a tensor longer than the pool does not repeat itself row by row.
    """

    config: PipelineConfig
    transcoder: TranscoderConfig
    active: float
    t5_extra: int
    pool: int


DEFAULTS = GenerationDefaults(height=1024, width=1024, text_tokens=256, steps=4, guidance=0.0)
FULL = Size(
    PipelineConfig(PRESETS["flux-schnell"], T5_XXL, CLIP_L, FLUX_VAE, SchedulerConfig(), DEFAULTS),
    TranscoderConfig(d_model=3072, features=49_152, time_embed=256, conditioning="film_raw_t"),
    0.002,
    28,
    67_108_859,
)
SMALL = Size(
    PipelineConfig(
        TINY,
        T5Config(vocab=300, d_model=TINY.text_width, d_kv=8, d_ff=32, layers=2, heads=2),
        CLIPConfig(vocab=700, d_model=TINY.pooled_width, d_ff=32, layers=2, heads=2, positions=48),
        AutoencoderConfig(
            latent_channels=TINY.in_channels // 4,
            widths=(8, 8, 16),
            layers_per_block=1,
            norm_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        SchedulerConfig(),
        GenerationDefaults(height=48, width=48, text_tokens=40, steps=4, guidance=0.0),
    ),
    TranscoderConfig(d_model=TINY.d_model, features=256, time_embed=16, conditioning="film_raw_t"),
    0.05,
    28,
    65_521,
)


class Part(NamedTuple):
    """Weights of one folder.

    Attributes:
        folder: its name.
        stem: what the names of its files begin with.
        module: the part of the pipeline.
        rules: table that says what its keys are called.
        shards: files that it is published in.
    """

    folder: str
    stem: str
    module: tuple[Callable[..., Any], Any]
    rules: tuple[Rule, ...]
    shards: int


def make(home: Path, size: Size = FULL, *, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Makes `diffusers/`, `transcoders/` and the record of both in a directory.

    Args:
        home: the directory; made when missing.
        size: FULL or SMALL.
        say: told what is done.

    Returns:
        The record.
    """
    began = time.perf_counter()
    pool = np.random.default_rng(0).standard_normal(size.pool, np.float32)
    weights = {part.folder: _make_part(home / "diffusers" / part.folder, part, pool, say) for part in parts(size)}
    _make_tokenizers(home / "diffusers", size)
    for name, content in descriptions(size.config).items():
        write_json(home / "diffusers" / name, content)
    transcoders = _make_transcoders(home / "transcoders", size, pool, say)
    record = {
        "diffusers": {"tensors": sum(map(len, weights.values())), "bytes": sum(map(_bytes, weights.values()))},
        "transcoders": transcoders,
        "minutes": round((time.perf_counter() - began) / 60, 2),
    }
    write_json(home / RECORD, record)
    return record


def parts(size: Size) -> tuple[Part, ...]:
    """Returns the parts of the pipeline as they are published."""
    config, diffusers = size.config, "diffusion_pytorch_model"
    return (
        Part("transformer", diffusers, (MMDiT, config.transformer), FLUX_DIFFUSERS, 3),
        Part("text_encoder", "model", (CLIPTextEncoder, config.clip), clip_tables([CLIP_PREFIX]).rules, 1),
        Part("text_encoder_2", "model", (T5Encoder, config.t5), T5_TRANSFORMERS, 2),
        Part("vae", diffusers, (Autoencoder, config.vae), AUTOENCODER_DIFFUSERS, 1),
    )


def _make_part(folder: Path, part: Part, pool: np.ndarray, say: Callable[[str], None]) -> Shapes:
    """Writes one part's files; returns its keys with their shapes."""
    found = source_shapes(part.rules, abstract_module(*part.module))
    shapes = {key: found[key] for key in sorted(found, key=_natural)}  # block by block
    sizes = {key: 2 * math.prod(shape) for key, shape in shapes.items()}
    # As much per file as fills all but the last: libraries cut by a limit, of 10 and 5 GB.
    groups = shard(sizes, math.ceil(sum(sizes.values()) * (1.05 / part.shards)))
    assert len(groups) == part.shards, f"{part.folder} falls into {len(groups)} files"
    listed: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, keys in enumerate(groups, 1):
        numbered = f"-{number:05}-of-{part.shards:05}" if part.shards > 1 else ""
        name = f"{part.stem}{numbered}.safetensors"
        listed |= dict.fromkeys(keys, name)
        # Within a file by name, as the library safetensors has it.
        _write(
            folder / name,
            {key: shapes[key] for key in sorted(keys)},
            BFLOAT16,
            lambda key: _values(key, shapes, pool),
            say,
        )
    if part.shards > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": listed}
        write_json(folder / f"{part.stem}.safetensors.index.json", index)
    return shapes


def _natural(key: str) -> list[tuple[int, str]]:
    """Returns what to sort keys by, so that block 2 comes before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _write(
    path: Path,
    shapes: Shapes,
    dtype: np.dtype,
    values: Callable[[str], Iterator[np.ndarray]],
    say: Callable[[str], None],
) -> None:
    """Writes a file tensor by tensor, under another name until it is complete; one that is there already is kept."""
    if path.exists():
        say(f"{path} is there already")
        return
    partial = path.with_name(f".{path.name}.partial")
    tensors = (np.concatenate([piece.astype(dtype) for piece in values(key)]) for key in shapes)
    write_tensors(partial, [(key, dtype, shape) for key, shape in shapes.items()], tensors)
    missing = TensorFile(partial).missing_bytes
    assert not missing, f"{path.name} lacks {missing} bytes"
    os.replace(partial, path)
    say(f"{path} is written, {path.stat().st_size:,} bytes")


def _values(key: str, shapes: Shapes, pool: np.ndarray) -> Iterator[np.ndarray]:
    """Yields a tensor's numbers in pieces, float32, in the order in which they are stored."""
    shape, name = shapes[key], key.rpartition(".")[2]
    mean, spread = 0.0, float(math.prod(shape[1:])) ** -0.5
    if "embed" in key and name == "weight" and len(shape) == 2 and shape[0] > shape[1] or key == "shared.weight":
        spread = 1.0
    if "position_embedding" in key or "relative_attention_bias" in key:
        spread = POSITIONS_SPREAD
    if key.endswith("SelfAttention.q.weight"):
        spread *= 64**-0.5  # T5 does not divide its scores by the root of a head's width
    if name == "bias":
        spread = BIAS_SPREAD
    elif len(shape) == 1:
        mean, spread = 1.0, NORM_SPREAD
    yield from (mean + spread * piece for piece in _slices(key, math.prod(shape), pool))


def _slices(key: str, count: int, pool: np.ndarray) -> Iterator[np.ndarray]:
    """Yields `count` numbers of the pool in pieces, from a place that the key tells, and from its start at its end."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % len(pool)
    while count:
        piece = pool[place : place + min(CHUNK, count)]
        yield piece
        count -= len(piece)
        place = (place + len(piece)) % len(pool)


def _bytes(shapes: Shapes) -> int:
    return sum(2 * math.prod(shape) for shape in shapes.values())


def _make_transcoders(folder: Path, size: Size, pool: np.ndarray, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes the site img/0; returns what the record says of it."""
    config, cutoff = size.transcoder, INPUT_RMS * NormalDist().inv_cdf(1 - size.active)
    shapes = {path: leaf.shape for path, leaf in leaf_paths(stacked_transcoders(config, 1, FLOAT32)).items()}
    spreads = {"enc.kernel": config.d_model**-0.5, "dec.kernel": config.d_model**-0.5, "enc.bias": BIAS_SPREAD}

    def values(path: str) -> Iterator[np.ndarray]:
        mean = -cutoff if path == "enc.bias" else 0.0
        spread = spreads.get(path, 0.1 * config.time_embed**-0.5 if path.endswith("kernel") else BIAS_SPREAD)
        yield from (mean + spread * piece for piece in _slices(f"img/0 {path}", math.prod(shapes[path]), pool))

    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "img.safetensors", shapes, FLOAT32, values, say)
    file = TensorFile(folder / "img.safetensors")
    tensors = {name: file[name] for name in file.tensors}
    described = {
        "format_version": FORMAT_VERSION,
        "content_hash": tree_hash({"img": tensors}),
        "content_hashes": {"img": content_hash(tensors)},
        "kind": "transcoders",
        "config": {name: value for name, value in asdict(config).items() if value is not None},
        "layers": sites_of({"img": (0,)}).to_json(),
        "provenance": {},
    }
    write_json(folder / "config.json", described)
    return {
        "stored": "img/0",
        "features": config.features,
        "roll": ROLL,
        "active_share": size.active,
        "input_rms": INPUT_RMS,
        "derived": "site n of all sites has the stored one's features rolled by n times `roll`",
    }


def _make_tokenizers(home: Path, size: Size) -> None:
    """Writes both tokenizers: T5's pieces and CLIP's merges are characters, then pairs and triples of them."""
    clip, t5 = size.config.clip, size.config.t5
    alphabet = sorted(ByteLevel.alphabet(), key=lambda c: (not (c.isascii() and c.islower()), c))
    words = [*alphabet, *(f"{c}</w>" for c in alphabet)]
    pairs = itertools.islice(itertools.product(alphabet, words), clip.vocab - len(words) - 2)
    merges = list(pairs)
    words += ["".join(pair) for pair in merges]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=clip.positions).save_pretrained(home / "tokenizer")
    characters = (SPACE, *CHARACTERS)
    longer = ("".join(each) for length in (2, 3) for each in itertools.product(characters, repeat=length))
    sentinels = 100
    wanted = t5.vocab - size.t5_extra - sentinels - 3 - len(characters)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -8.0) for c in characters)]
    pieces += [(piece, -9.0) for piece in itertools.islice(longer, wanted)]
    T5Tokenizer(vocab=pieces, extra_ids=sentinels, model_max_length=512).save_pretrained(home / "tokenizer_2")


def load_record(home: Path) -> dict[str, Any]:
    """Reads what `make` recorded."""
    return json.loads((home / RECORD).read_text(encoding="utf-8"))
