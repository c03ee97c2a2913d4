"""The grammar of captions: what is drawn is fair, what is kept stays, nothing raises."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from ldm.data.captions import Grammar
from ldm.diffusion import stream

DRAWS = 6000
FEW = 2000  # where what is wrong would be wrong by 0.04: of 1/8, 0.033 are 4.5 deviations


def drawn(grammar: Grammar, text: str, count: int = DRAWS) -> Counter[str]:
    return Counter(grammar.draw(text, stream(0, "test", index)) for index in range(count))


def fair(count: int, probability: float, draws: int = DRAWS) -> bool:
    """Within 4.5 standard deviations of a binomial: 7e-6 of fair ones are not."""
    return abs(count - draws * probability) <= 4.5 * math.sqrt(
        draws * probability * (1 - probability)
    )


def one_of_each(found: Counter[str], wanted: dict[str, float]) -> None:
    assert found.keys() <= wanted.keys()
    draws = found.total()
    for text, probability in wanted.items():
        assert fair(found[text], probability, draws), (text, found[text], probability)


def equally(*texts: str) -> dict[str, float]:
    return {text: texts.count(text) / len(texts) for text in texts}


WILD = Grammar(wildcards=True)
CHOICES: dict[str, dict[str, float]] = {
    "a {red|green|blue} ball": equally("a red ball", "a green ball", "a blue ball"),
    "{a|b} {c|d}": equally("a c", "a d", "b c", "b d"),
    "{a|a|b}": equally("a", "a", "b"),
    "{a|}": equally("a", ""),
    "{a|{b|c}}": {"a": 1 / 2, "b": 1 / 4, "c": 1 / 4},
    "{{a|b}|c}": {"a": 1 / 4, "b": 1 / 4, "c": 1 / 2},
    "{a|x {b|{c|d}} y}": {"a": 1 / 2, "x b y": 1 / 4, "x c y": 1 / 8, "x d y": 1 / 8},
    "{2$$a|b|c}": equally(*map(", ".join, permutations("abc", 2))),
    "{2$$ and $$a|b|c}": equally(*map(" and ".join, permutations("abc", 2))),
    "{1-2$$a|b}": {"a": 1 / 4, "b": 1 / 4, "a, b": 1 / 4, "b, a": 1 / 4},
    "{0-1$$a|b}": {"": 1 / 2, "a": 1 / 4, "b": 1 / 4},
    "{7$$a|b}": equally("a, b", "b, a"),
    "{2$${a|b}|c}": equally("a, c", "c, a", "b, c", "c, b"),
    "{1$$a|b}": equally("a", "b"),
    "{a|{{b|c}}}": equally("a", "{b|c}"),
    "{{{a|b}}}": equally("{a}", "{b}"),
    "{a, b|c}, d": equally("a, b, d", "c, d"),
}


@pytest.mark.parametrize("text", CHOICES)
def test_every_choice_is_fair(text: str) -> None:
    one_of_each(drawn(WILD, text, FEW), CHOICES[text])


SAME = {
    "text": "text",
    "a {{retro style}}": "a {retro style}",
    "{{a|b}}": "{a|b}",
    "{{{{a}}}}": "{{a}}",
    "only {{ here": "only { here",
    "only }} here": "only } here",
    "{x}": "x",
    "{}": "{}",
    "{{}}": "{}",
    "{a|b": "{a|b",
    "a|b}": "a|b}",
    "} {": "} {",
    ":{": ":{",
    "a | b": "a | b",
    "{x|{x|x": "{x|{x|x",
    "{3-1$$a|b}": "{3-1$$a|b}",
    "$$": "$$",
    "{99999999$$a}": "99999999$$a",
}


@pytest.mark.parametrize("text", SAME)
def test_malformed_braces_and_escapes_are_text(text: str) -> None:
    assert WILD.plain(text) == SAME[text]
    assert drawn(WILD, text, 20) == {SAME[text]: 20}


def test_any_text_can_be_drawn() -> None:
    grammar = Grammar(
        wildcards=True, shuffle=True, tag_dropout=0.3, keep_tokens_separator="|||",
        secondary_separator=";;;",
    )  # fmt: skip
    letters = np.array(list("{{{}}}|||$$12-,; a\u2028é"))
    for index in range(3000):
        draw = stream(1, "texts", index)
        text = "".join(draw.choice(letters, int(draw.integers(0, 30))))
        assert isinstance(grammar.draw(text, draw), str)
        assert isinstance(grammar.plain(text), str)
    deep = "{a|" * 50_000 + "b" + "}" * 50_000
    assert WILD.plain(deep) == "a"
    assert WILD.draw(deep, stream(0, "deep")) in ("a", "b")


def test_plain_takes_the_first() -> None:
    grammar = Grammar(wildcards=True, shuffle=True, tag_dropout=0.9, prefix="P,", suffix=", S")
    assert grammar.plain("{a|b}, c,d, {2-3$$x|y|z}") == "P, a, c, d, x, y, S"
    assert Grammar(wildcards=True).plain("{{a|b}|c} {0-2$$d|e}") == "a"


def test_without_settings_a_caption_is_left_alone() -> None:
    text = "a cat,sitting {here|there} ||| ,, 1girl"
    assert Grammar().plain(text) == text
    assert drawn(Grammar(), text, 3) == {text: 3}
    assert not Grammar(prefix="x", keep_tokens=3, keep_tokens_separator="|||").varies


@pytest.mark.parametrize("options", [{"shuffle": True}, {"tag_dropout": 0.1}, {"wildcards": True}])
def test_varies(options: dict[str, object]) -> None:
    assert Grammar(**options).varies


def test_every_order_is_as_likely() -> None:
    orders = map(", ".join, permutations(("a", "b", "c")))
    one_of_each(drawn(Grammar(shuffle=True), "a,b , c,"), equally(*orders))


def test_every_tag_is_at_every_place() -> None:
    found = np.zeros((8, 8), int)
    grammar = Grammar(shuffle=True)
    for index in range(DRAWS):
        tags = grammar.draw("0,1,2,3,4,5,6,7", stream(2, "test", index)).split(", ")
        for place, tag in enumerate(tags):
            found[int(tag), place] += 1
    assert all(fair(count, 1 / 8) for count in found.flat)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shuffle", [False, True])
def test_tag_dropout(rate: float, shuffle: bool) -> None:
    grammar = Grammar(tag_dropout=rate, shuffle=shuffle, keep_tokens=1)
    left, pairs = Counter[str](), 0
    for index in range(FEW):
        first, *others = grammar.draw("k, a, b, c, d", stream(3, "test", index)).split(", ")
        assert first == "k"
        assert shuffle or others == sorted(others)
        left.update(others)
        pairs += {"a", "b"} <= set(others)
    assert all(fair(left[tag], 1 - rate, FEW) for tag in "abcd")
    assert fair(pairs, (1 - rate) ** 2, FEW)  # independently of each other


def test_dropout_of_everything() -> None:
    assert drawn(Grammar(tag_dropout=1), "a, b", 5) == {"": 5}
    assert drawn(Grammar(tag_dropout=1, keep_tokens=1), "a, b", 5) == {"a": 5}


def test_kept_tags_come_first() -> None:
    grammar = Grammar(shuffle=True, keep_tokens=2, tag_dropout=0.5)
    for text in drawn(grammar, "a, b, c, d, e", 500):
        assert text.split(", ")[:2] == ["a", "b"]
    assert drawn(grammar, "a", 5) == {"a": 5}  # fewer tags than are kept


def test_keep_tokens_separator() -> None:
    grammar = Grammar(shuffle=True, keep_tokens=4, keep_tokens_separator="|||")
    text = "1girl, hat ||| x, y ||| best, late ||| more"
    one_of_each(
        drawn(grammar, text),
        equally("1girl, hat, x, y, best, late, more", "1girl, hat, y, x, best, late, more"),
    )
    dropping = Grammar(tag_dropout=1, keep_tokens_separator="|||")
    assert drawn(dropping, text, 3) == {"1girl, hat, best, late, more": 3}
    assert drawn(dropping, "||| a, b", 3) == {"": 3}
    assert Grammar(keep_tokens_separator="|||").plain("a ||| b,c") == "a, b, c"
    one_of_each(drawn(grammar, "a, b, c, d, e, f"), equally("a, b, c, d, e, f", "a, b, c, d, f, e"))


def test_prefix_and_suffix_are_part_of_the_caption() -> None:
    grammar = Grammar(
        shuffle=True,
        tag_dropout=0.5,
        keep_tokens_separator="|||",
        prefix="1girl |||",
        suffix=", anime ||| good",
    )
    found = drawn(grammar, "hat")
    free = ["", "hat, ", "anime, ", "hat, anime, ", "anime, hat, "]
    chances = [1 / 4, 1 / 4, 1 / 4, 1 / 8, 1 / 8]
    one_of_each(found, {f"1girl, {f}good": p for f, p in zip(free, chances, strict=True)})
    assert Grammar(prefix="a photo,", suffix=", at night").plain("a cat") == (
        "a photo, a cat, at night"
    )


def test_secondary_separator_binds() -> None:
    grammar = Grammar(shuffle=True, tag_dropout=0.5, secondary_separator=";;;")
    found = drawn(grammar, "a, b;;;c;;;d", 2000)
    assert found.keys() == {"", "a", "b,c,d", "a, b,c,d", "b,c,d, a"}
    assert Grammar(secondary_separator=";;;").plain("b;;;c, d") == "b,c, d"


def test_other_separators() -> None:
    assert set(drawn(Grammar(shuffle=True, separator="."), "a, b. c", 50)) == {"a, b. c", "c. a, b"}
    assert set(drawn(Grammar(shuffle=True, separator=" "), "a b", 50)) == {"a b", "b a"}


def test_wildcards_come_before_tags() -> None:
    grammar = Grammar(wildcards=True, tag_dropout=1, keep_tokens=2)
    one_of_each(drawn(grammar, "{a, b|c}, d, e"), equally("a, b", "c, d"))


def test_a_draw_is_a_function_of_text_and_generator() -> None:
    grammar = Grammar(wildcards=True, shuffle=True, tag_dropout=0.3)
    text = "a, {b|c|{d|e}}, f, g, {2$$h|i|j}"
    again = [grammar.draw(text, stream(5, "x", index)) for index in range(50)]
    assert again == [grammar.draw(text, stream(5, "x", index)) for index in range(50)]
    assert len(set(again)) > 40


BAD = {
    "separator": ({"separator": ""}, "separator='': tags cannot be told apart"),
    "dropout": ({"tag_dropout": 1.5}, r"tag_dropout=1.5 is not in \[0, 1\]"),
    "no number": ({"tag_dropout": math.nan}, "tag_dropout=nan is not in"),
    "keep": ({"keep_tokens": -1}, "keep_tokens=-1: it cannot be less than 0"),
    "variants": ({"variants": -2}, "variants=-2: it cannot be less than 0"),
    "same": ({"keep_tokens_separator": ","}, "separator=',' is in keep_tokens_separator=','"),
    "inside": ({"separator": "|", "keep_tokens_separator": "|||"}, "choose another"),
    "two": ({"keep_tokens_separator": ";", "secondary_separator": ";;"}, "choose another"),
    "brace": ({"wildcards": True, "separator": "}"}, "has a brace, which wildcards are made of"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_be(name: str) -> None:
    options, words = BAD[name]
    with pytest.raises(ValueError, match=words) as error:
        Grammar(**options)
    assert "\n" not in str(error.value)
