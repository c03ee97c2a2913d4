"""Pictures that ``ldm sample`` draws again from what they carry, and prompts with settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

import tiny
from ldm.cli import app
from ldm.formats import lora
from ldm.formats.png import Parameters, read_beside, read_parameters, write_picture
from ldm.models.lora import attach, collect, weights

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("story") / "tiny-model")


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["sample", *map(str, arguments)])


def drawn(*arguments: Any) -> Any:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: Any) -> str:
    result = run(*arguments)
    (line,) = (each for each in result.stderr.splitlines() if not each.startswith("note: "))
    assert result.exit_code == 2 and line.startswith("error: "), result.output
    return line


def pixels(file: Path) -> Any:
    return np.asarray(Image.open(file))


def adapter(file: Path) -> Path:
    unet = tiny.unet()
    attach(unet, ["to_q", "to_v"], rank=2, alpha=2.0, dora=False)
    for number, weight in enumerate(weights(unet).values()):
        weight.data.normal_(generator=torch.Generator().manual_seed(number))
    lora.write({"unet": collect(unet)}, file)
    return file


def test_a_picture_is_drawn_again_to_the_bit(model: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "loras"
    shelf.mkdir()
    one, again = adapter(shelf / "one.safetensors"), tmp_path / "again.png"
    plain = ("--model", model, "--steps", 1)
    drawn("a, \nb: 'x'", *plain, "--negative", "c", "--guidance", 3.1234567, "--sampler", "euler-a",
          "--guidance-rescale", 0.123456789, "--guidance-interval", "-3,3", "--size", "32x24",
          "--variation-seed", 9, "--variation-strength", 0.25, "--lora", f"{one}:0.3333333",
          "--seed", 5, "--out", tmp_path / "all.png")  # fmt: skip
    # A batch of another shape rounds otherwise, and the longest text makes the others longer.
    drawn("a (red:1.5) hat", "b BREAK c", "--count", 2, "--batch", 3, *plain, "--syntax", "a1111",
          "--seed", 3, "--out", tmp_path / "many.webp")  # fmt: skip
    drawn("a", *plain, "--sampler", "model", "--out", tmp_path / "own.jpg")
    found = read_parameters(tmp_path / "all.png")
    assert found == Parameters(
        "a, \nb: 'x'", "c", 1, "euler-a", 3.12346, 5, 32, 24, "tiny-model", None, "one 0.333333",
        0.123457, "-3,3", None, 9, 0.25,
    )  # fmt: skip
    assert read_beside(tmp_path / "all.png") == {
        "guidance": 3.1234567, "guidance_rescale": 0.123456789, "loras": [["one", 0.3333333]]
    }  # fmt: skip
    assert read_beside(tmp_path / "many-0001.webp") == {"syntax": "a1111", "batch": [1, 3, 2, 2]}
    assert read_beside(tmp_path / "many-0003.webp") == {"syntax": "a1111"}
    assert read_beside(tmp_path / "own.jpg") == {"sampler": "model"}

    for name, more in (
        ("all.png", ("--lora", shelf)),
        ("many-0001.webp", ()),
        ("many-0003.webp", ()),
        ("own.jpg", ()),
    ):
        suffix = Path(name).suffix
        copy = tmp_path / f"again{suffix}"
        drawn("--from", tmp_path / name, "--model", model, *more, "--out", copy)
        assert np.array_equal(pixels(tmp_path / name), pixels(copy)), name
        assert read_parameters(copy) == read_parameters(tmp_path / name)
        assert read_beside(copy) == read_beside(tmp_path / name)
        if suffix == ".png":
            assert copy.read_bytes() == (tmp_path / name).read_bytes()

    # What is passed beside changes that alone.
    drawn("--from", tmp_path / "own.jpg", "--model", model, "--seed", 8, "--out", again)
    drawn("a", *plain, "--sampler", "model", "--seed", 8, "--out", tmp_path / "other.png")
    assert again.read_bytes() == (tmp_path / "other.png").read_bytes()
    shown = drawn("b", "--from", tmp_path / "all.png", "--model", model, "--lora", one, "--json",
                  "--steps", 2, "--out", again)  # fmt: skip
    told = json.loads(shown.stdout)
    assert (told["file"], told["seed"], told["prompt"]) == (str(again), 5, "b")
    assert told["settings"]["steps"] == 2 and told["settings"]["guidance"] == 3.1234567
    assert read_parameters(again).prompt == "b" and "batch" not in read_beside(again)

    common = ("--from", tmp_path / "all.png", "--out", again)
    assert "by the model 'tiny-model': pass its folder as --model" in refused(*common)
    assert "with the LoRA 'one': pass its file" in refused(*common, "--model", model)
    at = ("--from", tmp_path / "own.jpg", "--model", model, "--out", tmp_path / "own.jpg")
    assert "is the picture itself: name another file" in refused(*at)
    assert "--model is missing" in refused("a", "--out", again)


def test_an_edited_picture_names_what_it_lacks(model: Path, tmp_path: Path) -> None:
    one, two, out = tmp_path / "one.png", tmp_path / "two.png", tmp_path / "again.png"
    Image.effect_noise((20, 16), 90).convert("RGB").save(one)
    drawn("a", "--model", model, "--steps", 1, "--image", one, "--outpaint", "0,0,4,0",
          "--feather", 1, "--out", two)  # fmt: skip
    common = ("--from", two, "--model", model, "--out", out)
    assert f"{two} is an edited picture and does not hold what it was made from" in refused(*common)
    drawn(*common, "--image", one)
    assert two.read_bytes() == out.read_bytes()


def test_pictures_of_others_and_damaged_ones(model: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "x.png", tmp_path / "out.png"

    def carrying(text: str | None, own: str | None = None) -> Path:
        info = PngInfo()
        for key, value in (("parameters", text), ("ldm", own)):
            if value is not None:
                info.add_text(key, value)
        Image.new("RGB", (4, 4)).save(file, pnginfo=info)
        return file

    web = (
        "a ((red)) hat <lora:one:0.8>\nNegative prompt: blur\nSteps: 1, Sampler: DPM++ 2M SDE,"
        " Schedule type: Karras, CFG scale: 3, Seed: 7, Size: 16x16, Model hash: 6ce0161689,"
        " Model: v1-5, Clip skip: 2, Version: v1.9"
    )
    one = adapter(tmp_path / "one.safetensors")
    common = ("--from", file, "--model", model, "--out", out)
    carrying(web)
    result = drawn(*common, "--lora", one)
    assert result.stderr.splitlines()[:2] == [
        f"note: {file}: not drawn as there: Schedule type Karras, Clip skip 2, the noise of another"
        " program, Sampler DPM++ 2M SDE",
        f"note: {file} was drawn by the model 'v1-5'",
    ]
    found = read_parameters(out)
    assert (found.prompt, found.negative, found.seed) == ("a ((red)) hat", "blur", 7)
    assert (found.lora, found.guidance, found.sampler) == ("one 0.8", 3.0, "dpm++")
    assert read_beside(out)["syntax"] == "a1111"

    text = "a\nSteps: 1, Seed: 3"
    for story, own, told in (
        (None, None, "carries no parameters: nothing says how it was drawn"),
        (web, None, "with the LoRA 'one': pass its file"),
        (f"{text}, Denoising strength: 0.5", None, "pass --image"),
        (text, "{", "what ldm wrote into it is damaged"),
        (text, "[" * 100_000, "what ldm wrote into it is damaged"),
        (text, '{"steps": "many"}', "--steps must be a whole number from 1, not 'many'"),
        (text, '{"model": 1}', "model is no setting"),
        (text, '{"batch": [0, 9999999, 1, 1]}', "batch must be [place, pictures, texts, windows]"),
        (text, '{"loras": [["../x", 1]]}', "with the LoRA '../x': pass its file"),
        (text, '{"loras": [7]}', "loras must be names and weights"),
        (text, '{"words": ["w"]}', "with the word of textual inversion 'w': pass its file"),
    ):
        carrying(story, own)
        line = refused(*common, "--lora", tmp_path) if own and "../" in own else refused(*common)
        assert str(file) in line and told in line
    file.write_bytes(b"no picture")
    assert "it is no picture" in refused(*common)
    assert "No such file" in refused("--from", tmp_path / "no.png", *common[2:])
    write_picture(Image.new("RGB", (4, 4)), file, Parameters("a", steps=1), {})
    assert read_beside(file) == {}


def test_lines_have_settings_of_their_own(model: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out"
    rows = [
        {"prompt": "a", "seed": 4, "steps": 2, "guidance": 3, "negative": "x"},
        {"prompt": "b", "size": "32x16", "sampler": "Euler a"},
        {"prompt": "c", "syntax": "a1111", "variation_seed": 2, "variation_strength": 0.5},
        {"prompt": "d"},
    ]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    common = ("--model", model, "--steps", 1, "--seed", 10, "--prompts", file)
    shown = drawn(*common, "--out", out, "--json").stdout.splitlines()
    found = [read_parameters(picture) for picture in sorted(out.iterdir())]
    assert [(p.prompt, p.seed, p.steps, p.guidance, p.width, p.sampler) for p in found] == [
        ("a", 4, 2, 3.0, 16, "dpm++"),
        ("b", 11, 1, 7.5, 32, "euler-a"),
        ("c", 10, 1, 7.5, 16, "dpm++"),
        ("d", 13, 1, 7.5, 16, "dpm++"),
    ]
    assert found[0].negative == "x" and found[2].variation_seed == 2
    assert [json.loads(line)["prompt"] for line in shown] == [*"abcd"]
    alone = ("--out", tmp_path / "d.png", "--model", model, "--steps", 1, "--seed", 13)
    drawn("d", *alone)
    assert np.array_equal(pixels(tmp_path / "d.png"), pixels(out / "0003.png"))

    wrong = [
        '{"prompt": "a"}', '{"prompt": 3}', '{"stepps": 4}', '{"steps": 0}', '{"size": "big"}',
        '{"sampler": "eular"}', '{"seed": -1}', '{"strength": 2}', '{"argument": {"x": "y"}}',
    ]  # fmt: skip
    file.write_text("\n".join(wrong))
    line = refused(*common, "--out", tmp_path / "none")
    for told in (
        f"{file}, line 2: prompt must be a text, not 3",
        "line 3: stepps is no setting, did you mean steps?",
        "line 4: steps must be a whole number from 1, not 0",
        "line 5: size must look like 512x512, not 'big'",
        "line 6: unknown sampler 'eular': did you mean 'euler'?",
        "line 7: seed must be a whole number from 0, not -1",
        "line 8: strength must lie in 0..1, not 2",
        "line 9: argument must look like NAME=4.5",
    ):
        assert told in line
    file.write_text('{"prompt": "a"}\nb\n[1]\n')
    assert f"{file}, line 2, line 3: it is no JSON object" in refused(*common)
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "size": "17x16"}\n')
    result = run(*common, "--out", tmp_path / "some")
    assert result.exit_code == 2 and f"error: {file}, line 2: " in result.stderr
    assert not (tmp_path / "none").exists()


def test_a_sweep_is_a_page_of_one_seed(model: Path, tmp_path: Path) -> None:
    out, common = tmp_path / "x.png", ("a", "--model", model, "--seed", 3)
    shown = drawn(*common, "--sweep", "steps=1,2", "--sweep", "guidance=1,3,5", "--out", out)
    assert shown.stdout.split()[-1] == str(tmp_path / "x-sweep.png")
    found = [read_parameters(tmp_path / f"x-000{n}.png") for n in range(6)]
    assert [(p.steps, p.guidance, p.seed) for p in found] == [
        (steps, guidance, 3) for guidance in (1.0, 3.0, 5.0) for steps in (1, 2)
    ]
    page = pixels(tmp_path / "x-sweep.png")
    assert page.shape == (3 * (2 * 16 + 30), 2 * (2 * 16 + 8), 3)
    last = pixels(tmp_path / "x-0005.png").repeat(2, 0).repeat(2, 1)
    assert np.array_equal(page[124 : 124 + 32, 40 : 40 + 32], last)
    for wrong, told in (
        ("size=1,2", "--sweep must look like NAME=4,8,16 of steps, guidance,"),
        ("steps=a", "--sweep steps=a: a value is no number"),
        ("steps=0", "--steps must be a whole number from 1, not 0"),
    ):
        assert told in refused(*common, "--sweep", wrong, "--out", out)
    assert "without --count" in refused(*common, "--sweep", "steps=1", "--count", 2)
