"""FLUX.2-klein-4B at its real size: a fake checkpoint in the published layout, an image and a trace, from disk.

1. `make DIR` writes `DIR/klein`, a directory as diffusers has it: keys and shapes are those of diffusers' and
   transformers' modules without weights, numbers those of `full_size_checkpoint`, bfloat16, 16 GB in all; the tokenizer
   has one token per byte. `DIR/transcoders` holds `--features` features at every MLP of the double-stream blocks.
2. `run DIR` makes an image of 128 px in 4 steps and traces 50 nodes, each as a command of its own under
   `prlimit --data`, with weights on disk. Printed: minutes, the largest private memory (`RssAnon`, read five times a
   second), and of the trace its conservation error.

    python benchmarks/full_size_klein.py make DIR
    python benchmarks/full_size_klein.py run DIR [--cap 8]
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from full_size_checkpoint import BFLOAT16, _natural, _values, _write
from transformers import Qwen3Config, Qwen3ForCausalLM

from converters.export import write_json
from difffract_jax.graphs.graph import Graph
from difffract_jax.loading import save_transcoders
from difffract_jax.models.presets import preset_config
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.transcoder import random_transcoders

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from klein import PUBLISHED, SCHEDULER, tiny_tokenizer  # noqa: E402  (the tests' published sizes, after the path above)

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("what", choices=["make", "run"])
PARSER.add_argument("home", type=Path, metavar="DIR")
PARSER.add_argument("--features", type=int, default=4096, help="of each transcoder")
PARSER.add_argument("--cap", type=float, default=8, help="GiB of private memory that a command may have")
QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
NAMED = {
    "transformer": {"_class_name": "Flux2Transformer2DModel"},
    "text_encoder": {"architectures": ["Qwen3ForCausalLM"]},
    "vae": {"_class_name": "AutoencoderKLFlux2"},
}
POOL = 2**24 - 3
RUN = "import sys; from difffract_jax.cli.main import main; sys.argv[0] = 'difffract'; main()"
PROMPT = "a red fox at dawn"
SIZE = ("--height", "128", "--width", "128", "--text-tokens", "64", "--weights", "disk")


def make(home, features):
    """Writes the checkpoint and the transcoders."""
    with torch.device("meta"):
        modules = {
            "transformer": Flux2Transformer2DModel(**PUBLISHED),
            "text_encoder": Qwen3ForCausalLM(Qwen3Config(**QWEN3)),
            "vae": AutoencoderKLFlux2(),
        }
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32)
    for folder, module in modules.items():
        where, stem = home / "klein" / folder, "model" if folder == "text_encoder" else "diffusion_pytorch_model"
        where.mkdir(parents=True, exist_ok=True)
        tied = {"lm_head.weight"} if folder == "text_encoder" else set()
        found = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items() if key not in tied}
        shapes = {key: found[key] for key in sorted(found, key=_natural) if not key.endswith("num_batches_tracked")}
        _write(where / f"{stem}.safetensors", shapes, BFLOAT16, lambda key, all=shapes: positive(key, all, pool), print)
        config = module.config.to_dict() if folder == "text_encoder" else {**module.config}
        plain = {name: value for name, value in config.items() if not name.startswith("_")}
        write_json(where / "config.json", plain | NAMED[folder])
    tiny_tokenizer().save_pretrained(home / "klein" / "tokenizer")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", **SCHEDULER}
    (home / "klein" / "scheduler").mkdir(exist_ok=True)
    write_json(home / "klein" / "scheduler" / "scheduler_config.json", scheduler)
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": True, **parts}
    write_json(home / "klein" / "model_index.json", index)
    sites = sites_of({"img": range(5), "txt": range(5)})
    transcoders = random_transcoders(preset_config("flux2-klein").transformer, features=features, sites=sites.groups)
    if not (home / "transcoders").exists():
        save_transcoders(transcoders, home / "transcoders")


def positive(key, shapes, pool):
    """Yields a tensor's numbers; of variances their squares and a little more."""
    for piece in _values(key, shapes, pool):
        yield piece**2 + 0.5 if key.endswith("running_var") else piece


def measured(cap, *arguments):
    """Runs a command under a cap; returns minutes and the most private memory, GiB."""
    command = ["prlimit", f"--data={int(cap * 2**30)}", sys.executable, "-c", RUN, *map(str, arguments)]
    begin, most = time.perf_counter(), 0.0
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            break
        used = re.search(r"RssAnon:\s+(\d+) kB", status)
        most = max(most, int(used[1]) / 2**20 if used else 0.0)
        time.sleep(0.2)
    if process.wait():
        sys.exit(f"difffract {arguments[0]} ended with {process.returncode}")
    return (time.perf_counter() - begin) / 60, most


def run(home, cap):
    """Prints minutes and memory of both commands."""
    print(f"{os.cpu_count()} processors, load {os.getloadavg()}, cap {cap} GiB", flush=True)
    klein, out = home / "klein", home / "graph.npz"
    took, most = measured(cap, "generate", klein, PROMPT, *SIZE, "--out", home / "image.png")
    print(f"generate, 128 px, 4 steps: {took:.1f} min, {most:.1f} GiB", flush=True)
    given = ("--target", "img/4/f3019", "--step", "1", "--max-nodes", "50")
    took, most = measured(cap, "trace", klein, home / "transcoders", PROMPT, *given, *SIZE, "--out", out)
    error = Graph.load(out).largest_conservation_error
    print(f"trace, 5 double blocks, 128 px: {took:.1f} min, {most:.1f} GiB, conservation {error:.1e}", flush=True)


if __name__ == "__main__":
    ARGS = PARSER.parse_args()
    make(ARGS.home, ARGS.features) if ARGS.what == "make" else run(ARGS.home, ARGS.cap)
