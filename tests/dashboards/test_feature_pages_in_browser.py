"""The pages in Chromium, from a disk: a feature opens by its address, and texts from outside stay texts."""

import html
import re
import shutil
import subprocess

import pytest
from scans import PROMPTS, places, small

from difffract_jax.dashboards.features.build import build_dashboards
from difffract_jax.dashboards.features.request import DashboardOptions
from difffract_jax.dashboards.features.texts import Text

pytestmark = pytest.mark.browser
HOSTILE = "</script><img src=x onerror='document.title=1'><script>document.title=2</script>\u202e\"'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("pages") / "a folder, with 'quotes' & ümlauts"
    edges = {"img/1/f3": {"up": [[HOSTILE, 0.5], ["img/0/f1", -0.25]], "down": []}}
    options = DashboardOptions(
        top=3, per_third=1, sample=5, texts={"img/1/f3": Text(HOSTILE)}, edges=edges, graph=HOSTILE
    )
    build_dashboards(small().corpus, small().tcs, out, options)
    return out


def opened(folder, tmp_path, address, size="1280,720"):
    """Returns the page after its scripts have run, and what the console said."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "Chromium must be installed for tests that are marked `browser`"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}", "--virtual-time-budget=4000"]
    options += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    page = (folder / "index.html").as_uri() + address
    run = subprocess.run([chromium, *options, page], capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    return run.stdout, console


def text_of(page):
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))


def test_a_feature_opens_by_its_address(folder, tmp_path):
    page, console = opened(folder, tmp_path, "#single/0/f5")
    assert 'data-ready="single/0/f5"' in page and "<title>single/0/f5</title>" in page and not console
    text = text_of(page)
    for words in ("Strongest examples", "share of the site's L0", "Upstream, by weights", "Direct effect on pixels"):
        assert words in text
    assert page.count('class="example"') >= 3 and page.count("<canvas") >= 3
    assert "difffract trace MODEL TRANSCODERS" in text and any(prompt in text for prompt in PROMPTS)


def test_texts_from_outside_are_shown_and_not_run(folder, tmp_path):
    page, console = opened(folder, tmp_path, "#img/1/f3")
    assert "<title>img/1/f3</title>" in page and not console
    assert "<img" not in page and "onerror=" not in html.unescape(re.sub(r">[^<]*<", "><", page).replace(HOSTILE, ""))
    assert html.unescape(page).count(HOSTILE) >= 3


def test_a_feature_that_never_fires_says_so(folder, tmp_path):
    page, _ = opened(folder, tmp_path, "#img/1/f7")
    assert "It was never active: none of the 7 prompts of this scan made it fire." in text_of(page)


@pytest.mark.parametrize(
    ("address", "said"),
    [("", "320 features of the transcoders"), ("#img/9/f1", "There is no feature img/9/f1 in this scan.")]
    + [("#img/1/f999", "There is no page of img/1/f999 in this scan.")],
)
def test_other_addresses_are_answered(folder, tmp_path, address, said):
    page, console = opened(folder, tmp_path, address, size="390,844")
    assert said in text_of(page) and set(places(small())) <= set(re.findall(r">(\w+/\d)<", page))
    assert not [line for line in console if "ERR_FILE_NOT_FOUND" not in line]
