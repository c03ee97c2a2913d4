"""SDXL trained: from random init, from its folder, with adapters, on cached texts or not."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from launched import ENVIRONMENT, digests, finish, losses, start, steps, wait_for
from ldm.config.loader import validate
from ldm.config.optimizer import TextToImageOptimizer
from ldm.config.schema import TrainConfig
from ldm.data.collection import Collection
from ldm.demo.shapes import ShapesData
from ldm.encoding.dataset import ImageDraws
from ldm.encoding.encoder import Encoder
from ldm.engine.optimizer import optimizer_of
from ldm.families.build import build
from ldm.formats import lora, textual_inversion
from ldm.pipeline import LatentDiffusionPipeline
from runs import accelerator, train, tree

TEXT = {"vocab_size": 600, "max_length": 16, "hidden_size": 32, "intermediate_size": 64,
        "layers": 2, "heads": 2}  # fmt: skip
UNET = {"block_out_channels": [16, 32], "attention": [False, True], "transformer_layers": [1, 2],
        "use_linear_projection": True, "coordinate_dim": 8}  # fmt: skip
CALL: dict[str, Any] = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent")


def settings(**changes: Any) -> dict[str, Any]:
    second = TEXT | {"activation": "gelu", "projection": 16}
    return {"family": "sdxl", "text": [TEXT, second], "unet": UNET, "duration": "4 steps",
            **changes}  # fmt: skip


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# Dropped together is what test_runs asks of one text encoder.
@pytest.mark.parametrize(
    "dropout", [pytest.param(0.1, marks=pytest.mark.slow), [0.3, 0.3]], ids=["together", "apart"]
)
def test_caches_and_going_on_change_no_bit(tmp_path, dropout):
    told = settings(text_dropout=dropout, duration="2 steps")
    final = train(tmp_path / "whole", **told)
    train(tmp_path / "bare", **told, cache_text=False)
    train(tmp_path / "parts", **told | {"duration": "1 steps"})
    train(tmp_path / "parts", **told)
    assert losses(tmp_path / "bare") == losses(tmp_path / "whole") == losses(tmp_path / "parts")
    if dropout == 0.1:  # these know nothing of it, and that is the slow one
        train(tmp_path / "pixels", **told, cache_latents=False)  # in batches of another size
        train(tmp_path / "micro", **told, micro_batch_size=4)
        for other in ("micro", "pixels"):
            whole = losses(tmp_path / "whole")
            assert losses(tmp_path / other) == pytest.approx(whole, rel=1e-5)
    for file in ("unet/diffusion_pytorch_model.safetensors", "model_index.json"):
        written = [(tmp_path / run / "final" / file).read_bytes() for run in ("whole", "parts")]
        assert written[0] == written[1]
    index = json.loads((final / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["force_zeros_for_empty_prompt"] is True
    theirs = StableDiffusionXLPipeline.from_pretrained(final)
    mine = LatentDiffusionPipeline.from_pretrained(final)
    drawn = [pipe("a ring", generator=generator(), **CALL).images for pipe in (theirs, mine)]
    assert (drawn[0] - drawn[1]).abs().max() <= 1e-5 * drawn[0].abs().max()


@pytest.mark.slow  # test_cached asks it of one text encoder
def test_text_is_cached_in_half_precision(tmp_path, monkeypatch):
    """Half the bytes; of a run that computes in bfloat16 no bit changes, of one in float32 some."""
    lines, size = {}, {}
    for precision, dtype in (
        ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32"),
        ("float32", "bfloat16"),
    ):  # fmt: skip
        monkeypatch.setenv("LDM_CACHE", str(tmp_path / f"cache-{precision}-{dtype}"))
        run = tmp_path / f"{precision}-{dtype}"
        changes = settings(duration="2 steps", precision=precision, cache_dtype=dtype)
        changes |= {"batch_size": 4, "data": {"count": 24}}  # bfloat16 is slow on many a CPU
        train(run, **changes, text_dropout=[0.3, 0.3])
        lines[precision, dtype] = losses(run)
        shards = (tmp_path / f"cache-{precision}-{dtype}" / "text").rglob("*.safetensors")
        rows = [load_file(shard) for shard in shards]
        size[dtype] = sum(x.nbytes for row in rows for x in row.values() if x.is_floating_point())
    assert size["float32"] == 2 * size["bfloat16"] > 0
    assert lines["bfloat16", "bfloat16"] == lines["bfloat16", "float32"]
    exact, rounded = lines["float32", "float32"], lines["float32", "bfloat16"]
    assert rounded != exact and rounded == pytest.approx(exact, rel=1e-3)


def draws(dropout: Any) -> ImageDraws:
    plain = tree(Path("run"), **settings(text_dropout=dropout), cache_text=False)
    config = validate(TrainConfig, plain)
    collection = Collection([ShapesData(count=8, size=16)], config.images)
    model = build(config, collection.captions())
    return ImageDraws(
        config, collection, Encoder(config, model.codec, model.conditioner, accelerator())
    )


def test_shares_of_what_each_text_encoder_is_told(own_cache):
    count = 10_000
    apart, together = draws([0.3, 0.3]), draws(0.3)
    found = Counter(map(tuple, apart._told(range(count))))
    for told, share in (((1, 1), 0.49), ((1, 0), 0.21), ((0, 1), 0.21), ((0, 0), 0.09)):
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(found[told] / count - share) < 3 * deviation, told
    found = Counter(map(tuple, together._told(range(count))))
    assert set(found) == {(True, True), (False, False)}
    assert abs(found[False, False] / count - 0.3) < 3 * (0.21 / count) ** 0.5


def test_what_is_dropped_is_zeros(own_cache):
    data = draws([0.5, 0.5])
    for position in range(12):
        item = data[position]
        batch = {name: value[None] for name, value in item.items() if torch.is_tensor(value)}
        cond = data.encoder.condition(batch)
        first, second = item["told"].tolist()
        assert bool(cond.tokens[..., :32].any()) == first
        assert bool(cond.tokens[..., 32:].any()) == bool(cond.pooled.any()) == second
        assert torch.equal(cond.extra["coordinates"][0], item["coordinates"])


def test_a_refiner_is_told_a_score_and_learns_the_end_alone(tmp_path):
    objective = {"times": {"kind": "uniform", "high": 0.2}}
    text = [None, TEXT | {"activation": "gelu", "projection": 16}]
    told = settings(text=text, unet=UNET | {"aesthetic_score": True}, objective=objective)
    final = train(tmp_path / "run", **told)
    index = json.loads((final / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    assert index["requires_aesthetics_score"] is True and index["text_encoder"] == [None, None]
    theirs = StableDiffusionXLImg2ImgPipeline.from_pretrained(final)
    mine = LatentDiffusionPipeline.from_pretrained(final)
    image = torch.randn(1, 4, 8, 8, generator=generator())
    call = CALL | dict(image=image, denoising_start=0.5, num_inference_steps=4)
    drawn = [pipe("a ring", generator=generator(), **call).images for pipe in (theirs, mine)]
    assert (drawn[0] - drawn[1]).abs().max() <= 1e-5 * drawn[0].abs().max()
    # And from its folder, all of it.
    train(tmp_path / "more", model=str(final), vae=None, text=None, unet=None, duration="1 steps")


def test_a_lora_of_all_three_networks(tmp_path):
    base = train(tmp_path / "base", **settings(duration="1 steps"))
    told = dict(model=str(base), vae=None, text=None, unet=None, duration="3 steps")
    every = ["unet", "text_encoder", "text_encoder_2"]
    final = train(tmp_path / "run", **told, train=every, lora={"rank": 2}, text_dropout=0)
    updates = lora.read(final)
    assert list(updates) == every
    moved = {f"{p}.{n}": bool(u.up.any()) for p, part in updates.items() for n, u in part.items()}
    # Of the first text encoder the last layer but one is read.
    unheard = [name for name in moved if name.startswith("text_encoder.") and ".layers.1." in name]
    assert len(unheard) == 4 and not any(moved.pop(name) for name in unheard)
    assert all(moved.values())
    train(tmp_path / "parts", **told | {"duration": "2 steps"}, train=every, lora={"rank": 2},
          text_dropout=0)  # fmt: skip
    train(tmp_path / "parts", **told, train=every, lora={"rank": 2}, text_dropout=0)
    assert losses(tmp_path / "parts") == losses(tmp_path / "run")
    theirs = StableDiffusionXLPipeline.from_pretrained(base)
    mine = LatentDiffusionPipeline.from_pretrained(base)
    drawn = []
    for pipe in (theirs, mine):
        plain = pipe("a ring", generator=generator(), **CALL).images
        pipe.load_lora_weights(final)
        drawn.append(pipe("a ring", generator=generator(), **CALL).images)
        assert not torch.equal(plain, drawn[-1])
    assert (drawn[0] - drawn[1]).abs().max() <= 1e-5 * drawn[0].abs().max()
    mine.fuse_lora()
    mine.save_pretrained(tmp_path / "fused")
    fused = StableDiffusionXLPipeline.from_pretrained(tmp_path / "fused")
    again = fused("a ring", generator=generator(), **CALL).images
    assert (again - drawn[0]).abs().max() <= 1e-4 * drawn[0].abs().max()


def test_a_new_word_in_both_text_encoders(tmp_path):
    base = train(tmp_path / "base", **settings(duration="1 steps"))
    word = {"token": "<ring>", "initializer": "circle", "templates": ["a {}"]}
    told = dict(model=str(base), vae=None, text=None, unet=None, textual_inversion=word)
    final = train(tmp_path / "run", **told, text_dropout=0, optimizer={"lr": 1e-2})
    assert [rows.shape for rows in textual_inversion.read_towers(final)[1]] == [(1, 32), (1, 32)]
    theirs = StableDiffusionXLPipeline.from_pretrained(base)
    rows = load_file(final / textual_inversion.FILE)
    for number, key in (("", "clip_l"), ("_2", "clip_g")):
        theirs.load_textual_inversion(
            rows[key], token="<ring>", text_encoder=getattr(theirs, f"text_encoder{number}"),
            tokenizer=getattr(theirs, f"tokenizer{number}"),
        )  # fmt: skip
    mine = LatentDiffusionPipeline.from_pretrained(base)
    plain = mine("a circle", generator=generator(), **CALL).images
    mine.load_textual_inversion(final)
    drawn = [pipe("a <ring>", generator=generator(), **CALL).images for pipe in (theirs, mine)]
    assert (drawn[0] - drawn[1]).abs().max() <= 1e-5 * drawn[0].abs().max()
    assert (drawn[0] - plain).abs().max() > 1e-3


@pytest.mark.slow  # test_runs asks it of one text encoder
def test_killed_and_in_two_processes(tmp_path, monkeypatch, own_cache):
    monkeypatch.setitem(ENVIRONMENT, "LDM_CACHE", str(own_cache))
    told = settings(text_dropout=[0.3, 0.3], duration="9 steps", batch_size=8)
    told |= {"checkpoints": {"every": "3 steps", "keep": 2}}
    finish(start(tree(tmp_path / "whole", **told), tmp_path / "a"))
    config, run = tree(tmp_path / "killed", **told), tmp_path / "killed"
    process = start(config, tmp_path / "b")
    third = run / "checkpoints/images-000000000024"  # written beside the fourth step
    wait_for(lambda: steps(run) >= 4 and third.is_dir(), process)
    process.kill()
    process.wait()
    assert steps(run) < 9
    assert "going on from" in finish(start(config, tmp_path / "b"))
    assert losses(run) == losses(tmp_path / "whole") and len(losses(run)) == 9
    last = "checkpoints/images-000000000072"
    assert digests(run / last) == digests(tmp_path / "whole" / last)
    finish(start(tree(tmp_path / "two", **told), tmp_path / "c", processes=2))
    # Sums over two halves are rounded in another order.
    assert losses(tmp_path / "two") == pytest.approx(losses(run), rel=1e-6)


def test_velocity_at_zero_terminal_snr_and_pictures_of_two_shapes(tmp_path):
    wide = tmp_path / "pictures"
    wide.mkdir()
    for number in range(24):
        size = (32, 16) if number % 2 else (16, 32)
        Image.new("RGB", size, (10 * number, 80, 200)).save(wide / f"{number}.png")
        (wide / f"{number}.txt").write_text(f"thing {number}")
    told = settings(
        data={"path": str(wide)},
        images={"size": 16, "buckets": {"step": 8, "max_aspect": 4.0, "upscale": True}},
        process={"zero_terminal_snr": True},
        objective={"target": "v"},
    )
    final = train(tmp_path / "run", **told)
    theirs = StableDiffusionXLPipeline.from_pretrained(final)
    config = theirs.scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
    mine = LatentDiffusionPipeline.from_pretrained(final)
    call = CALL | dict(height=16, width=32, original_size=(16, 32), target_size=(16, 32))
    drawn = [pipe("thing 3", generator=generator(), **call).images for pipe in (theirs, mine)]
    assert drawn[0].shape == (1, 4, 8, 16)
    assert (drawn[0] - drawn[1]).abs().max() <= 1e-5 * drawn[0].abs().max()


def test_both_text_encoders_learn_at_their_own_rate():
    names = ("unet.a", "text_encoder.a", "text_encoder_2.a")
    weights = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in names}
    optimizer = optimizer_of(weights, TextToImageOptimizer(lr=1e-3, text_encoder_lr=1e-4))
    found = {
        name: group["factor"]
        for group in optimizer.param_groups
        for name, value in weights.items()
        if any(value is other for other in group["params"])
    }
    assert found == pytest.approx(dict(zip(names, (1.0, 0.1, 0.1), strict=True)))
