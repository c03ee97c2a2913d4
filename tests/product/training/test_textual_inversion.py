"""A run that learns a new word: nothing else moves, stock reads it, and going on is exact."""

import json
import shlex
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from ldm.cli import app
from ldm.engine.trainer import Trainer
from ldm.formats import textual_inversion
from ldm.models.conditioner import TextConditioner
from ldm.models.textual_inversion import add_word
from ldm.pipeline import LatentDiffusionPipeline
from programs import told
from runs import train, tree

pytestmark = pytest.mark.usefixtures("kept_cache")

WORD = "<my-cat>"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("base") / "model")


def settings(base: Path, **changes: Any) -> dict[str, Any]:
    """Changes to ``runs.tree`` for a word of two vectors; byte tokens: "cat" is three."""
    word = {"token": WORD, "initializer": "cat", "vectors": 2, "templates": ["a {}", "the {} here"]}
    parts = {"model": str(base), "vae": None, "text": None, "unet": None}
    usual = {"textual_inversion": word, "optimizer": {"lr": 1e-2, "weight_decay": 0.1}}
    return {**parts, **usual, "text_dropout": 0.0, "duration": "4 steps", **changes}


def draw(pipe: Any, prompt: str = f"a {WORD}, red") -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, *tiny.LATENT, generator=torch.Generator().manual_seed(1))
    return pipe(prompt, latents=latents, num_inference_steps=3, output_type="np").images


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_the_new_rows_learn_and_nothing_else(base, tmp_path, monkeypatch):
    seen: list[Any] = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: (seen.append(self), fit(self))[1])
    final = train(tmp_path / "run", **settings(base))
    (trainer,) = seen
    model, start = trainer.task.model, tiny.components()
    assert sorted(f.name for f in final.iterdir()) == [textual_inversion.FILE, "manifest.json"]
    assert list(trainer.weights) == ["text_encoder.embeddings.token_embedding.rows"]
    assert model.networks["vae"].device.type == "meta"  # nothing in it learns, and all is cached
    for part in ("unet", "text_encoder"):
        found = {
            name.replace("token_embedding.known", "token_embedding"): value
            for name, value in model.networks[part].state_dict().items()
            if not name.endswith(".rows")
        }
        expected = start[part].state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(g["weight_decay"] == 0 for g in trainer.optimizer.param_groups)
    # "cat" is dealt out over two vectors: "c", and the mean of "a" and "t</w>".
    old = start["text_encoder"].get_input_embeddings().weight
    c, a, t = old[start["tokenizer"]("cat", add_special_tokens=False).input_ids]
    first = torch.stack([c, (a + t) / 2]).detach()
    word, rows = textual_inversion.read(final)
    assert word == WORD and rows.shape == (2, tiny.WIDTH)
    moved = (rows - first).abs()
    assert (moved.amax(1) > 1e-3).all() and moved.max() < 0.1  # both; Adam's steps of 0.01
    # What is saved is the average; the raw rows are in the checkpoint.
    folder = tmp_path / "run" / "checkpoints" / "images-000000000064"
    raw = load_file(folder / "training" / "raw.safetensors")
    ((name, value),) = raw.items()
    assert torch.equal(value, trainer.weights[name]) and not torch.equal(value, rows)
    with safe_open(final / textual_inversion.FILE, framework="pt") as opened:
        assert json.loads(opened.metadata()["base"]) == trainer.task.origin

    # The same pictures from stock, from ours, and from within the run.
    ours = LatentDiffusionPipeline.from_pretrained(base)
    theirs = StableDiffusionPipeline.from_pretrained(base)
    before = draw(ours, "a red")
    generator = torch.get_rng_state()
    ours.load_textual_inversion(final)
    assert torch.equal(torch.get_rng_state(), generator)
    theirs.load_textual_inversion(final)
    back = trainer.task.resting.back(torch.device("cpu"), "this test")
    with trainer.ema.model.in_front(), back:
        inside = trainer.task.pipeline()
        inside.scheduler = ours.scheduler  # a run draws with the one that it saves
        there = draw(inside)
    assert np.array_equal(draw(ours), draw(theirs)) and np.array_equal(draw(ours), there)
    assert np.array_equal(draw(ours, "a red"), before)
    assert np.abs(draw(ours) - draw(ours, "a cat, red")).max() > 1e-3
    # All of it counts: the first vector alone draws something else.
    ids = TextConditioner(ours.tokenizer, ours.text_encoder).tokenize([f"a {WORD}"])[0].tolist()
    first_id = ours.tokenizer.convert_tokens_to_ids(WORD)
    assert ids[2:4] == [first_id, first_id + 1] and ids[4] == ours.tokenizer.eos_token_id
    # A pipeline that knows the word is a folder like any other.
    ours.save_pretrained(tmp_path / "with")
    for kind in (LatentDiffusionPipeline, StableDiffusionPipeline):
        assert np.array_equal(draw(kind.from_pretrained(tmp_path / "with")), there)
    ours.unload_textual_inversion()
    assert np.array_equal(draw(ours, "a red"), before)


