"""Rows per second of a training step of one site: a PyTorch loop of the paper's recipe, and ours; compilation apart.

1. `torch relu`: the recipe (FiLM by time, ReLU + L1, Adam, decoder vectors back to unit norm) as a plain PyTorch loop.
2. `relu`: our step of the same recipe. `topk`, `batchtopk`: k features per row, with the defaults of `difffract train`
   (gradient clipped, decoder's gradient projected, auxiliary loss), by dense products; `... sparse`: the same at the
   active features alone. `sparsify topk`: the step of EleutherAI's sparsify on the same rows, where it is installed
   (eai-sparsify, beside torch 2.13.0; without Triton it decodes by PyTorch's embedding_bag).
3. One step of each in turn, `--repeats` times, so that noise hits all alike; the median counts. One thread is measured
   in processor time, which other processes do not add to; yet they take caches and memory away: the clock's time stands
   beside it, and ratios within one run are what to compare.
4. Shares are of a matrix product's rate in the same run: multiplications that the step needs, counted, over what fits
   into its time. FiLM, Adam and normalising are not counted.

    python benchmarks/training.py [--size 512,8192,4096] [--repeats 5] [--dead 0.1] [--json]
    python benchmarks/training.py --preset gpu        # width and features of FLUX, products in bfloat16, no PyTorch
    python benchmarks/training.py --overlap           # whole trainings, see below

`--overlap` trains on the organism, rows of the next refresh made while steps run (`overlap=on`) and not (`off`), in
turn, with the buffer on the device and on the host, and with rows from files; seconds by the clock, from the end of the
first refresh on. Weights of both are compared: they are the same, bit for bit.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--preset", choices=["cpu", "gpu"], default="cpu", help="sizes and precision")
PARSER.add_argument("--size", help="width, features, batch: D,F,B; the preset's if left out")
PARSER.add_argument("--k", type=int, default=32, help="active features per row of topk and batchtopk")
PARSER.add_argument("--dead", type=float, default=0.0, help="share of features that the auxiliary loss shall revive")
PARSER.add_argument("--only", help="contestants to run, separated by commas")
PARSER.add_argument("--threads", type=int, default=1, help="processor threads; 0 leaves the choice to the libraries")
PARSER.add_argument("--repeats", type=int, default=5, help="steps of each whose median is taken")
PARSER.add_argument("--overlap", action="store_true", help="measure whole trainings, overlapped and not")
PARSER.add_argument("--json", action="store_true", help="print one JSON document instead of the table")

ARGS = PARSER.parse_args() if __name__ == "__main__" else PARSER.parse_args([])
ON_CPU = ARGS.preset == "cpu"
ONE_THREAD = ON_CPU and ARGS.threads == 1 and not ARGS.overlap
if ONE_THREAD and __name__ == "__main__":
    # One core, and one thread in every pool: all must be set before JAX and PyTorch start.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.environ |= {"NPROC": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax  # noqa: E402  (after the settings above)
import jax.numpy as jnp  # noqa: E402

from difffract_jax.cli.models import rows_in, world_of  # noqa: E402
from difffract_jax.config import provenance  # noqa: E402
from difffract_jax.loading import load_pipeline  # noqa: E402
from difffract_jax.sharding import make_mesh  # noqa: E402
from difffract_jax.storage.checkpoint import tree_hash  # noqa: E402
from difffract_jax.transcoders.objective import ActivationRows, Objective  # noqa: E402
from difffract_jax.transcoders.settings import TrainConfig  # noqa: E402
from difffract_jax.transcoders.sources import open_sampler  # noqa: E402
from difffract_jax.transcoders.state import init_params, init_state, measure_moments  # noqa: E402
from difffract_jax.transcoders.step import Recipe, jit_step, optimizer  # noqa: E402
from difffract_jax.transcoders.store import write_store  # noqa: E402
from difffract_jax.transcoders.training import Watch, train  # noqa: E402
from difffract_jax.transcoders.transcoder import TranscoderConfig  # noqa: E402

WIDTH, FEATURES, BATCH = map(int, (ARGS.size or ("512,8192,4096" if ON_CPU else "3072,49152,4096")).split(","))
TIME_EMBED, L1, LR, BETAS, EPSILON = 256, 3e-4, 2e-4, (0.9, 0.999), 1e-6
BARS = {"relu": 0.8, "topk sparse": 2.5, "batchtopk sparse": 2.5}
"""Least rows per second, as a multiple of the PyTorch loop's; one thread, k = 32 of 8,192."""


