"""The fields of the YAML of training/train_clip.py."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import Field

from ldm.config.loader import config_class
from ldm.config.schema import RunConfig
from ldm.config.shapes import TextLength, Vocabulary
from ldm.models.clip_size import ClipSize


@config_class
class ClipConfig(RunConfig):
    """Contrastive training of a small CLIP, and of its tokenizer on the captions.

    Args:
        clip: both towers and the joint space.
        model: pipeline folder with a CLIP, of which all that reads text stays as it is: the picture
            tower learns to see the latents of its autoencoder, of side ``clip.size``, under its
            noise. None: both towers learn, from pictures.
        text: folder with a text_encoder and a tokenizer that stay as they are, as a denoiser knows
            them: a picture tower learns to meet them, and both projections (LiT with the towers
            exchanged: Zhai et al. 2022). None: the text tower learns too.
        vocab_size: tokens of the tokenizer; of ``model`` or ``text`` there is one.
        max_length: tokens of a text, start and end included; the same.
        contraries: weight of a second softmax, of a picture's caption against a text in nearly the
            same words that is false of it (NegCLIP: Yuksekgonul et al. 2023), where the source
            knows one (``shapes``: ``contrary_scenes``); the mean over all pictures, 0 without one.
    """

    clip: ClipSize = field(default_factory=ClipSize)
    model: str | None = None
    text: str | None = None
    vocab_size: Vocabulary = 4096
    max_length: TextLength = 32
    contraries: Annotated[float, Field(ge=0)] = 0.0
