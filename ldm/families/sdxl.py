"""``sdxl``: Stable Diffusion XL, base and refiner (Podell et al. 2023).

    tokens = [tower 1 at its last hidden state but one, tower 2 at the same], side by side
    pooled = projection of tower 2
    time embedding of the U-Net += MLP([pooled, sinusoids of k numbers])

The k numbers say how the picture was cut: height and width of the original, rows and columns cut
off above and on the left, and height and width of the result (base, k = 6), or an aesthetic score
(refiner, k = 5). The refiner has the second tower alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ldm.config.schema import TrainConfig
from ldm.diffusion import Condition
from ldm.errors import ConfigError
from ldm.families.index import OF_IMAGEN, OF_SD, OF_SD3
from ldm.families.model import Family, Model, Tower
from ldm.families.unet import check_channels, described_unet, guidance_told, inpainting, stated
from ldm.models.control import side_inputs
from ldm.models.wrapped import bare

SCORE, LOW_SCORE = 6.0, 2.5
"""Aesthetic scores that a refiner is told, of the prompt and of the negative one, as in stock."""


class StableDiffusionXL(Family):
    """Two CLIP text towers, and a U-Net that is told how its picture was cut."""

    name = "sdxl"
    side_networks = {
        "controlnet": "StableDiffusionXLControlNetPipeline",
        "adapter": "StableDiffusionXLAdapterPipeline",
    }
    stock = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        *side_networks.values(),
    )
    towers = (
        Tower("text_encoder", "tokenizer", CLIPTextModel, -2, None),
        Tower(
            "text_encoder_2",
            "tokenizer_2",
            CLIPTextModelWithProjection,
            -2,
            "text_embeds",
        ),
    )
    zeros = pooled = skips = True
    encoded = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    offers = {"add_text_embeds": "pooled", "add_time_ids": "coordinates"}
    reads = UNet2DConditionModel

    def fits(self, parts: Mapping[str, Any]) -> bool:
        """There is a second text tower, or a U-Net that is told pooled text and numbers."""
        unet = parts.get("unet")
        told = stated(unet, "addition_embed_type") == "text_time"
        return unet is not None and (told or parts.get("text_encoder_2") is not None)

    def make(self, config: TrainConfig, model: Model) -> nn.Module:
        """A ``UNet2DConditionModel`` with ``addition_embed_type`` "text_time"."""
        shape = config.unet
        assert shape is not None
        told = 5 if shape.aesthetic_score else 6
        pooled = model.networks["text_encoder_2"].config.projection_dim
        return described_unet(
            config,
            model,
            _width(model),
            addition_embed_type="text_time",
            addition_time_embed_dim=shape.coordinate_dim,
            projection_class_embeddings_input_dim=pooled + told * shape.coordinate_dim,
        )

    def check(self, config: TrainConfig, model: Model, network: nn.Module) -> None:
        """Channels are those of the autoencoder, widths those of the text encoders."""
        check_channels(config, model, network)
        if network.config.cross_attention_dim != _width(model):
            raise ConfigError(
                f"the U-Net of {config.model} reads tokens of width"
                f" {network.config.cross_attention_dim}, the text encoders write {_width(model)}"
            )
        pooled = model.networks["text_encoder_2"].config.projection_dim
        rest = network.config.projection_class_embeddings_input_dim - pooled
        if rest not in (5 * (dim := network.config.addition_time_embed_dim), 6 * dim):
            raise ConfigError(
                f"the U-Net of {config.model} is not told a pooled text of width {pooled} beside 5"
                f" or 6 numbers of width {dim}: it is of another text_encoder_2"
            )

    def join(self, said: Sequence[Condition], networks: Mapping[str, Any]) -> Condition:
        """Tokens side by side; the pooled vector is that of the last tower."""
        tokens = torch.cat([cond.tokens for cond in said], -1)
        return Condition(tokens, said[-1].mask, said[-1].pooled)

    def call(
        self,
        network: nn.Module,
        x_t: Float[Tensor, "b c h w"],
        timestep: Shaped[Tensor, "..."],
        cond: Condition,
    ) -> Float[Tensor, "b y h w"]:
        """Tokens reach cross-attention, pooled text and numbers the embedding of the timestep."""
        x, told = inpainting(x_t, cond), guidance_told(network, x_t, cond)
        told |= self.arguments(network, cond)
        return network(x, timestep, **side_inputs(told, cond)).sample

    def arguments(self, network: nn.Module, cond: Condition) -> dict[str, Any]:
        """The tokens, the pooled text and the numbers."""
        assert cond.pooled is not None
        numbers = cond.extra["coordinates"].to(cond.pooled.dtype)
        if _scored(bare(network), cond.pooled.shape[-1]):
            scores = cond.extra.get("aesthetic_score")
            if scores is None:
                scores = numbers.new_full((len(numbers), 1), SCORE)
            numbers = torch.cat([numbers[:, :4], scores.to(numbers)], 1)
        added = {"text_embeds": cond.pooled, "time_ids": numbers}
        return {"encoder_hidden_states": cond.tokens, "added_cond_kwargs": added}

    def keys(self, model: Model) -> dict[str, Any]:
        """Whether it is a refiner, and what it is told where there is no text."""
        pooled = model.networks["text_encoder_2"].config.projection_dim
        return {
            "requires_aesthetics_score": _scored(bare(model.network), pooled),
            "force_zeros_for_empty_prompt": model.zeros,
        }

    def told(
        self,
        asked: dict[str, Any],
        keys: Mapping[str, Any],
        size: tuple[int, int],
        device: Any,
        scale: float,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``original_size``, ``crops_coords_top_left`` and ``target_size`` (height and width), of
        a refiner ``aesthetic_score``, each also as ``negative_...``: as in stock.
        """
        asked = dict(asked)
        pairs = ("original_size", "crops_coords_top_left", "target_size")
        own = dict(zip(pairs, (size, (0, 0), size), strict=True))
        given = {f"{no}{n}": asked.pop(f"{no}{n}", None) for no in ("", "negative_") for n in pairs}
        scores = {
            name: asked.pop(name, None) for name in ("aesthetic_score", "negative_aesthetic_score")
        }
        heard, _ = super().told(asked, keys, size, device, scale)
        for name, pair in given.items():
            if pair is not None and not _is_pair(pair):
                raise ValueError(f"{name} must be two numbers, height and width, not {pair!r}")
        told = {name: given[name] or own[name] for name in pairs}
        refines = keys["requires_aesthetics_score"]
        if not refines and (wrong := next((n for n, s in scores.items() if s is not None), None)):
            raise ValueError(f"{wrong}: this model is told no aesthetic score, a refiner is")
        no = {name: given[f"negative_{name}"] for name in pairs}
        if refines:
            against = {name: no[name] or told[name] for name in pairs}
            against["crops_coords_top_left"] = no["crops_coords_top_left"] or (0, 0)
        elif no["original_size"] is not None and no["target_size"] is not None:
            against = {name: no[name] or own[name] for name in pairs}
        else:
            against = told
        both = []
        for numbers, name, default in (
            (told, "aesthetic_score", SCORE),
            (against, "negative_aesthetic_score", LOW_SCORE),
        ):
            row = [float(value) for pair in pairs for value in numbers[pair]]
            extra = heard | {"coordinates": torch.tensor([row], device=device)}
            if refines:
                score = default if scores[name] is None else float(scores[name])
                extra["aesthetic_score"] = torch.tensor([[score]], device=device)
            both.append(extra)
        return both[0], both[1]

    def index(self, index: dict[str, Any]) -> dict[str, Any]:
        """That of ``StableDiffusionXLPipeline``, of ``StableDiffusionXLImg2ImgPipeline`` for a
        refiner, or of the kind with a network beside.
        """
        others = (*OF_SD, *OF_SD3, *OF_IMAGEN, "classes")
        kept = {key: value for key, value in index.items() if key not in others}
        if kept["requires_aesthetics_score"]:
            return kept | {"_class_name": self.stock[1]}
        del kept["requires_aesthetics_score"]
        beside = (cls for part, cls in self.side_networks.items() if part in kept)
        return kept | {"_class_name": next(beside, self.stock[0])}


def _width(model: Model) -> int:
    """Width of the tokens of all towers that there are."""
    towers = model.family.present(model.networks)
    return sum(model.networks[tower.part].config.hidden_size for tower in towers)


def _scored(unet: Any, pooled: int) -> bool:
    """Whether the U-Net is told an aesthetic score in place of the size of the result, beside a
    text of width ``pooled``.
    """
    told = unet.config.projection_class_embeddings_input_dim - pooled
    return told == 5 * unet.config.addition_time_embed_dim


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2
