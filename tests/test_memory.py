"""Sizes as people write them, and the tightest of the limits that bind this process."""

import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from difffract_jax.config import UserError
from difffract_jax.memory import Memory, device_memory, free_disk, host_memory, memory_for, parse_bytes, text_of_bytes

KIB, GIB = 2**10, 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16 * 10**9), ("24GiB", 24 * GIB), ("500 mb", 500 * 10**6), (".5gib", GIB // 2), ("7B", 7), ("2kB", 2000)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size == parse_bytes(size)


@pytest.mark.parametrize("text", ["16", "sixteen", "", "16GX", "-3GB", "1e9B", "GB", "nanGB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match=r"^--memory must be a size with its unit, as in \d+GB"):
        parse_bytes(text, "--memory")


@pytest.mark.parametrize("size", ["0GB", 0, -1])
def test_nothing_is_refused(size: str | int) -> None:
    with pytest.raises(UserError, match="more than nothing"):
        parse_bytes(size)


def test_a_written_size_is_read_again() -> None:
    assert parse_bytes(text_of_bytes(3 * GIB)) == 3 * GIB


def machine(root: Path, files: dict[str, str]) -> Path:
    """Makes a file system of a machine with 24 GiB, 20 of them available."""
    meminfo = f"MemTotal:  {24 * GIB // KIB} kB\nMemFree:  99 kB\nMemAvailable:  {20 * GIB // KIB} kB\n"
    for name, text in ({"proc/meminfo": meminfo, "proc/self/status": "VmData:\t0 kB\n"} | files).items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return root


def test_without_limits_the_machine_counts(tmp_path: Path) -> None:
    v2 = {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n", "sys/fs/cgroup/a/memory.current": "5\n"}
    v1 = {
        "proc/self/cgroup": "4:memory:/a\n1:cpu:/b\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "5\n",
    }
    for number, files in enumerate(({}, v2, v1, {"proc/self/cgroup": "nonsense\n"})):
        assert host_memory(machine(tmp_path / str(number), files)) == (24 * GIB, 20 * GIB, "the machine")


def test_a_control_group_binds_less_the_pages_that_can_be_dropped(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/slice/job\n",
            # The outer group is the tighter one.
            "sys/fs/cgroup/slice/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/slice/memory.current": f"{7 * GIB}\n",
            "sys/fs/cgroup/slice/memory.stat": f"anon 1\ninactive_file {4 * GIB}\nactive_file {GIB}\n",
            "sys/fs/cgroup/slice/job/memory.max": f"{16 * GIB}\n",
            "sys/fs/cgroup/slice/job/memory.current": "0\n",
        },
    )
    assert host_memory(root) == (8 * GIB, 6 * GIB, "its control group")


def test_a_container_that_does_not_see_its_own_path_is_bound_too(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/0123\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB}\n",
        },
    )
    assert host_memory(root) == (4 * GIB, 2 * GIB, "its control group")


@pytest.mark.parametrize(("name", "words"), [("RLIMIT_DATA", "ulimit -d"), ("RLIMIT_AS", "ulimit -v")])
def test_the_process_own_limit_binds(name: str, words: str) -> None:
    code = (
        "import resource\n"
        f"resource.setrlimit(resource.{name}, ({2 * GIB}, resource.RLIM_INFINITY))\n"
        "from difffract_jax.memory import host_memory\n"
        "print(*host_memory(), sep=',')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, available, bound = run.stdout.strip().split(",")
    assert int(total) == 2 * GIB and 0 < int(available) < 2 * GIB and bound == words


def test_this_machine_has_memory() -> None:
    found = host_memory()
    assert 0 < found.available <= found.total
    soft = resource.getrlimit(resource.RLIMIT_DATA)[0]
    assert soft == resource.RLIM_INFINITY or found.total <= soft


def test_a_device_says_what_its_allocator_may_use() -> None:
    gpu = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 60 * GIB, "bytes_in_use": GIB})
    silent = SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    cpu = SimpleNamespace(platform="cpu", memory_stats=lambda: None)
    assert device_memory(gpu) == memory_for(gpu) == Memory(60 * GIB, 59 * GIB, "the device")
    assert device_memory(silent) is None and device_memory(cpu) is None
    assert memory_for(cpu).total == host_memory().total


def test_the_disk_of_a_path_that_is_not_there_is_its_parents(tmp_path: Path) -> None:
    # Others write to the disk meanwhile.
    free = free_disk(tmp_path)
    assert free > 0 and free_disk(tmp_path / "not" / "there") == pytest.approx(free, rel=0.05)
