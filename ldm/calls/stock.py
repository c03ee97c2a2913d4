"""What stock pipelines offer beside their call, by the names and in the order of
``StableDiffusionPipeline``: programs that prepare a call by themselves, as compel does, ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldm.calls.arguments import Pictures, refuse, tensor_inputs
from ldm.calls.components import Components
from ldm.calls.texts import Wording, alike
from ldm.calls.values import real, shown, texts, whole
from ldm.diffusion import Condition
from ldm.models.conditioner import silent
from ldm.models.wrapped import bare


class StockHelpers(Components):
    """Steps of a call that stock has methods for; a call of this library does not ask them."""

    _execution_device: Any

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along each side of a latent cell."""
        return self.codec.factor

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        **told: Any,
    ) -> tuple[Tensor | None, ...]:
        """What a call is told of its prompts: ``prompt_embeds`` and ``negative_prompt_embeds``, ``n
        l d``; of a family with pooled vectors these as well, in the order of its stock pipeline
        (``Drawing.encoded``). It needs no U-Net and no autoencoder.

        Args:
            prompt: one text or several.
            device: where the result is to be; None: where the pipeline computes.
            num_images_per_prompt: rows of every text, side by side.
            do_classifier_free_guidance: False: None in place of what is negative.
            negative_prompt: as in the call.
            prompt_embeds: in place of texts; they come back.
            negative_prompt_embeds: the same.
            lora_scale: how strong LoRAs are meanwhile.
            clip_skip: as in the call.
            told: ``prompt_2``, ``pooled_prompt_embeds``, ... of the family, and ``prompt_syntax``.

        Raises:
            ValueError: an argument is wrong; the message is one line.
        """
        family, network = self.family, bare(self.network)
        if not family.towers:
            raise ValueError("encode_prompt: this model reads no text")
        where = self._execution_device if device is None else _device(device)
        each = whole("num_images_per_prompt", num_images_per_prompt)
        syntax = told.pop("prompt_syntax", None)
        embeds = prompt_embeds, negative_prompt_embeds
        wording = Wording.taken(family, network, told, *embeds, clip_skip, syntax)
        for name in told:
            raise ValueError(f"{name} is no argument of encode_prompt of the family {family.name}")
        first, second = wording.texts(
            texts("prompt", prompt), texts("negative_prompt", negative_prompt)
        )
        pictures = Pictures.asked(first, second, each, None, None, None)
        every = slice(0, len(pictures.prompts))
        with self._scaled(1.0 if lora_scale is None else real("lora_scale", lora_scale)):
            said = self._texts(pictures, wording)
            cond, null = said.prompts(every), None
            if do_classifier_free_guidance:
                spoken = pictures.steered or not said.zeros
                null = alike(cond, said.negatives(every)) if spoken else silent(cond)
        dtype = self._text_dtype()
        found = {
            f"{no}{name}": None if value is None else value.to(where, dtype).repeat_interleave(
                each, 0
            )
            for no, one in (("", cond), ("negative_", null or Condition()))
            for name, value in (("prompt_embeds", one.tokens), ("pooled_prompt_embeds", one.pooled))
        }  # fmt: skip
        tokens = found["prompt_embeds"]
        assert tokens is not None
        found["text_ids"] = tokens.new_zeros(tokens.shape[1], 3)  # positions of Flux's text: none
        return tuple(found[name] for name in family.encoded)

    def _text_dtype(self) -> torch.dtype:
        """Of what reads the texts, else of what is told them, as in stock."""
        parts = [self.components.get(tower.part) for tower in self.family.towers]
        return next(part.dtype for part in (*parts, self.network) if part is not None)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: Any,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise as the scheduler begins with it, ``n c h w``: ``latents``, or a draw, times its
        ``init_noise_sigma``. A call takes noise before that factor.
        """
        unit = self.codec.factor
        sides = whole("height", height) // unit, whole("width", width) // unit
        shape = (whole("batch_size", batch_size), num_channels_latents, *sides)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} images")
        where = _device(device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=where, dtype=dtype)
        scale = getattr(vars(self)["scheduler"], "init_noise_sigma", 1.0)
        return latents.to(where) * scale

    def check_inputs(
        self,
        prompt: Any,
        height: int | None,
        width: int | None,
        callback_steps: int | None = None,
        negative_prompt: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    ) -> None:
        """``ValueError`` where a call with these arguments is refused; the message is one line."""
        del ip_adapter_image, ip_adapter_image_embeds  # whose pictures the call itself looks at
        refuse(callback_steps=callback_steps)
        unit = self.codec.factor * self.family.patch(self.network)
        for name, value in (("height", height), ("width", width)):
            side = whole(name, value, optional=True)
            if side is not None and (side < 1 or side % unit):
                raise ValueError(f"{name} must be a multiple of {unit} pixels, not {side}")
        tensor_inputs(print, callback_on_step_end_tensor_inputs or (), self._callback_tensor_inputs)
        embeds = prompt_embeds, negative_prompt_embeds
        if prompt is None and prompt_embeds is None and self.family.towers:
            raise ValueError("prompt must be a text or a list of texts, not None")
        wording = Wording.taken(self.family, bare(self.network), {}, *embeds)
        said = wording.texts(texts("prompt", prompt), texts("negative_prompt", negative_prompt))
        Pictures.asked(*said, 1, None, None, None)

    def run_safety_checker(
        self, image: Tensor, device: Any = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, list[bool] | None]:
        """``image``, pixels ``n 3 h w`` in [-1, 1], black where they must not be seen, and which
        these are; None without a safety checker.
        """
        return self._check_safety(image if device is None else image.to(_device(device)), dtype)


def _device(value: Any) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be a device, not {shown(value)}") from None
