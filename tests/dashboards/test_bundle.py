"""The built page that ships is what its sources build, with the licences of what is in it."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from difffract_jax.dashboards.viewer_page import BUNDLE

PAGE = BUNDLE.parent / "page"
NPM = [program for program in (shutil.which("npm"),) if program]


def test_the_bundle_was_built_of_these_sources():
    names = ["build.mjs", "package-lock.json", "package.json", *(f"src/{path.name}" for path in PAGE.glob("src/*"))]
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\n".encode() + (PAGE / name).read_bytes())
    built = (BUNDLE / "SOURCES.sha256").read_text(encoding="utf-8").strip()
    assert built == digest.hexdigest(), "run `npm ci && npm run build` in difffract_jax/dashboards/page"


@pytest.mark.slow
@pytest.mark.parametrize("npm", NPM)
def test_a_build_gives_the_bundle(npm, tmp_path):
    page = tmp_path / "page"
    shutil.copytree(PAGE, page, symlinks=True)
    if not (page / "node_modules").is_dir():
        subprocess.run([npm, "ci", "--no-audit", "--no-fund"], cwd=page, check=True, capture_output=True)
    subprocess.run([npm, "run", "build", "--", str(tmp_path / "out")], cwd=page, check=True, capture_output=True)
    for path in BUNDLE.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_bundle_is_small_and_names_no_server():
    script, style = ((BUNDLE / name).read_text(encoding="utf-8") for name in ("viewer.js", "viewer.css"))
    assert len(script) < 180_000 and len(style) < 30_000
    addresses = {*re.findall(r"https?://[\w./-]+", script + style)}
    assert {address.split("/")[2] for address in addresses} <= {"www.w3.org"}  # names of XML, which nobody fetches
    assert "</script" not in script and "eval(" not in script


def test_every_package_in_the_bundle_has_its_licence():
    licences = (BUNDLE / "LICENSES.txt").read_text(encoding="utf-8")
    for name in ("d3-selection", "d3-zoom", "d3-quadtree", "fflate"):
        assert re.search(rf"^{name} \d", licences, re.MULTILINE)
    assert "Permission" in licences


def test_dependencies_are_pinned_and_the_lock_names_no_server():
    lock = (PAGE / "package-lock.json").read_text(encoding="utf-8")
    assert "resolved" not in lock and "integrity" in lock
    manifest = (PAGE / "package.json").read_text(encoding="utf-8")
    assert not re.search(r'": "[\^~*>]', manifest)
    assert not [path for path in Path(BUNDLE).iterdir() if path.suffix in (".map", ".html")]
