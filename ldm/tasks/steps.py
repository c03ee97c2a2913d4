"""The optimiser step of each program as ``ldm.tasks.estimate`` traces it: the same networks on
the same shapes, without data.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPModel

from ldm.config.schema import AutoencoderConfig, TrainConfig
from ldm.diffusion import Condition
from ldm.engine.precision import device_at_hand
from ldm.families.adapt import learn
from ldm.families.model import Parts
from ldm.models.attention import set_attention
from ldm.models.classifier import NoisyClassifier
from ldm.models.codec import VaeCodec
from ldm.models.denoiser import UNetDenoiser
from ldm.models.textual_inversion import Embedding
from ldm.tasks.estimate import Step

_FLOAT = 4  # bytes


def text_to_image(config: TrainConfig, parts: Parts) -> Step:
    """That of training/train.py, for pictures of ``images.size`` squared."""
    # Those of a cached set are shapes alone in a run too.
    networks: dict[str, nn.Module] = {"unet": parts.unet} if parts.stored else parts.all()
    word, text = config.textual_inversion, parts.text_encoder
    if word is not None:
        known = text.get_input_embeddings()
        rows = torch.empty(word.vectors, known.embedding_dim, device="meta")
        text.set_input_embeddings(Embedding(known, known.num_embeddings, rows))
    learn(parts, config)
    for part in config.learns:
        getattr(parts, part).train()  # which checkpointing asks for
    bfloat16 = config.precision == "bfloat16"
    here = "sdpa" if config.attention == "xformers" else config.attention  # which needs a GPU
    set_attention(parts.unet, here, device_at_hand(), bfloat16=bfloat16)
    codec, denoiser, side = parts.codec, UNetDenoiser(parts.unet), config.images.size
    latent = (codec.channels, side // codec.factor, side // codec.factor)
    width = text.config.hidden_size if text else 0
    length = text.config.max_position_embeddings if text else 0
    reads = "text_encoder" in config.learns
    encodes = config.cache_latents and config.images.deterministic and parts.vae is not None
    cached = encodes, config.cache_text and not reads and text is not None
    if parts.stored:
        cached = True, True

    def tokens(n: int) -> Tensor:
        ids = torch.empty(n, length, dtype=torch.int64)
        return text(ids).last_hidden_state

    def loss(n: int) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # frozen ones are in float32
            pixels = () if cached[0] else torch.empty(n, 3, side, side)
            z = torch.empty(n, *latent) if cached[0] else codec.encode(pixels).mean
            label = {} if text else {"label": torch.empty(n, dtype=torch.int64)}
            late = reads or text is None
            told = None if late else torch.empty(n, length, width) if cached[1] else tokens(n)
        cond = Condition(tokens(n) if reads else told, extra=label)
        u, eps = torch.empty(n, dtype=torch.float64), torch.empty_like(z)
        return parts.objective(parts.process, denoiser, z, cond, u=u, eps=eps).loss.mean()

    picture = 2 * _FLOAT * latent[0] * latent[1] * latent[2]  # mean and log-variance
    caption = _FLOAT * width * (length + 1) + length  # tokens, pooled, mask
    return Step(
        networks,
        loss,
        None if config.lora or word else tuple(networks),
        (0, 0) if parts.stored else (picture * cached[0], caption * cached[1]),
    )


def autoencoder(config: AutoencoderConfig, vae: AutoencoderKL) -> Step:
    """That of training/train_autoencoder.py."""
    codec, side = VaeCodec(vae), config.images.size
    if config.train == "decoder":
        for part in (vae.encoder, vae.quant_conv):
            if part is not None:
                part.requires_grad_(False)

    def loss(n: int) -> Tensor:
        x = torch.empty(n, 3, side, side)
        moments = codec.encode(x)
        z = moments.mean.float() + (0.5 * moments.logvar.float()).exp()
        return (x - vae.decode(z).sample.float()).abs().mean() + moments.logvar.mean()

    return Step({"vae": vae}, loss, ("vae",))


def contrastive(clip: CLIPModel, contraries: float) -> Step:
    """That of training/train_clip.py, without a frozen autoencoder."""
    texts_of = 2 if contraries else 1  # a picture's
    vision, length = clip.config.vision_config, clip.config.text_config.max_position_embeddings

    def loss(n: int) -> Tensor:
        pixels = torch.empty(n, vision.num_channels, vision.image_size, vision.image_size)
        ids = torch.empty(texts_of * n, length, dtype=torch.int64)
        pictures = clip.get_image_features(pixels).pooler_output
        texts = clip.get_text_features(ids).pooler_output
        return (pictures.float() @ texts.float().T * clip.logit_scale).logsumexp(1).mean()

    return Step({"clip": clip}, loss, ("clip",))


def classification(classifier: NoisyClassifier, shape: tuple[int, int, int]) -> Step:
    """That of training/train_classifier.py on noised ``c h w``, without the frozen autoencoder."""

    def loss(n: int) -> Tensor:
        return classifier(torch.empty(n, *shape), torch.empty(n)).logsumexp(1).mean()

    return Step({"classifier": classifier}, loss, ("classifier",))
