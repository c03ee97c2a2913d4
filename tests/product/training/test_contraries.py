"""Texts that a picture is easily mistaken for are false of it, and a CLIP learns to tell them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from ldm.config.clip import ClipConfig
from ldm.config.loader import validate
from ldm.data.collection import Collection
from ldm.data.fixed_captions import FixedCaptions
from ldm.data.images import ImageTransform
from ldm.data.source import Contrary
from ldm.demo.checker import compare, read
from ldm.demo.scene import alterations, captions, contraries, is_held_out, render
from ldm.demo.shapes import ShapesData
from ldm.diffusion import stream
from ldm.errors import ConfigError, DataError
from ldm.models.tokenizer import train_tokenizer
from ldm.tasks.clip import CaptionedDraws, ContrastiveTask, train
from runs import accelerator

TWO = ShapesData(count=150, scenes=("two",))
SCENES = [TWO.spec(index) for index in range(TWO.count)]


def test_scenes_of_the_kinds_that_are_named() -> None:
    assert all(scene.relation for scene in SCENES)
    kinds = ShapesData(count=400, scenes=("one", "many", "many"))
    found = [kinds.spec(index) for index in range(400)]
    assert not any(scene.relation for scene in found)
    assert 100 < sum(scene.position is not None for scene in found) < 170
    with pytest.raises(DataError, match="shapes: scenes is empty, name some of one, two, many"):
        ShapesData(scenes=())


def test_contraries_are_false_of_the_picture() -> None:
    for scene in SCENES[:60]:
        seen = read(render(scene, 64))
        assert compare(seen, scene).whole
        others = contraries(scene)
        assert others and not any(compare(seen, other).whole for other in others)
        assert compare(seen, others[0]).relation is False and compare(seen, others[0]).binding
    assert all(contraries(ShapesData(scenes=("one", "many")).spec(n)) == () for n in range(50))


def test_contraries_say_it_in_the_same_words() -> None:
    """All but the relation: its words are those of the caption in another order."""
    for scene in SCENES:
        true = captions(scene)
        for number, other in enumerate(contraries(scene)):
            for mine, theirs in zip(true, captions(other), strict=True):
                assert mine != theirs and not set(captions(other)) & set(true)
                if number:
                    assert sorted(mine.replace("an ", "a ").split()) == sorted(
                        theirs.replace("an ", "a ").split()
                    )


def test_no_contrary_of_training_names_a_held_out_pair() -> None:
    for example, scene in zip(TWO.examples, SCENES, strict=True):
        pairs = [t.pair for other in contraries(scene) for t in other.things]
        assert example.held_out or not any(is_held_out(*pair) for pair in pairs)


def test_a_source_draws_them_as_it_draws_the_caption() -> None:
    assert isinstance(TWO, Contrary)
    forms = set()
    for index, scene in enumerate(SCENES):
        told = TWO.caption(index, stream(0, "caption", index))
        false = TWO.contrary(index, stream(0, "caption", index))
        form = captions(scene).index(told)
        assert false in {captions(other)[form] for other in contraries(scene)}
        forms.add(form)
    assert len(forms) >= 4
    assert ShapesData(scenes=("one",)).contrary(0, stream(0, "caption", 0)) is None
    assert FixedCaptions(TWO, ["a <thing>"]).contrary(0, stream(0, "caption", 0)) is None


def test_alterations_are_false_of_the_picture() -> None:
    """One thing with another shape, place, colour or size."""
    one = ShapesData(count=40, scenes=("one",), contrary_scenes=("one",), size=64)
    for index in range(one.count):
        scene, others = one.spec(index), alterations(one.spec(index))
        seen = read(render(scene, 64))
        assert compare(seen, scene).whole
        assert not any(compare(seen, other).whole for other in others)
        assert sum(other.position != scene.position for other in others) == 8
        assert scene.held_out or not any(other.held_out for other in others)
        told = one.caption(index, stream(0, "caption", index))
        false = one.contrary(index, stream(0, "caption", index))
        assert false is not None and false not in captions(scene)
        for words in ("one ", " background with ", ", "):
            assert (words in told) is (words in false)
    assert not any(map(alterations, SCENES))
    both = ShapesData(count=1, scenes=("two",), contrary_scenes=("one",))
    assert both.contrary(0, stream(0, "caption", 0)) is None


def config(run: Path, **changes: Any) -> ClipConfig:
    return validate(
        ClipConfig,
        {
            "run": str(run),
            "data": {"kind": "shapes", "count": 60, "size": 16, "scenes": ["two"]},
            "images": {"size": 16},
            "clip": {"text_width": 32, "text_layers": 1, "vision_width": 16, "vision_layers": 1,
                     "vision_heads": 2, "size": 16, "patch": 4, "projection": 16},
            "vocab_size": 700,
            "batch_size": 16,
            "duration": "3 steps",
            "validation": {"every": "3 steps", "images": 8},
            "checkpoints": {"every": "3 steps"},
            "contraries": 0.5,
            **changes,
        },
    )  # fmt: skip


def test_the_loss_is_a_softmax_of_two(tmp_path: Path) -> None:
    some = config(tmp_path)
    collection = Collection((ShapesData(count=60, size=16),), ImageTransform(size=16))
    words = train_tokenizer([t for e in TWO.examples for t in e.captions], 700, 32)
    clip = some.clip.build(words, 0)
    task = ContrastiveTask(some, clip, words, collection.held_out, accelerator())
    draws = CaptionedDraws(collection, some, task.conditioner)
    batch = torch.utils.data.default_collate([draws[n] for n in range(16)])
    known = torch.tensor([draws.item(n).contrary(stream(0, "caption", n)) is not None
                          for n in range(16)])  # fmt: skip
    assert 0 < int(known.sum()) < 16
    loss = task(batch)["loss"]
    images, texts, scale = clip(batch["pixels"], batch["ids"])
    false = clip.text_features(batch["false_ids"])
    logits = scale * torch.stack([(images * texts).sum(1), (images * false).sum(1)], 1)
    near = cross_entropy(logits, torch.zeros(16, dtype=torch.int64), reduction="none") * known
    square, own = scale * images @ texts.T, torch.arange(16)
    both = (cross_entropy(square, own) + cross_entropy(square.T, own)) / 2
    assert torch.allclose(loss, both + 0.5 * near, atol=1e-5)
    # Without, a batch is what it was.
    plain = CaptionedDraws(collection, config(tmp_path, contraries=0), task.conditioner)[0]
    assert plain.keys() == {"position", "pixels", "ids"}
    assert torch.equal(plain["ids"], draws[0]["ids"])


def test_a_run_says_how_many_it_tells_apart(tmp_path: Path) -> None:
    train(config(tmp_path / "run"), accelerator())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any(0 <= json.loads(line).get("held_out_contraries", -1) <= 1 for line in lines)
    with pytest.raises(ConfigError, match="images.flip: of a mirrored picture a contrary may be"):
        flipped = config(tmp_path / "other", images={"size": 16, "flip": True})
        train(flipped, accelerator())
    for data in ({"kind": "digits"}, {"kind": "shapes", "count": 20, "scenes": ["one"]}):
        none = {"data": data, "images": {"size": 16}}
        with pytest.raises(ConfigError, match="contraries: of .* pictures no source knows a text"):
            train(config(tmp_path / "other", **none), accelerator())