def test_a_run_that_was_broken_off_ends_in_the_same_bits(base, tmp_path, monkeypatch):
    asked = settings(base, duration="6 steps", checkpoints={"every": "2 steps", "keep": 9})
    train(tmp_path / "whole", **asked)
    log = Trainer._log

    def breaks(self: Any, *arguments: Any) -> None:
        log(self, *arguments)
        if self.seen == 3 * 16:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", **asked)
    train(tmp_path / "broken", **asked)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    files = sorted(f.relative_to(tmp_path / "whole") for f in (tmp_path / "whole").rglob("*.safe*"))
    assert len(files) == 3 * 3 + 1  # three checkpoints and the result
    for file in files:
        one, other = (tmp_path / name / file for name in ("whole", "broken"))
        assert one.read_bytes() == other.read_bytes()


def test_captions_that_say_the_word(pictures, base, tmp_path, command):
    data = {"kind": "folder", "path": str(pictures), "held_out_fraction": 0.0}
    word = {"token": WORD, "initializer": "cat"}
    asked = settings(base, textual_inversion=word, batch_size=4, duration="1 step")
    config = tree(tmp_path / "run", **asked)
    config["data"] = data
    message = told(*command(config))
    assert message == (
        "textual_inversion.token: no caption says '<my-cat>': write it into the captions, or set"
        ' textual_inversion.templates (["a photo of {}"])'
    )
    (pictures / "3.txt").write_text(f"picture of {WORD}")
    assert command(config)[0] == 0
    assert textual_inversion.read(tmp_path / "run" / "final")[1].shape == (1, tiny.WIDTH)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"textual_inversion": {"token": WORD}}, "key 'textual_inversion.initializer' is required"),
        (
            {"textual_inversion": {"token": "my cat", "initializer": "cat"}},
            "key 'textual_inversion.token' is 'my cat'",
        ),
        (
            {"textual_inversion": {"token": "a", "initializer": "cat"}},
            "textual_inversion: token: the tokenizer has 'a' already: choose another word",
        ),
        (
            {"textual_inversion": {"token": WORD, "initializer": "cat", "vectors": 23}},
            "textual_inversion: vectors: 23 are too many, a text has room for 22",
        ),
        (
            {"textual_inversion": {"token": WORD, "initializer": " "}},
            "textual_inversion: initializer: ' ' holds no word",
        ),
        (
            {"textual_inversion": {"token": WORD, "initializer": "cat", "templates": ["a photo"]}},
            "textual_inversion: templates: 'a photo' does not say where the token goes: {}",
        ),
        (
            {"optimizer": {"text_encoder_lr": 1e-5}},
            "optimizer.text_encoder_lr: a new word learns at optimizer.lr: leave this out",
        ),
        ({"lora": {}}, "textual_inversion and lora are two kinds of run: leave one out"),
        (
            {"train": ["text_encoder"]},
            "train: with textual_inversion a new word alone learns: leave it out",
        ),
    ],
)
def test_bad_config(command, base, tmp_path, change, message):
    if len(word := change.get("textual_inversion", {})) > 1:
        word.setdefault("templates", ["a {}"])
    assert message in told(*command(tree(tmp_path / "run", **settings(base, **change))))


