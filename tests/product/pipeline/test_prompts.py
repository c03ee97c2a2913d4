"""Weights in brackets, breaks, and prompts longer than a text tower (``ldm.prompts``)."""

import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import tiny
import tiny_flux
import tiny_sd3
import tiny_sdxl
from ldm.calls.texts import Side, Texts, Wording
from ldm.cli import app
from ldm.families import family_of
from ldm.formats.png import read_parameters
from ldm.pipeline import LatentDiffusionPipeline
from ldm.prompts.files import drawn, lines
from ldm.prompts.grammar import DOWN, UP, Break, Weighted, Words, parse, printed, runs, weighs
from ldm.prompts.windows import MOST, PromptTower, count, written

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
ROOM = tiny.LENGTH - 2

# What AUTOMATIC1111's documentation and its own tests say of these.
EXAMPLES: dict[str, list[list[tuple[str, float]]]] = {
    "normal text": [[("normal text", 1)]],
    "an (important) word": [[("an ", 1), ("important", 1.1), (" word", 1)]],
    "(unbalanced": [[("unbalanced", 1.1)]],
    r"\(literal\]": [[("(literal]", 1)]],
    "(unnecessary)(parens)": [[("unnecessaryparens", 1.1)]],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55)]
        + [(", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)]
    ],
    "((x))": [[("x", 1.21)]],
    "[x]": [[("x", 1 / 1.1)]],
    "[[x]]": [[("x", 1 / 1.21)]],
    "(x:1.0) y": [[("x y", 1)]],
    "(x:-.5)": [[("x", -0.5)]],
    "(x: 2 )": [[("x", 2)]],
    "x:2) [y:2]": [[("x:2) ", 1), ("y:2", 1 / 1.1)]],
    "(x:1,3)": [[("x:1,3", 1.1)]],
    "a ) b ] c": [[("a ) b ] c", 1)]],
    "(a [b) c]": [[("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]],
    "a\\b \\\\ c": [[("ab \\ c", 1)]],
    "a BREAK b, BREAKS": [[("a", 1)], [("b, BREAKS", 1)]],
    "(a BREAK b:2)": [[("a", 2)], [("b", 2)]],
    "": [[]],
    "()": [[]],
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_weights_are_those_of_the_documentation(text):
    found = runs(parse(text))
    assert [[word for word, _ in part] for part in found] == [
        [word for word, _ in part] for part in EXAMPLES[text]
    ]
    for part, told in zip(found, EXAMPLES[text], strict=True):
        assert [weight for _, weight in part] == pytest.approx([w for _, w in told], abs=1e-12)


PIECES = ["(", ")", "[", "]", "\\", ":", "1.3", "BREAK", " ", "a", "red", "\n", ",", ":1.5)", "BRE",
          "AK", "-", ".", "\\(", "x:2", "é", ":0.9090909090909091)"]  # fmt: skip


def test_a_tree_printed_is_that_tree():
    draw = random.Random(0)
    for _ in range(4000):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randint(0, 14)))
        tree = parse(text)
        again = printed(tree)
        assert parse(again) == tree and printed(parse(again)) == again, (text, again)
        # No bracket, no backslash and no break: it is its characters.
        if not set(text) & set("()[]\\") and "BREAK" not in text:
            assert not weighs(text)
    assert parse("[a] (b:1.5)") == (
        Weighted((Words("a"),), DOWN), Words(" "), Weighted((Words("b"),), 1.5),
    )  # fmt: skip
    assert printed((Weighted((Words("a"),), UP), Break(), Words(" BREAK"))) == (
        "(a:1.1) BREAK\\ BRE\\AK"
    )
    with pytest.raises(ValueError, match="opens 100 brackets and closes none"):
        parse("(" * 101)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


def draw(pipe: Any, prompt: Any = "a", **asked: Any) -> Tensor:
    call = {"num_inference_steps": 2, "output_type": "latent", "seed": 0, **asked}
    return pipe(prompt, **call).images


def a1111(pipe: Any, prompt: Any, **asked: Any) -> Tensor:
    return draw(pipe, prompt, prompt_syntax="a1111", **asked)


@torch.no_grad()
def test_weights_of_one_change_no_bit_in_any_family():
    texts = ["a red, apple", "", "two dogs: 3"]
    for parts in (
        tiny.components(),
        tiny_sdxl.components(published=False),
        tiny_sd3.components(),
        tiny_flux.components(),
    ):
        plain = family_of(parts).conditioner(parts, parts)
        said = plain.encode(texts)
        ones = ["a (red:1.0), apple", "(:3)", "two ([dogs]): 3"]
        again = written(plain, 1).encode([ones[0], ones[1], "two (dogs:1): 3"])
        for name, x in said.tensors().items():
            assert torch.equal(again.tensors()[name], x), name
        heavy = written(plain, 1).encode([texts[0], texts[1], ones[2]])
        assert torch.equal(heavy.tokens[:2], said.tokens[:2])
        other = written(plain, 1).encode(["a (red:1.5), apple", "", ""]).tokens[0]
        assert float((other - said.tokens[0]).abs().max()) > 1e-3
        escaped = written(plain, 1).encode([r"a \(red\) apple"])
        assert torch.equal(escaped.tokens, plain.encode(["a (red) apple"]).tokens)


@torch.no_grad()
def test_tokens_are_multiplied_and_the_mean_restored(pipe: Any) -> None:
    tower, norm = pipe.conditioner, pipe.text_encoder.final_layer_norm
    fresh = PromptTower(tower, 1).encode(["ab (cd:1.5)"]).tokens[0]
    assert float((fresh[3:5] - 1.5 * tower.encode(["ab cd"]).tokens[0, 3:5]).abs().max()) < 1e-6
    norm.bias.copy_(torch.linspace(-0.5, 1, tiny.WIDTH))  # as of a tower that has learnt
    z = tower.encode(["ab cd"]).tokens[0]
    assert abs(float(z.mean())) > 0.1
    w = torch.ones(tiny.LENGTH)
    w[3:5] = 1.5  # a byte a token, behind the one that begins
    assert tower.read(["cd"]) == [tower.tokenize(["ab cd"])[0, 3:5].tolist()]
    want = z * w[:, None] * z.mean() / (z * w[:, None]).mean()
    found = PromptTower(tower, 1).encode(["ab (cd:1.5)", "ab cd"])
    assert float((found.tokens[0] - want).abs().max()) < 1e-6
    assert torch.equal(found.tokens[1], z)
    # A mean of 0.3 % of the numbers is none: what a weight changes is more than all of it.
    norm.bias.fill_(0.003)
    z = tower.encode(["ab cd"]).tokens[0]
    found = PromptTower(tower, 1).encode(["ab (cd:1.5)"]).tokens[0]
    assert 0.002 < float(z.mean()) and float((found - z * w[:, None]).abs().max()) < 1e-6
    norm.bias.zero_()


def windows(tower: Any, text: str) -> list[str]:
    """What each window says."""
    number = count(tower, [text])
    ids = PromptTower(tower, number).tokenize([text])[0].unflatten(0, (2, number, -1))[0]
    said = [tower.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    return [text.replace(" ", "") for text in said]


def test_windows_are_cut_as_the_web_ui_does(pipe: Any, caplog: Any) -> None:
    tower = pipe.conditioner
    full = "x" * ROOM
    assert windows(tower, full) == [full]
    assert windows(tower, full + "y") == [full, "y"]
    # A comma among the last 20 tokens counts, and one before does not.
    assert windows(tower, "xxx," + "y" * 19) == ["xxx,", "y" * 19]
    assert windows(tower, "xx," + "y" * 19) == ["xx," + "y" * 19]
    assert windows(tower, "x," + "y" * 21) == ["x," + "y" * 20, "y"]
    assert windows(tower, "xx," + "y" * 20) == ["xx,", "y" * 20]
    assert windows(tower, "a BREAK b") == ["a", "b"] and windows(tower, "a BREAK") == ["a"]
    assert windows(tower, "BREAK a BREAK BREAK b") == ["", "a", "", "b"]
    assert count(tower, [""]) == 1 and count(tower, ["a", full * 3]) == 3
    with pytest.raises(ValueError, match=f"longer than {MOST} windows of 24 tokens"):
        count(tower, ["x" * ROOM * (MOST + 1)])
    with caplog.at_level(logging.WARNING):
        PromptTower(tower, 2).tokenize([full + full + "zzz"])
    assert "longer than 2 windows of 24 tokens, its end is not seen" in caplog.text


@torch.no_grad()
def test_each_window_is_read_alone_and_both_sides_have_as_many(pipe: Any) -> None:
    tower = pipe.conditioner
    long = "a red heart, BREAK on (paper:1.2)"
    texts = Texts(tower, Wording((Side("prompt"), Side("n")), None, "a1111"), [long], ["blue"])
    said, null = texts.prompts(slice(0, 1)), texts.negatives(slice(0, 1))
    one = written(tower, 1)
    first, second = one.encode(["a red heart,"]), one.encode(["on (paper:1.2)"])
    assert torch.equal(said.tokens, torch.cat([first.tokens, second.tokens], 1))
    assert torch.equal(said.pooled, first.pooled)
    assert torch.equal(null.tokens, tower.encode(["blue", ""]).tokens.flatten(0, 1)[None])
    both = a1111(pipe, [long, "a"], negative_prompt="blue")
    split = a1111(pipe, [long, "a"], negative_prompt="blue", batch_size=1)
    assert float((both - split).abs().max()) < 1e-4
    long_negative = a1111(pipe, "a", negative_prompt=long)
    assert float((long_negative - a1111(pipe, "a", negative_prompt="a red")).abs().max()) > 1e-3
    # What others have encoded may be of several windows too.
    embeds = written(tower, 2).encode([long]).tokens
    nothing = tower.encode(["", ""]).tokens.flatten(0, 1)[None]
    with_text = draw(pipe, "", prompt_embeds=embeds)
    assert torch.equal(
        with_text, draw(pipe, "", prompt_embeds=embeds, negative_prompt_embeds=nothing)
    )
    assert torch.equal(with_text, a1111(pipe, long))


def test_the_grammar_is_off_unless_asked_for(pipe: Any) -> None:
    text = "a (red:1.5) heart"
    plain = draw(pipe, text)
    assert torch.equal(plain, a1111(pipe, r"a \(red:1.5\) heart"))
    assert float((plain - a1111(pipe, text)).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="prompt_syntax must be None or 'a1111', not 'compel'"):
        draw(pipe, text, prompt_syntax="compel")


def test_prompts_of_several_towers_have_as_many_windows():
    parts = tiny_sd3.components()
    conditioner = family_of(parts).conditioner(parts, parts)
    wording = Wording((Side("prompt", {"text_encoder_2": ["a BREAK b"]}), Side("n")), None, "a1111")
    texts = Texts(conditioner, wording, ["a"], ["b"])
    with torch.no_grad():
        said, null = texts.prompts(slice(0, 1)), texts.negatives(slice(0, 1))
    assert said.tokens.shape == null.tokens.shape == (1, 2 * tiny.LENGTH + 20, tiny_sd3.JOINT)


def test_words_of_several_vectors_stay_together(tmp_path: Any) -> None:
    from ldm.formats import textual_inversion

    pipe = tiny.pipeline()
    textual_inversion.write("<cat>", torch.randn(3, tiny.WIDTH), tmp_path / "cat")
    pipe.load_textual_inversion(tmp_path / "cat")
    tower = pipe.conditioner
    (first,) = tower.read(["<cat>"])
    assert len(first) == 3 and tower.further(first[0]) == 2
    rows = PromptTower(tower, 2).tokenize(["x" * (ROOM - 2) + " (<cat>:1.5)"])[0]
    ids, weights = rows.unflatten(0, (2, 2, -1))
    assert ids[1, 1:4].tolist() == first and first[0] not in ids[0].tolist()
    assert weights.contiguous().view(torch.float64)[1].tolist()[:5] == [1, 1.5, 1.5, 1.5, 1]


def test_prompts_in_files_and_words_drawn_from_them(tmp_path: Any) -> None:
    (tmp_path / "colour.txt").write_text("red\n\n blue \n__deep__ green\n")
    (tmp_path / "deep.txt").write_text("dark\nvery dark\n")
    (tmp_path / "loop.txt").write_text("a __loop__\n")
    assert lines(tmp_path / "colour.txt") == ["red", "blue", "__deep__ green"]
    texts = [drawn("a __colour__ __colour__ cat", tmp_path, seed) for seed in range(200)]
    assert texts == [drawn("a __colour__ __colour__ cat", tmp_path, seed) for seed in range(200)]
    words = ["red", "blue", "dark green", "very dark green"]
    assert {*texts} == {f"a {one} {two} cat" for one in words for two in words}
    assert drawn("a ___ b __", tmp_path, 0) == "a ___ b __"
    with pytest.raises(ValueError, match="__loop__ stands for itself"):
        drawn("__loop__", tmp_path, 0)
    with pytest.raises(ValueError, match=r"nothing\.txt: No such file"):
        drawn("__nothing__", tmp_path, 0)
    (tmp_path / "bad.txt").write_bytes(b"red\n\xff\n")
    with pytest.raises(ValueError, match=r"bad\.txt, line 2: it is no text in UTF-8"):
        lines(tmp_path / "bad.txt")
    (tmp_path / "none.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"none\.txt: it is empty"):
        lines(tmp_path / "none.txt")


def test_the_command_line(tmp_path: Any) -> None:
    model = tiny.folder(tmp_path / "model")
    (tmp_path / "colour.txt").write_text("red\nblue\n")
    (tmp_path / "prompts.txt").write_text("a (__colour__:1.5) heart\nb\n")
    common = ["sample", "--model", str(model), "--steps", "1", "--sampler", "model"]

    def run(*more: Any) -> Any:
        return CliRunner().invoke(app, [*common, *map(str, more)])

    out, file = tmp_path / "out", tmp_path / "prompts.txt"
    drawn_by = ("--syntax", "a1111", "--wildcards", tmp_path, "--count", 4, "--seed", 3)
    result = run("--prompts", file, *drawn_by, "--out", out)
    assert result.exit_code == 0, result.output
    found = [read_parameters(picture) for picture in sorted(out.iterdir())]
    asked = [*["a (__colour__:1.5) heart"] * 4, *["b"] * 4]
    assert [(p.prompt, p.seed) for p in found if p] == [
        (drawn(text, tmp_path, 3 + i), 3 + i) for i, text in enumerate(asked)
    ]
    assert {p.prompt for p in found if p} == {"a (red:1.5) heart", "a (blue:1.5) heart", "b"}
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 1, "output_type": "pil", "guidance_scale": 7.5}
    with_weights = a1111(pipe, found[0].prompt, **{**call, "seed": 3})[0]
    assert np.array_equal(np.asarray(with_weights), np.asarray(Image.open(out / "0000.png")))
    plain = run(found[0].prompt, "--seed", 3, "--out", tmp_path / "plain.png")
    assert plain.stderr.startswith("note: brackets are text in") and plain.exit_code == 0
    for wrong, told in (
        (("a", "--syntax", "compel"), "--syntax is a1111, or left out, not 'compel'"),
        (("<lora:x:0.8> a", "--syntax", "a1111"), "<lora:x:0.8> in a prompt: pass the file"),
        (("--prompts", tmp_path / "no.txt"), "no.txt: No such file"),
    ):
        result = run(*wrong, "--out", tmp_path / "x.png")
        assert result.exit_code == 2 and told in " ".join(result.stderr.split())
