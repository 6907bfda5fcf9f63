"""Prompts per second that a host feeds to a training: reading, tokenising, choosing rows and encoding text.

1. `organism`: the embedded model, its captions and its text encoders. `flux`: files of the size of FLUX.1[schnell]'s, a
   JSONL file of 20,000 prompts of 40 words, tokenizers with as many entries as T5's and CLIP's, 512 px, 4 steps, rows
   of the 38 sites of the double-stream blocks.
2. Text encoding of `flux` is CLIP-L as it is and one of T5-XXL's 24 layers, both with random weights in float32, at 512
   tokens: the encoder takes 24 times the layer. Its part of a matrix product's rate says whether that is what it costs.
3. Processor seconds count, which other processes do not add to, of all threads; two cores have two a second.
   `together` is one loop over all parts of `organism`; of `flux` the time of reading is added to one.
4. What 16 chips of v5p consume is the model of `difffract plan --sweep v5p:16`: at the rate of their products alone,
   and with what else holds them up.

    python benchmarks/host_input.py [--repeats 5] [--chunks 8] [--json]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--repeats", type=int, default=5, help="times each is measured; the median counts")
PARSER.add_argument("--chunks", type=int, default=8, help="chunks of 8 prompts in a measurement of what is fast")
PARSER.add_argument("--only", default="organism,flux,text encoding of flux", help="sections, separated by commas")
PARSER.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
ARGS = PARSER.parse_args() if __name__ == "__main__" else PARSER.parse_args([])
if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  (after the settings above)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from full_size_checkpoint import FULL, Size, _make_tokenizers  # noqa: E402

from difffract_jax.cli.models import work_of, world_of  # noqa: E402
from difffract_jax.config import resolve  # noqa: E402
from difffract_jax.estimate.sweep import parse_sweep, sweep  # noqa: E402
from difffract_jax.loading import load_pipeline  # noqa: E402
from difffract_jax.models.clip import CLIPTextEncoder  # noqa: E402
from difffract_jax.models.pipeline import Pipeline, plan_run  # noqa: E402
from difffract_jax.models.t5 import T5Block  # noqa: E402
from difffract_jax.models.tokenizers import load_tokenizers  # noqa: E402
from difffract_jax.transcoders.harvest import Sampler, encode_many  # noqa: E402
from difffract_jax.transcoders.prompts import read_prompts, split_prompts  # noqa: E402
from difffract_jax.transcoders.settings import TrainConfig  # noqa: E402
from difffract_jax.transcoders.sites import sites_of  # noqa: E402
from difffract_jax.transcoders.sources import open_sampler  # noqa: E402

CORES = 2
"""Cores of the host that is spoken of."""
PROMPTS, WORDS, AT_ONCE = 20_000, 40, 8
CONFIG = Path(__file__).parents[1] / "configs/train-flux-schnell.yaml"


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Returns the median of the processor seconds that something takes, once everything is compiled."""
    work()
    taken = []
    for _ in range(repeats):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return statistics.median(taken)


def parts_of(source: Sampler, numbers: range) -> dict[str, Callable[[], Any]]:
    """Returns what a sampler does with the prompts of some chunks before the model runs, by name."""
    ids = {number: source._ids(number) for number in numbers}
    masks = {number: source._masks(ids[number]) for number in numbers}

    def all_of(part: Callable[[int], Any]) -> Callable[[], Any]:
        return lambda: jax.block_until_ready([part(number) for number in numbers])

    prompts = [n * source.prompts_at_once + place for n in numbers for place in range(source.prompts_at_once)]
    return {
        "which prompt comes": lambda: [source.prompts(number) for number in prompts],
        "that, and tokenising": all_of(source._ids),
        "choosing rows": all_of(lambda number: source._choose(number, masks[number])),
    }


def organism(repeats: int, chunks: int) -> dict[str, float]:
    """Returns prompts per processor second of the embedded model, by part."""
    settings = TrainConfig(model="organism", prompts="world", prompts_at_once=AT_ONCE)
    pipe = load_pipeline("organism")
    source = open_sampler(settings, pipe, "train", caption=world_of(settings))
    numbers = range(chunks)
    parts = parts_of(source, numbers)
    sent = [source._sent(source._ids(number)) for number in numbers]
    parts["text encoding"] = lambda: jax.block_until_ready([encode_many(pipe.t5, pipe.clip, *ids) for ids in sent])

    def together() -> Any:
        made = []
        for number in numbers:
            ids = source._ids(number)
            source._choose(number, source._masks(ids))
            made.append(encode_many(pipe.t5, pipe.clip, *source._sent(ids)))
        return jax.block_until_ready(made)

    parts["together"] = together
    return {name: chunks * AT_ONCE / seconds(work, repeats) for name, work in parts.items()}


