"""The optimiser step of each program as ``ldm.tasks.estimate`` traces it: the same networks on
the same shapes, without data.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel

from ldm.config.schema import AutoencoderConfig, TrainConfig
from ldm.diffusion import Condition
from ldm.engine.precision import device_at_hand
from ldm.families import reads
from ldm.families.adapt import learn
from ldm.families.model import Model, Tower
from ldm.families.noise import process_and_objective
from ldm.models.attention import set_attention
from ldm.models.classifier import NoisyClassifier
from ldm.models.codec import VaeCodec
from ldm.models.conditioner import said
from ldm.models.textual_inversion import Embedding
from ldm.tasks.estimate import Step

_FLOAT = 4  # bytes


def text_to_image(config: TrainConfig, model: Model) -> Step:
    """That of training/train.py, for pictures of ``images.size`` squared."""
    # Those of a cached set are shapes alone in a run too.
    family, word, side = model.family, config.textual_inversion, config.images.size
    networks = {family.network: model.network} if model.stored else model.networks
    if word is not None:
        for part in reads.learns(config, model):
            known = model.networks[part].get_input_embeddings()
            rows = torch.empty(word.vectors, known.embedding_dim, device="meta")
            new = Embedding(known, known.num_embeddings, rows)
            model.networks[part].set_input_embeddings(new)
    learn(model, config)
    for part in reads.learns(config, model):
        model.networks[part].train()  # which checkpointing asks for
    bfloat16 = config.precision == "bfloat16"
    here = "sdpa" if config.attention == "xformers" else config.attention  # which needs a GPU
    set_attention(model.network, here, device_at_hand(), bfloat16=bfloat16)
    _, objective = process_and_objective(config)
    denoiser, codec, latent = model.denoiser, model.codec, model.codec.shape(side, side)
    encoded = config.cache_latents and config.images.deterministic and codec.network is not None
    towers = family.present(model.networks)
    learning = reads.learns(config, model)
    kept = [config.cache_text and tower.part not in learning for tower in towers]
    if model.stored:
        encoded, kept = True, [True] * len(towers)

    def of_tower(tower: Tower, n: int) -> Condition:
        network = model.networks[tower.part]
        ids = torch.empty(n, network.config.max_position_embeddings, dtype=torch.int64)
        return said(
            network, ids, torch.empty_like(ids, dtype=torch.bool), tower.layer, tower.pooled
        )

    with torch.device("meta"), torch.no_grad():
        rows_of = [of_tower(tower, 1) for tower in towers]

    def condition(n: int) -> Condition:
        if not towers:
            return Condition(extra={"label": torch.empty(n, dtype=torch.int64)})
        every = []
        for tower, cached, row in zip(towers, kept, rows_of, strict=True):
            if cached:
                every.append(row.map(lambda x: torch.empty(n, *x.shape[1:], dtype=x.dtype)))
            elif tower.part in learning:
                every.append(of_tower(tower, n))
            else:
                with torch.no_grad(), torch.autocast("cpu", enabled=False):  # they are in float32
                    every.append(of_tower(tower, n))
        cond = family.join(every)
        coordinates = torch.empty(n, 6, dtype=torch.int64)
        return replace(cond, extra=cond.extra | {"coordinates": coordinates})

    def loss(n: int) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            pixels = () if encoded else torch.empty(n, 3, side, side)
            z = torch.empty(n, *latent) if encoded else codec.encode(pixels).mean
        u, eps = torch.empty(n, dtype=torch.float64), torch.empty_like(z)
        return objective(model.process, denoiser, z, condition(n), u=u, eps=eps).loss.mean()

    picture = 2 * _FLOAT * math.prod(latent)  # mean and log-variance
    stored = (row.tensors().values() for row, k in zip(rows_of, kept, strict=True) if k)
    caption = sum(x.nbytes for tensors in stored for x in tensors)
    return Step(
        networks,
        loss,
        None if config.lora or word else tuple(networks),
        (0, 0) if model.stored else (picture * encoded, caption),
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
