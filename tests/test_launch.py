"""The recipes under configs/launch: each is of its launcher's form, and what it runs trains, without a disk in common.

Launchers are stood in for by small scripts of their names: `gcloud` and `srun` start a command several times,
`scontrol` notes that it was called, and `difffract` notes its arguments, or trains something small.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import jax
import numpy as np
import pytest
import typer
import yaml

from bucket_servers import google_server
from difffract_jax.cli.main import app
from difffract_jax.config import resolve
from difffract_jax.loading import load_transcoders
from difffract_jax.sharding import parse_mesh
from difffract_jax.storage.remote import cache
from difffract_jax.storage.remote.addresses import parse_address
from difffract_jax.storage.remote.bucket import open_bucket
from difffract_jax.transcoders.run_place import is_finished
from difffract_jax.transcoders.settings import TrainConfig

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs/launch").iterdir())
CHIPS = {"gke-jobset.yaml": 4 * 4, "one-machine.sh": 8, "slurm.sbatch": 2 * 8, "tpu-vm.sh": 16}
"""Devices that each recipe says it has."""
HOSTS = {"gke-jobset.yaml": 2, "one-machine.sh": 1, "slurm.sbatch": 2, "tpu-vm.sh": 2}
"""Processes that stand for them here."""
GCLOUD = """
[[ "$1 $2 $3 $4 $5" = "compute tpus tpu-vm ssh my-tpu" ]] || exit 9
for given in "$@"; do [[ $given = --command=* ]] && command=${given#--command=}; done
for n in $(seq 0 $((HOSTS - 1))); do NUMBER=$n HOME="$PLACE/worker-$n" bash -c "$command" & workers+=($!); done
for worker in "${workers[@]}"; do wait $worker || exit 1; done
"""
SRUN = """
while [[ $1 = --* ]]; do shift; done
for n in $(seq 0 $((HOSTS - 1))); do SLURM_PROCID=$n SLURM_LOCALID=$n NUMBER=$n "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait $task || exit 1; done
"""
NOTE = 'for given in "$@"; do printf "%s\\n" "$given"; done > "$PLACE/{name}-${{NUMBER:-0}}"\n'
ORGANISM = ("model=organism", "prompts=world", "model_dtype=f32", "sites=[img/0,txt/0]", "expansion=2", "k=4")
ORGANISM += ("height=null", "width=null", "text_tokens=null", "time_embed=4", "batch=64", "buffer_rows=1024", "steps=6")
ORGANISM += ("prompts_at_once=4", "tokens_per_step=16", "aux_k=8", "warmup=2", "log_every=1", "checkpoint_every=3")
ORGANISM += ("mesh=data=2",)
TRAIN = f"""
mkdir -p "$PLACE/host-$NUMBER/copies"
[[ $HOSTS = 1 ]] || cd "$PLACE/host-$NUMBER"
export {cache.FOLDER}="$PLACE/host-$NUMBER/copies" JAX_NUM_CPU_DEVICES=$((2 / HOSTS))
given=()
for word in "$@"; do [[ $word = auto && -n $JOIN ]] && word=$JOIN,$NUMBER,$HOSTS; given+=("$word"); done
exec "{sys.executable}" -m difffract_jax "${{given[@]}}" {" ".join(f"--set '{each}'" for each in ORGANISM)} $MORE
"""


class Launcher:
    """Runs recipes where every program that they call stands in a folder.

    Attributes:
        place: the folder of what they write.
        environment: that they run in.
    """

    def __init__(self, place: Path, bucket: str, **environment: str) -> None:
        """Writes the launchers that are stood in for.

        Args:
            place: an empty folder.
            bucket: what BUCKET shall be.
            environment: variables besides.
        """
        self.place, self.programs = place, place / "programs"
        self.programs.mkdir()
        # Not a link, by which Python would not find its virtual environment.
        self.write("python", f'exec {shlex.quote(sys.executable)} "$@"\n')
        for name, text in (("gcloud", GCLOUD), ("srun", SRUN), ("scontrol", NOTE.format(name="scontrol"))):
            self.write(name, text)
        for number in range(4):
            activate = place / f"worker-{number}/.venv/bin/activate"
            activate.parent.mkdir(parents=True)
            activate.touch()
        self.environment = os.environ | {"PATH": f"{self.programs}:{os.environ['PATH']}", "PLACE": str(place)}
        self.environment |= {"TPU": "my-tpu", "ZONE": "my-zone", "BUCKET": bucket, "PYTHONPATH": str(ROOT)}
        self.environment |= {"SLURM_JOB_ID": str(os.getpid()), "HOSTS": "1", "NUMBER": "0", "JOIN": ""} | environment

    def write(self, name: str, text: str) -> None:
        """Writes a program that a recipe calls."""
        (self.programs / name).write_text(f"#!/usr/bin/env bash\n{text}", encoding="utf-8")
        (self.programs / name).chmod(0o755)

    def start(self, recipe: Path, **environment: str) -> subprocess.Popen:
        """Starts what a recipe runs."""
        given = {"env": self.environment | environment, "cwd": ROOT, "text": True, "stderr": subprocess.PIPE}
        given["start_new_session"] = True  # so that all that it started can be ended with it
        return subprocess.Popen(["bash", "-c", script_of(recipe)], **given)

    def noted(self, name: str) -> list[list[str]]:
        """Returns the arguments of every call of a program that notes them, by number."""
        return [path.read_text().splitlines() for path in sorted(self.place.glob(f"{name}-*"))]


def script_of(recipe: Path) -> str:
    """Returns the shell script that a recipe is, or holds."""
    text = recipe.read_text(encoding="utf-8")
    if recipe.suffix != ".yaml":
        return text
    (container,) = pod_of(recipe)["containers"]
    *shell, script = container["command"]
    assert shell == ["bash", "-c"]
    return script


def pod_of(recipe: Path) -> dict:
    """Returns the description of a job set's pods."""
    (job,) = yaml.safe_load(recipe.read_text(encoding="utf-8"))["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


def test_there_is_a_recipe_for_every_launcher_and_each_is_described() -> None:
    assert [recipe.name for recipe in RECIPES] == sorted(CHIPS)
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert all(f"configs/launch/{name}" in page for name in CHIPS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_what_a_recipe_runs_is_understood_and_needs_no_disk_in_common(recipe: Path, tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, "gs://my-bucket/flux", HOSTS="2")
    launcher.write("difffract", NOTE.format(name="difffract"))
    launcher.start(recipe).communicate(timeout=120)  # that nothing is finished is noticed here, too
    calls = launcher.noted("difffract")
    assert len(calls) == (1 if recipe.name in ("gke-jobset.yaml", "one-machine.sh") else 2)
    for name, *arguments in calls:
        assert name == "train"
        given = typer.main.get_command(app).commands["train"].make_context("train", arguments).params
        settings = resolve(TrainConfig, file=ROOT / "configs" / given["file"].name, sets=given["sets"])
        shape = parse_mesh(settings.mesh)
        assert prod(shape.values()) == CHIPS[recipe.name]
        assert 38 % shape["site"] == 0, "FLUX has 38 sites in its double-stream blocks"
        assert given["max_restarts"] == 5
        paths = [str(path) for path in (given["file"], settings.model, settings.prompts, settings.out)]
        if recipe.name == "one-machine.sh":
            assert given["join"] is None
            continue
        assert given["join"] == "auto"
        names = ("train-flux-schnell.yaml", "flux-schnell", "captions.jsonl", "run")
        assert [str(Path(path)) for path in paths] == [str(Path(f"gs://my-bucket/flux/{name}")) for name in names]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_is_valid_shell(recipe: Path) -> None:
    assert subprocess.run(["bash", "-n"], input=script_of(recipe), text=True, check=False).returncode == 0
    options = [line.removeprefix("#SBATCH ") for line in recipe.read_text().splitlines() if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options)


@pytest.mark.parametrize("done", [True, False])
def test_a_pod_ends_well_once_the_transcoders_are_there_and_hands_sigterm_on(tmp_path: Path, done: bool) -> None:
    launcher = Launcher(tmp_path, str(tmp_path))
    launcher.write("difffract", ending(tmp_path / "run") if done else WAITING)
    pod = launcher.start(ROOT / "configs/launch/gke-jobset.yaml")
    if not done:
        ends = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert pod.poll() is None and time.monotonic() < ends
            time.sleep(0.05)
        pod.terminate()
    _, said = pod.communicate(timeout=300)
    assert pod.returncode == (0 if done else 1), said
    assert is_finished(tmp_path / "run") == done and (tmp_path / "saved").exists() != done


@pytest.mark.parametrize("done", [True, False])
def test_a_job_queues_itself_again_until_the_transcoders_are_there(tmp_path: Path, done: bool) -> None:
    launcher = Launcher(tmp_path, str(tmp_path))
    launcher.write("difffract", ending(tmp_path / "run") if done else "exit 0\n")
    job = launcher.start(ROOT / "configs/launch/slurm.sbatch")
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert launcher.noted("scontrol") == ([] if done else [["requeue", str(os.getpid())]])


WAITING = """trap 'touch $PLACE/saved; kill $!; exit 0' TERM
touch $PLACE/started; sleep 60 & wait
"""


def ending(run: Path) -> str:
    """Returns what leaves the files of a run behind that has ended well."""
    lines = [f"mkdir -p {run}/transcoders", f'echo \'{{"settings": {{"steps": 6}}}}\' > {run}/train.json']
    lines.append(f"echo '{{\"provenance\": {{}}}}' > {run}/transcoders/config.json")
    return "\n".join(lines) + "\n"


def test_the_job_set_asks_for_the_chips_of_its_topology() -> None:
    document = yaml.safe_load((ROOT / "configs/launch/gke-jobset.yaml").read_text(encoding="utf-8"))
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips = prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    assert job["parallelism"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips == 16
    assert [volume["name"] for volume in pod["volumes"] if "emptyDir" not in volume] == [], "pods share no disk"


@pytest.fixture(scope="module")
def bucket() -> Iterator[Callable[[str, bytes], None]]:
    """Puts objects into an emulated bucket gs://bucket, which processes find, too."""
    with google_server() as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)

        def put(url: str, content: bytes) -> None:
            at = parse_address(url)
            open_bucket(at).write(at.key, content)

        yield put


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def trained(recipe: Path, place: Path, bucket: Callable[[str, bytes], None], **more: str) -> list[np.ndarray]:
    """Runs a recipe, its model made small, and returns the weights that it learns."""
    hosts, home = HOSTS[recipe.name], f"gs://bucket/{recipe.stem}"
    bucket(f"{home}/train-flux-schnell.yaml", (ROOT / "configs/train-flux-schnell.yaml").read_bytes())
    launcher = Launcher(place, home, HOSTS=str(hosts), JAX_PLATFORMS="cpu", **more)
    launcher.write("difffract", TRAIN)
    pods = hosts if recipe.suffix == ".yaml" else 1  # the other launchers start all hosts themselves
    processes = [launcher.start(recipe, NUMBER=str(n)) for n in range(pods)]
    try:
        for process in processes:
            _, said = process.communicate(timeout=900)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    run = place / "run" if hosts == 1 else Path(f"{home}/run")
    assert is_finished(run) and launcher.noted("scontrol") == []
    return jax.tree.leaves(load_transcoders(run / "transcoders").stacks)


@pytest.fixture(scope="module")
def alone(bucket: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """What one process of one machine learns."""
    place = tmp_path_factory.mktemp("alone")
    return trained(ROOT / "configs/launch/one-machine.sh", place, bucket, MORE=f"--set out={place / 'run'}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, hosts in HOSTS.items() if hosts > 1])
def test_what_a_recipe_runs_trains_on_hosts_without_a_common_disk_as_on_one(
    name: str, alone: list, bucket: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "copies"))
    # JAX finds processes by itself under Slurm, by its variables; TPUs and their metadata are not here.
    slurm = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1", "JOIN": ""}
    join = slurm if name == "slurm.sbatch" else {"JOIN": f"localhost:{free_port()}"}
    weights = trained(ROOT / "configs/launch" / name, tmp_path, bucket, MORE="--set overlap=on", **join)
    assert all(map(np.array_equal, weights, alone))