def batch() -> ActivationRows:
    """Returns rows of one site whose y depends on x, at four times."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, BATCH, WIDTH))
    y = jnp.tanh(x @ jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5)
    return ActivationRows(x, y, jax.random.choice(keys[2], jnp.array([1, 0.75, 0.5, 0.25]), (1, BATCH)))


def ours(activation: str, sparse: bool, rows: ActivationRows) -> Callable[[], Any]:
    """Returns a function that takes one of our steps and waits for it."""
    paper = activation == "relu"
    config = TranscoderConfig(
        d_model=WIDTH,
        features=FEATURES,
        time_embed=TIME_EMBED,
        conditioning="film_raw_t",
        activation=activation,
        k=0 if paper else ARGS.k,
    )
    objective = Objective(aux_weight=0 if paper else 1 / 32, aux_k=64, bf16=not ON_CPU, sparse=sparse)
    recipe = Recipe(objective=objective, lr=LR, clip=0 if paper else 1.0, project_decoder=not paper)
    moments = measure_moments(rows, scaled=not paper)
    params = init_params(jax.random.key(1), config, "reference" if paper else "tied", moments)
    state = init_state(params, optimizer(recipe), moments, jnp.array([L1]))
    dead = jnp.arange(FEATURES) < ARGS.dead * FEATURES
    state = state._replace(silent=jnp.where(dead, 2 * objective.dead_after, state.silent))
    step = jit_step(recipe, make_mesh({}), state)

    def take() -> Any:
        nonlocal state
        # Features that fire come back to life; every step shall find as many dead ones.
        state, metrics = step(state._replace(silent=jnp.where(dead, 2 * objective.dead_after, 0)[None]), rows)
        return jax.block_until_ready(metrics)

    return take


def torch_loop(rows: ActivationRows) -> Callable[[], Any]:
    """Returns a function that takes one step of the recipe in PyTorch."""
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)
    x, y, t = (torch.from_numpy(np.array(a[0])) for a in rows)
    time_net = nn.Sequential(nn.Linear(TIME_EMBED, TIME_EMBED), nn.SiLU(), nn.Linear(TIME_EMBED, TIME_EMBED), nn.SiLU())
    film, encoder, decoder = (nn.Linear(TIME_EMBED, 2 * WIDTH), nn.Linear(WIDTH, FEATURES), nn.Linear(FEATURES, WIDTH))
    nn.init.zeros_(film.weight)
    with torch.no_grad():
        decoder.weight /= decoder.weight.norm(dim=0, keepdim=True)
        encoder.weight.copy_(decoder.weight.T)
    parameters = [p for module in (time_net, film, encoder, decoder) for p in module.parameters()]
    adam = torch.optim.Adam(parameters, lr=LR, betas=BETAS)
    frequencies = torch.exp(-np.log(10_000) * torch.arange(TIME_EMBED // 2) / (TIME_EMBED // 2))

    def take() -> float:
        angles = t[:, None] * frequencies
        scale, shift = film(time_net(torch.cat([angles.sin(), angles.cos()], dim=1))).chunk(2, dim=1)
        z = functional.relu(encoder((1 + scale) * x + shift))
        left = y - decoder(z)
        loss = left.square().sum(1).mean() / (y.var(0, unbiased=False).sum() + EPSILON) + L1 * z.sum(1).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        with torch.no_grad():
            decoder.weight /= decoder.weight.norm(dim=0, keepdim=True).clamp_min(1e-12)
        return loss.item()

    return take


def sparsify_loop(rows: ActivationRows) -> Callable[[], Any]:
    """Returns a function that takes one step of a TopK transcoder as sparsify's trainer does, with Adam."""
    import numpy as np
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(0)
    x, y = (torch.from_numpy(np.array(a[0])) for a in rows[:2])
    coder = SparseCoder(WIDTH, SparseCoderConfig(num_latents=FEATURES, k=ARGS.k, transcode=True))
    adam = torch.optim.Adam(coder.parameters(), lr=LR, betas=BETAS)
    dead = torch.arange(FEATURES) < ARGS.dead * FEATURES

    def take() -> float:
        out = coder(x, y, dead_mask=dead)
        loss = out.fvu + out.auxk_loss / 32
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        return loss.item()

    return take


