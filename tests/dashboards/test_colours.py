"""Colours of the viewer that mean something are told apart with common colour blindness, and text is readable."""

import itertools
import re

import numpy as np
import pytest

from difffract_jax.dashboards.viewer_page import BUNDLE

SOURCES = BUNDLE.parent / "page" / "src"
SEEN = {
    "normal": np.eye(3),
    # Machado, Oliveira, Fernandes 2009, severity 1.
    "protanopia": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deuteranopia": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritanopia": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}
APART = [("image", "text"), ("positive", "negative"), ("image", "error"), ("text", "error"), ("image", "ink")]


def theme(name):
    """Returns the colours of the drawing in a theme, by what they mean."""
    text = (SOURCES / "colours.js").read_text(encoding="utf-8")
    block = re.search(rf"const {name} = {{(.*?)^}};", text, re.DOTALL | re.MULTILINE)[1]
    return dict(re.findall(r'(\w+): "(#[0-9a-f]{6})"', block))


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    scaled = xyz / np.array([0.9505, 1, 1.089])
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(("name", "sight"), [*itertools.product(("LIGHT", "DARK"), SEEN)])
def test_what_colours_tell_apart_stays_apart(name, sight):
    colours = theme(name)
    for a, b in APART:
        ours, theirs = (lab(np.clip(SEEN[sight] @ linear(colours[one]), 0, 1)) for one in (a, b))
        assert np.linalg.norm(ours - theirs) > 18, (a, b)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_has_contrast(name):
    style = (SOURCES / "style.css").read_text(encoding="utf-8")
    block = re.search(rf':root\[data-theme="{name}"\] {{(.*?)}}', style, re.DOTALL)[1]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    luminance = {key: float(np.array([0.2126, 0.7152, 0.0722]) @ linear(value)) for key, value in colours.items()}

    def contrast(a, b):
        high, low = sorted((luminance[a], luminance[b]), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert min(contrast("ink", "paper"), contrast("ink", "side")) > 10
    assert min(contrast("muted", "paper"), contrast("muted", "side")) > 4.5
