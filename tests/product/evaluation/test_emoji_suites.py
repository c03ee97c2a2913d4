"""Suites of emoji against artists of known skill."""

import pytest
import torch
from torch.nn.functional import interpolate

from ldm.data.images import ImageTransform
from ldm.demo.emoji_suites import Emoji, recombined, retrieval, transfer
from ldm.demo.style import softened
from ldm.evaluation import suites
from ldm.evaluation.features import space

PIXELS = [space("pixels:8")]
TRANSFORM, WHOLE = ImageTransform(size=32), ImageTransform(size=64)


@pytest.fixture(scope="module")
def emoji() -> Emoji:
    pytest.importorskip("resvg_py")
    return Emoji(TRANSFORM, groups=("food",))


def artist(emoji: Emoji, shift: int = 0):
    known = {emoji.caption(n): n for n in range(len(emoji.gallery))}
    return lambda texts: emoji.gallery[
        [(known[text] + shift) % len(emoji.gallery) for text in texts]
    ]


def test_emoji_are_found_by_who_draws_them(emoji) -> None:
    found = retrieval(artist(emoji), emoji, PIXELS, count=50).figures
    assert found["top-1, pixels:8"] == found["top-5, pixels:8"]
    assert (found["top-1, pixels:8"].value, found["top-1, pixels:8"].n) == (1, 50)
    assert found["top-5 shuffled, pixels:8"].value < 0.3
    wrong = retrieval(artist(emoji, 1), emoji, PIXELS, count=50).figures
    assert wrong["top-1, pixels:8"].value == 0


def test_known_emoji_on_backgrounds_they_were_never_seen_on(emoji) -> None:
    known = {emoji.caption(n): n for n in range(len(emoji.gallery))}

    def draw(texts):
        drawn = []
        for text in texts:
            caption, _, ground = text.removesuffix(" background").rpartition(", on a ")
            drawn.append(emoji.on(ground, [known[caption]])[0])
        return torch.stack(drawn)

    true = recombined(draw, emoji, PIXELS, lambda x: x, count=20).figures
    assert all(f.value == 1 for key, f in true.items() if "shuffled" not in key)
    assert true["top-5 shuffled, pixels:8"].value < 0.5
    assert true["both (top-1), pixels:8"].n == 20
    after = {a: b for a, b in zip(known, [*list(known)[1:], next(iter(known))], strict=True)}

    def another(texts):  # on the right background
        asked = [text.rpartition(", on a ") for text in texts]
        return draw([f"{after[caption]}, on a {ground}" for caption, _, ground in asked])

    other = recombined(another, emoji, PIXELS, lambda x: x, count=20).figures
    assert other["background"].value == 1
    assert (other["top-1, pixels:8"].value, other["both (top-1), pixels:8"].value) == (0, 0)
    assert other["top-1 ceiling, pixels:8"].value == 1
    with pytest.raises(ValueError, match="9 captions are too few: 10 at least"):
        recombined(draw, emoji, PIXELS, lambda x: x, count=9)

    def on_white(texts):
        return emoji.gallery[[known[text.rpartition(", on a ")[0]] for text in texts]]

    white = recombined(on_white, emoji, PIXELS, lambda x: x, count=20).figures
    assert (white["background"].value, white["both (top-5), pixels:8"].value) == (0, 0)