def torch_rate(size: int = 2048) -> float:
    """Returns PyTorch's floating-point operations per second in a float32 matrix product."""
    import torch

    a = torch.ones(size, size)
    return 2 * size**3 / min(timed(lambda: a @ a)[0] for _ in range(5))


def jax_rate(size: int = 2048) -> float:
    """Returns JAX's, in the precision of the training step's products."""
    a = jnp.ones((size, size), jnp.float32 if ON_CPU else jnp.bfloat16)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    return 2 * size**3 / min(timed(lambda: jax.block_until_ready(product(a)))[0] for _ in range(5))


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Returns how long `work()` takes, by the clock that counts here and by the wall's."""
    begin = time.process_time(), time.perf_counter()
    work()
    processor, wall = time.process_time() - begin[0], time.perf_counter() - begin[1]
    return (processor if ONE_THREAD else wall), wall


def row_flops(name: str) -> int:
    """Counts a row's operations: six dense products; or the encoder's alone, and six sums over k active features."""
    if name.endswith("sparse") or name.startswith("sparsify"):
        return 2 * WIDTH * FEATURES + 6 * 2 * WIDTH * ARGS.k
    return 6 * 2 * WIDTH * FEATURES


def machine() -> dict[str, Any]:
    """Returns where this runs."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(": ")[1] for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "devices": [device.device_kind for device in jax.devices()],
        "threads": ARGS.threads,
        "load": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "size": {"d_model": WIDTH, "features": FEATURES, "batch": BATCH, "k": ARGS.k, "dead": ARGS.dead},
        "products": "float32" if ON_CPU else "bfloat16, sums in float32",
    }


def measure_all() -> dict[str, Any]:
    """Runs every contestant; returns the machine and one record each."""
    rows, record = batch(), machine()
    makers: dict[str, Callable[[], Any]] = {"relu": lambda: ours("relu", False, rows)}
    for name in ("topk", "batchtopk"):
        makers[name] = lambda name=name: ours(name, False, rows)
        makers[f"{name} sparse"] = lambda name=name: ours(name, True, rows)
    rates = {"jax": jax_rate()}
    if ON_CPU and importlib.util.find_spec("torch"):
        import torch

        if ARGS.threads:
            torch.set_num_threads(ARGS.threads)
            torch.set_num_interop_threads(ARGS.threads)
        record["torch"] = torch.__version__
        rates["torch"] = torch_rate()
        makers = {"torch relu": lambda: torch_loop(rows)} | makers
        if importlib.util.find_spec("sparsify"):
            makers["sparsify topk"] = lambda: sparsify_loop(rows)
    if ARGS.only:
        makers = {name: make for name, make in makers.items() if name in ARGS.only.split(",")}
    steps = {name: make() for name, make in makers.items()}
    first = {name: timed(step) for name, step in steps.items()}
    for step in steps.values():
        step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(ARGS.repeats):
        for name, step in steps.items():
            times[name].append(timed(step))
    record["matmul GFLOP/s"] = {name: round(value / 1e9, 1) for name, value in rates.items()}
    median = {name: [statistics.median(column) for column in zip(*each, strict=True)] for name, each in times.items()}
    beside = median.get("torch relu")
    record["steps"] = {
        name: {
            "s": round(seconds, 4),
            "wall s": round(wall, 4),
            "rows/s": round(BATCH / seconds),
            "share of matmul rate": round(
                row_flops(name) * BATCH / seconds / rates["torch" if name.startswith(("torch", "sparsify")) else "jax"],
                3,
            ),
            "times torch": round(beside[0] / seconds, 2) if beside else None,
            "bar": BARS.get(name) if beside else None,
            "first step, with compilation, s": round(first[name][0], 2),
        }
        for name, (seconds, wall) in median.items()
    }
    return record


TRAINING = {"model": "organism", "prompts": "world", "sites": ("img/*", "txt/*"), "expansion": 8, "k": 16, "batch": 512}
TRAINING |= {"buffer_rows": 8192, "refresh": 0.5, "steps": 72, "log_every": 8, "checkpoint_every": 1000, "warmup": 8}
ROUND = 8
"""Steps of a round: rows are made anew after as many."""


def overlapped(repeats: int, **changes: Any) -> dict[str, Any]:
    """Trains the organism's transcoders, overlapped and not, in turn.

    Args:
        repeats: trainings of each.
        changes: of `TRAINING`.

    Returns:
        The machine, and for each place that rows come from the medians, the median of the pairs' ratios, and whether
        all weights are the same.
    """
    pipe, record = load_pipeline("organism"), machine()
    del record["size"], record["threads"]
    given = TRAINING | changes
    with tempfile.TemporaryDirectory() as home:
        stored = {"train": open_rows_of(pipe, given)}
        write_store(stored, {"train": 32}, Path(home) / "rows", {})
        places = {"buffer on the device": {}, "buffer on the host": {"buffer": "host"}}
        places["rows from files"] = {
            "rows": str(Path(home) / "rows"),
            "model": None,
            "prompts": None,
            "sites": ("*/*",),
        }
        rows: dict[str, Any] = {}
        for name, more in places.items():
            taken, weights = [], []
            for repeat in range(repeats):
                pair = []
                for overlap in ("off", "on"):
                    out = Path(home) / f"{name}-{repeat}-{overlap}"
                    one, made = trained(pipe, given | more | {"overlap": overlap, "out": out})
                    pair.append(one)
                    weights.append(made)
                taken.append(pair)
            off, on = (statistics.median(column) for column in zip(*taken, strict=True))
            ratio = statistics.median(after / before for before, after in taken)
            same = all(tree_hash(weights[0]) == tree_hash(each) for each in weights)
            rows[name] = {"off, s": round(off, 2), "on, s": round(on, 2), "on / off": round(ratio, 3), "same": same}
    return record | {"steps": rows}


def open_rows_of(pipe: Any, given: dict[str, Any]) -> Any:
    """Returns the organism's rows, as a training with these settings has them."""
    settings = TrainConfig(**{name: value for name, value in given.items() if name not in ("overlap", "out")}, out="o")
    return open_sampler(settings, pipe, "train", caption=world_of(settings))


def trained(pipe: Any, given: dict[str, Any]) -> tuple[float, Any]:
    """Trains; returns the seconds from the end of the first round on, and the weights."""
    settings, times = TrainConfig(**given), {}
    source = rows_in(settings, "train") if settings.rows else open_rows_of(pipe, given)

    def progress(step: int, total: int, means: Any) -> None:
        times[step] = time.perf_counter()

    done = train(settings, source, provenance("train", settings), Watch(progress, lambda sentence: None))
    return times[settings.steps] - times[2 * ROUND], done.transcoders.stacks


def main() -> None:
    """Prints the machine, then a table; or one JSON document."""
    record = overlapped(ARGS.repeats) if ARGS.overlap else measure_all()
    if ARGS.json:
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
        return
    steps = record.pop("steps")
    sys.stdout.write("".join(f"{name}: {value}\n" for name, value in record.items()))
    heads = list(next(iter(steps.values())))
    lines = [["step", *heads], ["---"] * (len(heads) + 1)]
    lines += [[name, *("" if v is None else str(v) for v in figures.values())] for name, figures in steps.items()]
    sys.stdout.write("\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines))


if __name__ == "__main__":
    main()
