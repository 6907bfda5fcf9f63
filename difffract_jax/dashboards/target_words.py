"""What a graph explains, in words: `pixels:color=red,box=...` is how red the pixels of a box are (plain Python).

Only the text form of a target is read, as `names.node_names` gives it; the grammar itself is `outputs.parse_target`'s.
"""

import re

from difffract_jax.display import one_line

LONGEST_CONTRAST = 80
"""Characters of another prompt that a heading shows."""
_OPTIONS = re.compile(r'(\w+)=("[^"]*"|[^,"]*(?:,-?\d+)*)')
_FEATURE = re.compile(r"(?P<name>\w+/\d+/f\d+)(?:@(?P<side>img|txt)?(?P<position>\d+)?)?(?:#(?P<step>\d+))?(?:~\w+)?")


def target_box(target: str) -> tuple[int, int, int, int] | None:
    """Returns the box of a target, X0, Y0, X1, Y1 in pixels, X1 and Y1 outside; None if it names none.

    Args:
        target: its name.

    Example:
        >>> target_box("pixels:color=red,box=0,0,24,48")
        (0, 0, 24, 48)
    """
    corners = re.fullmatch(r"(\d+),(\d+),(\d+),(\d+)", _options(target).get("box", ""))
    return None if corners is None else tuple(map(int, corners.groups()))  # pyright: ignore[reportReturnType]


def target_title(target: str, label: str = "") -> str:
    """Returns the heading of a page on a target.

    Args:
        target: its name.
        label: what it stands for, if it is a feature.

    Example:
        >>> target_title("pixels:color=red,box=0,0,24,48")
        'Why these pixels are red'
        >>> target_title("img/1/f476@13", "colour blue")
        'Why img/1/f476 (colour blue) is active'
        >>> target_title('velocity:contrast="a blue circle",box=0,0,24,48')
        'Why these pixels become what the prompt says, and not “a blue circle”'
    """
    given, feature = _options(target), _FEATURE.fullmatch(target)
    some = bool({"box", "mask"} & given.keys())
    if target.startswith("pixels:") and "color" in given:
        return f"Why {'these pixels are' if some else 'the image is'} {given['color']}"
    if target.startswith("velocity:"):
        contrast = one_line(given.get("contrast", ""), LONGEST_CONTRAST)
        if contrast:
            become = "these pixels become" if some else "the image becomes"
            return f"Why {become} what the prompt says, and not “{contrast}”"
        return f"Why this denoising step changes {'these pixels' if some else 'the image'} as it does"
    if feature is not None:
        return f"Why {feature['name']}{f' ({label})' if label else ''} is active"
    return f"Why {target}"


def target_words(target: str, label: str = "") -> str:
    """Returns what a target is, as the rest of a sentence that names it.

    Args:
        target: its name.
        label: what it stands for, if it is a feature.

    Example:
        >>> target_words("pixels:color=red,box=0,0,24,48")
        'how red the pixels from (0, 0) to (24, 48) are: 0 for grey, more for red, less for its opposite'
        >>> target_words("img/1/f476@13", "colour blue")
        'the value of a feature (colour blue) at position 13'
    """
    given, feature = _options(target), _FEATURE.fullmatch(target)
    box = target_box(target)
    place = "the masked pixels" if "mask" in given else "the whole image's pixels"
    place = place if box is None else f"the pixels from ({box[0]}, {box[1]}) to ({box[2]}, {box[3]})"
    if target.startswith("pixels:") and "color" in given:
        colour, minus = given["color"], given.get("minus")
        against = f"0 for {minus}" if minus else "0 for grey"
        return f"how {colour} {place} are: {against}, more for {colour}, less for its opposite"
    if target.startswith("velocity:"):
        where = "" if box is None and "mask" not in given else f" at {place}"
        contrast = given.get("contrast")
        size = f"the velocity that the model predicts{where}, along its own direction"
        return f"how far the prediction{where} goes away from that of the prompt {contrast}" if contrast else size
    if feature is not None:
        called = f"the value of a feature{f' ({label})' if label else ''}"
        side = f"{'image' if feature['side'] == 'img' else 'text'} " if feature["side"] else ""
        return called + (f" at {side}position {feature['position']}" if feature["position"] else "")
    return "what the graph explains"


def _options(target: str) -> dict[str, str]:
    """Returns the options of a target's name, unquoted."""
    _, colon, rest = target.partition(":")
    return {key: value.strip('"') for key, value in _OPTIONS.findall(rest)} if colon else {}
