"""What a scan of FLUX.1[schnell] with its dashboards takes, counted: nothing is loaded, nothing is run.

76 sites of 49,152 features each; bytes on the device, and on disk while it runs and in the end. Weights and activations
are what `difffract plan dashboards` counts. With `--prompts`, `--top` and the like other scans; as JSON with `--json`.

    python benchmarks/dashboards.py
"""

import argparse
import json

from difffract_jax.cli.settings import PlanConfig
from difffract_jax.cli.workloads import workload
from difffract_jax.config import resolve
from difffract_jax.dashboards.features.request import DashboardOptions, sizes_of
from difffract_jax.estimate.counts import count
from difffract_jax.estimate.scanning import disk_bytes, state_bytes
from difffract_jax.loading import described_pipeline
from difffract_jax.models.pipeline import plan_run
from difffract_jax.transcoders.sites import parse_sites

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--model", default="flux-schnell", help="published model")
PARSER.add_argument("--expansion", type=int, default=16, help="features of a transcoder over channels of the model")
PARSER.add_argument("--prompts", type=int, default=4096, help="prompts of the corpus")
PARSER.add_argument("--top", type=int, default=10, help="strongest examples of a feature")
PARSER.add_argument("--per-third", type=int, default=2, help="examples of each third of the others")
PARSER.add_argument("--steps", type=int, default=4, help="denoising steps")
PARSER.add_argument("--json", action="store_true", help="print one JSON object")
WAYS = ("resident", "streamed")


def measure(args: argparse.Namespace) -> dict[str, int]:
    """Returns bytes by name."""
    config = described_pipeline(args.model)
    run, sites = plan_run(config, steps=args.steps), parse_sites(["*/*"], config.transformer.layout)
    features = args.expansion * config.transformer.d_model
    options = DashboardOptions(top=args.top, per_third=args.per_third)
    sizes = sizes_of(config, run, sites, features, args.prompts, options)
    disk = disk_bytes(sizes)
    planned = {"sites": ("*/*",), "expansion": float(args.expansion), "transcoder_dtype": "bf16"}
    works = {way: workload("dashboards", resolve(PlanConfig, planned), streamed=way == "streamed") for way in WAYS}
    return {
        "sites": len(sizes.sites),
        "features": sizes.all_features,
        "statistics, a feature": state_bytes(sizes) // sizes.all_features,
        "statistics on the device": state_bytes(sizes),
        **{f"device in all, bf16 weights {way}": count(work).needed for way, work in works.items()},
        "disk, statistics kept meanwhile": disk.state,
        "disk, maps kept meanwhile, at most": disk.maps,
        "disk, record": disk.record,
        "disk, pages": disk.pages,
        "disk, pictures": disk.pictures,
        "disk while it runs, at most": disk.total,
        "disk in the end": disk.final,
    }


def main() -> None:
    """Prints the table."""
    args = PARSER.parse_args()
    found = measure(args)
    if args.json:
        print(json.dumps(found))
        return
    for name, size in found.items():
        plain = name in ("sites", "features", "statistics, a feature")
        print(f"{name:<44} {size:>18,}" + ("" if plain else f"   {size / 2**30:10,.1f} GiB"))


if __name__ == "__main__":
    main()
