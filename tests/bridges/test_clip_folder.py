"""A trained CLIP leaves as folders that stock transformers and older readers load silently."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ldm.models.clip import Clip, save_text_encoder
from ldm.models.clip_size import ClipSize
from ldm.models.tokenizer import train_tokenizer

SIZE = ClipSize(
    text_width=16,
    text_layers=2,
    text_heads=2,
    vision_width=24,
    vision_layers=2,
    vision_heads=2,
    patch=8,
    size=16,
    projection=12,
)
TEXTS = ["a red apple", "xyzzy", ""]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(["a red apple", "a green apple"] * 2, 560, max_length=10)


@pytest.fixture(scope="module")
def clip(tokenizer: CLIPTokenizer) -> Clip:
    """Moved away from its initialisation, biases and norms included."""
    clip = SIZE.build(tokenizer, seed=0).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in clip.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return clip


@pytest.fixture
def ids(tokenizer: CLIPTokenizer) -> torch.Tensor:
    return tokenizer(TEXTS, padding="max_length", max_length=10, return_tensors="pt").input_ids


@torch.no_grad()
def test_text_folder_loads_into_stock(clip: Clip, ids: torch.Tensor, tmp_path: Path) -> None:
    clip.save_text(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())
        assert file.metadata() == {"format": "pt"}
    stock, info = CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    theirs, ours = stock(ids), clip.model.text_model(ids)
    assert (theirs.last_hidden_state - ours.last_hidden_state).abs().max() <= 1e-6
    assert (theirs.pooler_output - ours.pooler_output).abs().max() <= 1e-6


@torch.no_grad()
def test_pooling_takes_the_real_end(
    clip: Clip, tokenizer: CLIPTokenizer, ids: torch.Tensor, tmp_path: Path
) -> None:
    clip.save_text(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == config["pad_token_id"] == tokenizer.eos_token_id
    assert config["bos_token_id"] == tokenizer.bos_token_id
    assert config["architectures"] == ["CLIPTextModel"]
    output = CLIPTextModel.from_pretrained(tmp_path)(ids)
    ends = [len(tokenizer(text).input_ids) - 1 for text in TEXTS]
    assert ends == [4, 6, 1]
    assert torch.equal(output.pooler_output, output.last_hidden_state[torch.arange(3), ends])


@torch.no_grad()
def test_saving_a_loaded_tower_keeps_the_keys(clip: Clip, tmp_path: Path) -> None:
    clip.save_text(tmp_path / "a")
    loaded = CLIPTextModel.from_pretrained(tmp_path / "a")
    save_text_encoder(loaded, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()


def test_a_half_precision_folder_loads_as_float32(clip: Clip, tmp_path: Path) -> None:
    clip.save_text(tmp_path / "full")
    half = CLIPTextModel.from_pretrained(tmp_path / "full", dtype=torch.float16)
    save_text_encoder(half, tmp_path / "half")
    assert CLIPTextModel.from_pretrained(tmp_path / "half").dtype == torch.float32


@torch.no_grad()
def test_both_towers_come_back(clip: Clip, ids: torch.Tensor, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    clip.save_text(tmp_path / "text")
    clip.save_vision(tmp_path / "vision")
    again = Clip.load(tmp_path / "text", tmp_path / "vision")
    assert torch.equal(torch.get_rng_state(), before)
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    for theirs, ours in zip(again(pixels, ids), clip(pixels, ids), strict=True):
        assert (theirs - ours).abs().max() <= 1e-6


@torch.no_grad()
def test_vision_folder_loads_into_stock(clip: Clip, tmp_path: Path) -> None:
    clip.save_vision(tmp_path)
    tower, info = CLIPVisionModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    picture = Image.effect_noise((16, 16), 80).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt").pixel_values
    assert -1 <= pixels.min() < -0.2 and 0.2 < pixels.max() <= 1
    theirs = torch.nn.functional.normalize(tower(pixels).image_embeds, dim=-1)
    assert (theirs - clip.image_features(pixels)).abs().max() <= 1e-6


@torch.no_grad()
def test_features_are_unit_vectors_of_the_stock_model(clip: Clip, ids: torch.Tensor) -> None:
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    output = clip.model(input_ids=ids, pixel_values=pixels)
    image, text, scale = clip(pixels, ids)
    assert image.shape == text.shape == (3, 12)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(scale * image @ text.T, output.logits_per_image)


def test_initialisation_is_a_function_of_the_seed(tokenizer: CLIPTokenizer) -> None:
    before = torch.get_rng_state()
    one, same, other = (SIZE.build(tokenizer, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "model.text_model.embeddings.token_embedding.weight"
    assert not torch.equal(one[name], other[name])


def test_position_embeddings_begin_as_wide_as_is_said(tokenizer: CLIPTokenizer) -> None:
    usual = SIZE.build(tokenizer, seed=3).state_dict()
    wide = replace(SIZE, position_std=0.1).build(tokenizer, seed=3).state_dict()
    (moved,) = [name for name in usual if not torch.equal(usual[name], wide[name])]
    assert moved == "model.vision_model.embeddings.position_embedding.weight"
    assert torch.allclose(wide[moved], 5 * usual[moved])
    assert float(wide[moved].std()) == pytest.approx(0.1, rel=0.15)
    with pytest.raises(ValueError, match=r"position_std=0 must lie in \(0, 1\]"):
        ClipSize(position_std=0)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="text_width=10 is no multiple of text_heads=4"):
        ClipSize(text_width=10)
