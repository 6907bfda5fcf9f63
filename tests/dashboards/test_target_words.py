"""A target in words, by its name alone."""

import pytest

from difffract_jax.dashboards.target_words import target_box, target_title, target_words


@pytest.mark.parametrize(
    ("target", "title", "words", "box"),
    [
        (
            *("pixels:color=blue,box=1,2,30,40", "Why these pixels are blue"),
            *("how blue the pixels from (1, 2) to (30, 40) are: 0 for grey", (1, 2, 30, 40)),
        ),
        (
            *("pixels:color=red,minus=blue", "Why the image is red"),
            *("how red the whole image's pixels are: 0 for blue", None),
        ),
        ("pixels:color=#ff0000,mask=a.png", "Why these pixels are #ff0000", "how #ff0000 the masked pixels are", None),
        (
            'velocity:contrast="a fox, asleep",box=0,0,8,8',
            "Why these pixels become what the prompt says, and not “a fox, asleep”",
            *("goes away from that of the prompt a fox, asleep", (0, 0, 8, 8)),
        ),
        (
            *("velocity:", "Why this denoising step changes the image as it does"),
            *("the velocity that the model predicts, along its own direction", None),
        ),
        (
            *("velocity:mask=a.png", "Why this denoising step changes these pixels as it does"),
            *("the velocity that the model predicts at the masked pixels, along its own direction", None),
        ),
        (
            *(
                'velocity:contrast="a blue circle"#3',
                "Why the image becomes what the prompt says, and not “a blue circle”",
            ),
            *("how far the prediction goes away from that of the prompt a blue circle", None),
        ),
        ("img/1/f4@13#2", "Why img/1/f4 (colour blue) is active", "a feature (colour blue) at position 13", None),
        ("single/0/f4@img3", "Why single/0/f4 (colour blue) is active", "at image position 3", None),
        ("single/0/f4@txt", "Why single/0/f4 (colour blue) is active", "a feature (colour blue)", None),
        ("logit 7 <b>", "Why logit 7 <b>", "what the graph explains", None),
    ],
)
def test_targets_are_told_in_words(target, title, words, box):
    assert target_title(target, "colour blue") == title
    assert words in target_words(target, "colour blue") and target_box(target) == box
