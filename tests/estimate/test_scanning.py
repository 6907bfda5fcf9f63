"""What a scan takes is counted: the state of features exactly, the command's phases as those of others."""

import jax
import pytest

from difffract_jax.cli.settings import PlanConfig
from difffract_jax.cli.workloads import workload
from difffract_jax.config import resolve
from difffract_jax.dashboards.features import state as feature_state
from difffract_jax.estimate import scanning
from difffract_jax.estimate.counts import count
from difffract_jax.estimate.scanning import ScanSizes, disk_bytes, feature_bytes, state_bytes


@pytest.mark.parametrize(("top", "sample", "steps"), [(10, 32, 4), (1, 1, 1), (7, 50, 28)])
def test_a_feature_s_bytes_are_those_of_its_arrays(top, sample, steps):
    state = jax.eval_shape(lambda: feature_state.empty_state(3, 20, top=top, sample=sample, evaluations=steps))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    sizes = ScanSizes(20, ((1, True),) * 3, steps, 9, 16, 100, top=top, sample=sample)
    assert state_bytes(sizes) == held == 3 * 20 * feature_bytes(steps, top, sample) + 3 * 4
    assert scanning.BINS == feature_state.BINS


def test_flux_at_full_size_is_counted_as_any_command():
    asked = {"sites": ("*/*",), "expansion": 16.0, "transcoder_dtype": "bf16"}
    resident, streamed = (
        count(workload("dashboards", resolve(PlanConfig, asked), streamed=streamed)) for streamed in (False, True)
    )
    (scan,) = (phase for phase in resident.phases if phase.name == "scan")
    assert scan.held["statistics"] == 76 * 49_152 * (feature_bytes(4) + 8)
    tokens = 19 * 4096 + 19 * 256 + 38 * (4096 + 256)
    assert scan.held["what sites read"] == tokens * 3072 * 2
    assert resident.needed > 60 * 2**30 > 30 * 2**30 > streamed.needed


def test_fewer_pages_take_less_disk():
    every = ScanSizes(512, ((36, True), (20, False)), 4, 4096, 20, 48 * 48 * 3)
    few = every._replace(pages=10)
    assert disk_bytes(few).pages < disk_bytes(every).pages and disk_bytes(few).record == disk_bytes(every).record
    assert disk_bytes(every).total >= disk_bytes(every).final