def test_style_and_concept_are_told_apart(emoji) -> None:
    pytest.importorskip("sklearn")
    found = transfer(artist(emoji), emoji, PIXELS, lambda x: x).figures
    assert found["picture top-1, pixels:8"].value == found["concept top-1, pixels:8"].value == 1
    assert found["style"].n == len(emoji.held_out)
    assert found["style"].value == found["style ceiling"].value > 0.9
    assert found["both (top-1), pixels:8"].value == found["style"].value
    by_style = [found[f"style, {style}"] for style in ("twemoji", "openmoji")]
    hits = sum(figure.value * figure.n for figure in by_style)
    assert hits == pytest.approx(found["style"].value * found["style"].n)
    assert 0.2 < found["style shuffled"].value < 0.8
    for count in (8, 12, 20, 25):  # nobody is asked for their own caption
        few = transfer(artist(emoji), emoji, PIXELS, lambda x: x, count=count).figures
        assert few["concept top-1 shuffled, pixels:8"][::3] == (0, count)
    other = {emoji.caption(n): n for n in range(len(emoji.gallery))}
    names = [text.rpartition(", ") for text in other]

    def in_the_other_style(texts):
        swapped = []
        for text in texts:
            name, _, style = text.rpartition(", ")
            mine = "openmoji style" if style == "twemoji style" else "twemoji style"
            swapped.append(other[f"{name}, {mine}"])
        return emoji.gallery[swapped]

    assert {style for _, _, style in names} == {"twemoji style", "openmoji style"}
    swapped = transfer(in_the_other_style, emoji, PIXELS, lambda x: x).figures
    # Who copies what was seen draws the concept, but not in the style.
    assert swapped["concept top-1, pixels:8"].value == 1
    assert swapped["style"].value < 0.1 and swapped["both (top-5), pixels:8"].value < 0.1
    # That is what stands beside whatever it is that draws.
    assert found["style other style"].value == pytest.approx(swapped["style"].value)
    assert found["distance, pixels:8"][::3] == (0, len(emoji.held_out))
    assert found["distance ceiling, pixels:8"].value == 0
    apart = [found[f"distance {name}, pixels:8"] for name in ("other style", "shuffled")]
    assert apart[0] == pytest.approx(swapped["distance, pixels:8"])
    assert 0 < apart[0].value < apart[1].value
    for key in ("picture top-1", "picture top-5"):
        copied = swapped[f"{key}, pixels:8"].value
        assert found[f"{key} other style, pixels:8"].value == pytest.approx(copied)
        assert copied < 0.4
    one_of = {emoji.style[n]: n for n in emoji.trained}

    def something_else(texts):  # in the asked style
        return emoji.gallery[[one_of[text.split()[-2]] for text in texts]]

    wrong = transfer(something_else, emoji, PIXELS, lambda x: x).figures
    assert wrong["style"].value > 0.9
    assert wrong["concept top-1, pixels:8"].value == wrong["both (top-1), pixels:8"].value == 0


def test_style_is_read_wherever_a_picture_lies_and_however_softly_it_is_drawn() -> None:
    pytest.importorskip("resvg_py")
    pytest.importorskip("sklearn")
    emoji = Emoji(WHOLE, groups=("animals", "food", "objects"))
    unseen = emoji.gallery[emoji.held_out]
    small = torch.ones_like(unseen)
    small[..., 7:52, 3:48] = interpolate(unseen, (45, 45), mode="area")
    for pictures, bound in (
        (unseen, 0.98),
        (unseen.roll((5, -9), (2, 3)), 0.98),
        (softened(unseen), 0.94),
        (softened(softened(unseen)), 0.94),
        (unseen + 0.1 * torch.randn(unseen.shape, generator=torch.manual_seed(0)), 0.94),
        (small, 0.85),
    ):
        right = emoji.read_style(pictures) == emoji.styles[emoji.held_out]
        assert right.double().mean() > bound


def test_quality_of_the_truth_and_of_noise(emoji) -> None:
    texts = [emoji.caption(n) for n in emoji.trained]

    def truth(space):
        return emoji.features(space)[emoji.trained]

    same = suites.quality(artist(emoji), texts, truth, PIXELS, lambda t, x: torch.full([len(t)], 7))
    assert same.figures["clip score"].value == 7
    assert same.figures["frechet, pixels:8"].value == pytest.approx(0, abs=1e-4)
    assert (same.figures["precision, pixels:8"].value, same.figures["recall, pixels:8"].value) == (
        1,
        1,
    )

    def draw_noise(asked):
        coarse = torch.rand(len(asked), 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return (coarse.round() * 2 - 1).repeat_interleave(4, 2).repeat_interleave(4, 3)

    noise = suites.quality(draw_noise, texts, truth, PIXELS)
    assert noise.figures["kid, pixels:8"].low > same.figures["kid, pixels:8"].high
    assert noise.figures["precision, pixels:8"].value < 0.1