def test_a_base_in_no_folder_is_written_at_the_start(base, tmp_path, capsys, monkeypatch):
    there: list[bool] = []
    fit = Trainer.fit
    kept = tmp_path / "run" / "base"

    def fitted(self: Any) -> Path:
        there.append((kept / "model_index.json").exists())
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", fitted)
    changes = settings(base, model=None, vae=str(base / "vae"), text=str(base))
    plain = tree(tmp_path / "x")
    train(tmp_path / "run", **{**changes, "unet": plain["unet"]})
    assert there == [True]
    words = StableDiffusionPipeline.from_pretrained(kept).tokenizer
    assert WORD not in words.get_vocab()  # it is the base, not what was learnt
    (line,) = (x for x in capsys.readouterr().out.splitlines() if " sample " in x)
    arguments = shlex.split(line)[1:]
    assert arguments[arguments.index("--model") + 1] == str(kept)
    pictures = []
    for name, more in (("a", arguments), ("b", arguments[: arguments.index("--embedding")])):
        out = tmp_path / f"{name}.png"
        run = CliRunner().invoke(app, [*more, "--steps", "2", "--out", str(out)])
        assert run.exit_code == 0, run.output
        pictures.append(out.read_bytes())
    assert pictures[0] != pictures[1]


def test_bad_files(base, tmp_path):
    pipe, other = tiny.pipeline(), tmp_path / "wide.safetensors"
    save_file({WORD: torch.zeros(1, 48)}, other)
    with pytest.raises(ValueError, match=r"its vectors are of width 48, the encoder's of 32$"):
        pipe.load_textual_inversion(other)
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=r"holds 2 tensors: a word of textual inversion is one"):
        pipe.load_textual_inversion(other)
    other.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"wide.safetensors cannot be read as safetensors: "):
        pipe.load_textual_inversion(other)
    torch.save({WORD: torch.zeros(1, 32)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt is pickled and could run code when it is read; "):
        pipe.load_textual_inversion(tmp_path / "x.pt")
    for rows, words in (
        (torch.zeros(100_000, 32), "holds 100,000 vectors, and no text has room for more than 1,0"),
        (torch.full((2, 32), torch.nan), "holds no vectors that a text encoder could read"),
        (torch.ones(2, 32, dtype=torch.int64), "holds no vectors that a text encoder could read"),
        (torch.ones(0, 32), "holds no vectors that a text encoder could read"),
    ):
        save_file({WORD: rows}, other)
        with pytest.raises(ValueError, match=words):
            pipe.load_textual_inversion(other)
    for word in ("", " ", "x" * 1000):
        save_file({word: torch.ones(1, 32)}, other)
        with pytest.raises(ValueError, match="is of no word"):
            pipe.load_textual_inversion(other)
    with pytest.raises(ValueError, match=r"learned_embeds.safetensors: there is no such file$"):
        pipe.load_textual_inversion(tmp_path)
    run = CliRunner().invoke(app, ["sample", "x", "--model", str(base), "--embedding", "none"])
    assert run.exit_code == 2
    assert run.stderr == "error: --embedding none: there is no such file or folder\n"
    # AUTOMATIC1111's: the word is the name of the file.
    save_file({"emb_params": torch.ones(3, 32)}, tmp_path / "style.safetensors")
    pipe.load_textual_inversion(tmp_path / "style.safetensors")
    assert {"style", "style_1", "style_2"} <= set(pipe.tokenizer.added_tokens_encoder)


@pytest.mark.parametrize("word", ["<MyCat>", "ΑΣΤΈΡΙ", "<Café>"])
def test_a_word_of_several_vectors_in_any_case(tmp_path, word):
    """It is all of its vectors, in order, as stock has them of a word in lower case."""
    ours, theirs = (
        tiny.pipeline(),
        StableDiffusionPipeline(**tiny.components(), safety_checker=None, feature_extractor=None),
    )
    rows = torch.randn(3, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    file = textual_inversion.write(word, rows, tmp_path)
    ours.load_textual_inversion(file)
    theirs.load_textual_inversion(file, token=word.lower())  # it knows no others
    conditioner = TextConditioner(ours.tokenizer, ours.text_encoder)
    first = ours.tokenizer.convert_tokens_to_ids(word)
    cases = {word, word.lower(), word.upper(), unicodedata.normalize("NFD", word)}
    assert len(cases) >= 3
    for case in cases:
        for text, count in ((case, 1), (f"a {case}, {case}s", 2), (f"A{case}{case}?", 2)):
            found = conditioner.tokenize([text])[0].tolist()
            assert [i for i in found if i >= first] == [first, first + 1, first + 2] * count
    alone = conditioner.tokenize([f"{word}_1"])[0].tolist()
    assert [i for i in alone if i >= first] == [first + 1]
    stock = draw(theirs, f"a {word.lower()}, red")
    for case in (word, word.lower(), word.upper()):
        assert np.array_equal(draw(ours, f"a {case}, red"), stock)
    saved = tmp_path / "saved"
    ours.save_pretrained(saved)
    again = LatentDiffusionPipeline.from_pretrained(saved)
    assert np.array_equal(draw(again, f"a {word.upper()}, red"), draw(ours, f"a {word}, red"))


def test_words_that_differ_in_case_alone(tmp_path):
    pipe = tiny.pipeline()
    pipe.load_textual_inversion(
        textual_inversion.write("<MyCat>", torch.ones(2, tiny.WIDTH), tmp_path)
    )
    other = textual_inversion.write("<mycat>", torch.ones(1, tiny.WIDTH), tmp_path / "other")
    for more in ({}, {"token": "<MYCAT>"}):
        with pytest.raises(ValueError, match=r"and '<MyCat>' differ in case alone"):
            pipe.load_textual_inversion(other, **more)
    pipe.load_textual_inversion(other, token="<cat-2>")
    words = pipe.tokenizer
    with pytest.raises(ValueError, match=r"the tokenizer has '<MYCAT>' already"):
        add_word(words, pipe.text_encoder, "<MYCAT>", "cat", 1)
    with pytest.raises(ValueError, match=r"the tokenizer has 'A' already"):
        add_word(words, pipe.text_encoder, "A", "cat", 1)


def test_captions_say_a_word_in_any_case(pictures, base, tmp_path):
    (pictures / "3.txt").write_text(unicodedata.normalize("NFD", "picture of <CAFÉ>"))
    word = {"token": "<Café>", "initializer": "cat", "vectors": 2}
    asked = settings(base, textual_inversion=word, batch_size=8, duration="1 step")
    asked["data"] = {"kind": "folder", "path": str(pictures), "held_out_fraction": 0.0}
    final = train(tmp_path / "run", **asked)
    start = tiny.components()
    ids = start["tokenizer"]("cat", add_special_tokens=False).input_ids
    c, a, t = start["text_encoder"].get_input_embeddings().weight[ids]
    moved = textual_inversion.read(final)[1] - torch.stack([c, (a + t) / 2])
    assert (moved.abs().amax(1) > 1e-3).all()  # both of its vectors


@pytest.mark.parametrize("kind", ["diffusers", "A1111"])
def test_the_line_that_converts_pickled_words(tmp_path, kind):
    rows = torch.randn(2, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    a1111 = {"string_to_param": {"*": rows.clone().requires_grad_()}, "name": "x", "step": 9}
    file = tmp_path / "my 'own' $word.pt"
    torch.save({WORD: rows} if kind == "diffusers" else a1111, file)
    with pytest.raises(ValueError) as caught:
        tiny.pipeline().load_textual_inversion(file)
    _, _, line = str(caught.value).partition("this converts it without: ")
    python, option, program = shlex.split(line)
    assert (python, option) == ("python", "-c") and "weights_only=True" in program
    exec(program, {})
    word, found = textual_inversion.read(file.with_suffix(".safetensors"))
    assert word == (WORD if kind == "diffusers" else file.stem) and torch.equal(found, rows)


def test_every_template_is_drawn(base):
    from ldm.data.collection import Collection
    from ldm.data.images import ImageTransform
    from ldm.demo.shapes import ShapesData
    from ldm.diffusion import stream

    collection = Collection(ShapesData(count=20, size=16), ImageTransform(size=16))
    summary = collection.summary()
    collection.retell(["a <x>", "the <x>"])
    assert list(collection.captions()) == ["", "a <x>", "the <x>"]
    assert collection.summary() == summary
    drawn = [item.caption(stream(0, "caption", n)) for n, item in enumerate(collection.train)]
    assert set(drawn) == {"a <x>", "the <x>"}
    assert {item.caption(None) for item in collection.held_out} <= {"a <x>"}