def flux(size: Size, repeats: int, chunks: int, count: int = PROMPTS) -> dict[str, float]:
    """Returns prompts per processor second at the sizes of a published model, by part.

    Args:
        size: of the model.
        repeats: times that each is measured.
        chunks: in a measurement of what is fast.
        count: prompts of the file.
    """
    with tempfile.TemporaryDirectory() as home:
        _make_tokenizers(Path(home), size)
        rng, file = np.random.default_rng(0), Path(home) / "captions.jsonl"
        letters = np.array(list("etaoinshrdlcumwfgypbvk"))
        words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(3000)]
        lines = [json.dumps({"prompt": " ".join(rng.choice(words, WORDS))}) for _ in range(count)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        reading = count / seconds(lambda: read_prompts(str(file)), repeats)
        prompts = split_prompts(read_prompts(str(file)), 0.01, 0)["train"]
        run = plan_run(size.config, height=512, width=512, text_tokens=512, steps=4)
        absent: Any = None  # weights: what the host does needs none
        pipe = Pipeline(absent, absent, absent, absent, load_tokenizers(home), size.config)
        depth = range(size.config.transformer.depth_double)
        source = Sampler(pipe, sites_of({"img": depth, "txt": depth}), run, prompts, 0, AT_ONCE, tokens_per_step=64)
        numbers = range(chunks)

        def together() -> None:
            for number in numbers:
                ids = source._ids(number)
                jax.block_until_ready((source._sent(ids), source._choose(number, source._masks(ids))))

        parts = parts_of(source, numbers) | {"tokenising and choosing rows": together}
        found = {name: chunks * AT_ONCE / seconds(work, repeats) for name, work in parts.items()}
    both = 1 / reading + 1 / found["tokenising and choosing rows"]
    return {"reading": reading} | found | {"together": 1 / both}


def text(size: Size, repeats: int) -> dict[str, float]:
    """Returns prompts per processor second of both text encoders: CLIP's measured, T5's from one layer of all."""
    t5, clip = size.config.t5, CLIPTextEncoder(size.config.clip, rngs=nnx.Rngs(0))
    ids = jnp.zeros(size.config.clip.positions, jnp.int32)
    run_clip = jax.jit(lambda clip, ids: clip(ids))
    clip_seconds = seconds(lambda: jax.block_until_ready(run_clip(clip, ids)), repeats)
    del clip
    block = T5Block(t5, rngs=nnx.Rngs(0))
    x, bias = jnp.ones((512, t5.d_model)), jnp.zeros((t5.heads, 512, 512))
    run_block = jax.jit(lambda block, x, bias: block(x, bias))
    layer = seconds(lambda: jax.block_until_ready(run_block(block, x, bias)), repeats)
    weights = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(block)))
    a = jnp.ones((512, 4096))
    b = jnp.ones((4096, 4096))
    product = seconds(lambda: jax.block_until_ready(_times(a, b)), repeats)
    share = (2 * 512 * weights / layer) / (2 * 512 * 4096 * 4096 / product)
    sys.stderr.write(f"a T5 layer of {weights / 1e6:.0f} M weights: {layer:.2f} s, {share:.2f} of a product's rate\n")
    both = clip_seconds + t5.layers * layer
    return {"CLIP": 1 / clip_seconds, f"T5, of {t5.layers} layers": 1 / (t5.layers * layer), "together": 1 / both}


@jax.jit
def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return a @ b


def consumed() -> dict[str, float]:
    """Returns prompts per second that 16 chips of v5p take, by the model of a sweep."""
    settings = resolve(TrainConfig, file=CONFIG)
    (point,), _ = sweep(work_of(settings), parse_sweep("v5p:16"))
    chunks = [point.chunk.compute, point.chunk.longest]
    rates = [point.prompts / one for one in chunks]
    return {"products alone": rates[0], f"as modelled, bound by {point.chunk.bound}": rates[1]}


def main() -> None:
    """Prints tables, or one JSON document."""
    sections: dict[str, Callable[[], dict[str, float]]] = {
        "organism": lambda: organism(ARGS.repeats, ARGS.chunks),
        "flux": lambda: flux(FULL, ARGS.repeats, ARGS.chunks),
        "text encoding of flux": lambda: text(FULL, ARGS.repeats),
    }
    found = {name: work() for name, work in sections.items() if name in ARGS.only.split(",")}
    record = {"per second of a processor": found, "16 chips of v5p consume": consumed()}
    if ARGS.json:
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
        return
    for name, rates in found.items():
        sys.stdout.write(f"\n| {name} | on a core, prompts/s | on {CORES} cores |\n|---|---|---|\n")
        sys.stdout.write("".join(f"| {part} | {rate:,.3g} | {CORES * rate:,.3g} |\n" for part, rate in rates.items()))
    told = "; ".join(f"{name} {rate:,.3g}" for name, rate in record["16 chips of v5p consume"].items())
    sys.stdout.write(f"\n16 chips of v5p consume, prompts/s: {told}\n")


if __name__ == "__main__":
    main()
