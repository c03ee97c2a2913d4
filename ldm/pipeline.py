"""Text to image: x_0 = decode(sampler(guidance(denoiser), noise)).

Rombach et al. 2022, section 3; the components, the folder and the call are those of diffusers'
StableDiffusionPipeline, and on the same latents the pictures are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor
from transformers import CLIPTokenizer

from ldm.calls import arguments
from ldm.calls.arguments import Pictures
from ldm.calls.batches import Batches, walk
from ldm.calls.begin import Asked, begun
from ldm.calls.control import Control
from ldm.calls.passes import in_passes
from ldm.calls.running import Call, SeenFromCallbacks, running
from ldm.calls.savings import Savings
from ldm.calls.stock import StockHelpers
from ldm.calls.texts import Wording
from ldm.calls.values import checked
from ldm.diffusion import predictor, target_of
from ldm.families.index import OF_UNCLIP
from ldm.families.model import Model
from ldm.formats.hub import Published
from ldm.formats.loader import EmbeddingLoader, LoraLoader
from ldm.formats.pipeline_folder import merged, opened, save
from ldm.formats.side_networks import KINDS
from ldm.formats.single.loader import SingleFileLoader
from ldm.guidance import Guidance
from ldm.models.control import as_one
from ldm.models.wrapped import bare
from ldm.sampling import SamplingDefaults
from ldm.sampling.defaults import KEY, stated

_AS_STOCK = SamplingDefaults(num_inference_steps=50, guidance_scale=7.5)


class LatentDiffusionPipeline(
    SeenFromCallbacks, Published, StockHelpers, DiffusionPipeline, Savings,
    EmbeddingLoader, LoraLoader, SingleFileLoader,
):  # fmt: skip
    """A ``StableDiffusionPipeline`` on this library's denoiser, guidance and samplers; without an
    autoencoder and a text encoder, a ``DDPMPipeline`` or ``DDIMPipeline``.

    Folders go both ways: stock diffusers opens what this saves and this opens what stock saves. A
    call changes no state of the pipeline and runs a copy of the scheduler, so threads may share one
    pipeline; what a callback reads on it (``scheduler``, ``guidance_scale``, ...) and sets
    (``_interrupt``, ``_guidance_scale``) are those of its own call.

    Args:
        vae: the autoencoder; None: pictures are their own latents.
        text_encoder: the text tower; None: the prompts are names of ``classes``, or there are none.
        tokenizer: its tokenizer.
        unet: the denoiser, used as it is; None where it is a ``transformer``.
        scheduler: any diffusers scheduler; its config states the noise process and what the U-Net
            predicts.
        safety_checker: runs on every picture if given, as in stock.
        feature_extractor: of the safety checker, or of the picture tower.
        image_encoder: of IP-Adapters, or the picture tower of a model that is told embeddings.
        requires_safety_checker: written to the folder.
        classes: of a U-Net with labels, of which the last is that of no class.
        sampling: steps, guidance and sampler that suit the model, as ``model_index.json`` states
            them (``ldm.sampling.defaults``).
        text_encoder_2: the second text tower of a family that has two.
        tokenizer_2: its tokenizer.
        force_zeros_for_empty_prompt: of such a family: without a negative prompt there are zeros in
            its place, and not the encoding of "".
        requires_aesthetics_score: of a refiner.
        transformer: the denoiser of a family that has one in place of a U-Net.
        text_encoder_3: the third text tower of a family that has three.
        tokenizer_3: its tokenizer.
        image_noising_scheduler: states the noise of a picture that the network is told, or of its
            embedding.
        controlnet: a ``ControlNetModel`` beside the U-Net, or a list of them.
        adapter: a ``T2IAdapter``, or a list of them.
        image_normalizer: mean and standard deviation of embeddings.
        prior: the network that makes embeddings of texts, alone or before a ``unet``.
        prior_text_encoder: its text tower, before a ``unet``; so its tokenizer and scheduler.
    """

    model_cpu_offload_seq = (
        "prior_text_encoder->text_encoder->text_encoder_2->text_encoder_3->image_encoder->prior->"
        "unet->transformer->vae"
    )
    _optional_components = [
        "vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder",
        "text_encoder_2", "tokenizer_2", "unet", "transformer", "text_encoder_3",
        "tokenizer_3", "image_noising_scheduler", *KINDS, *OF_UNCLIP,
    ]  # fmt: skip
    _exclude_from_cpu_offload = ["safety_checker", "image_normalizer"]

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: Any,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel | UNet2DModel | None,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = False,
        classes: Sequence[str] | None = None,
        sampling: dict[str, Any] | None = None,
        text_encoder_2: Any = None, tokenizer_2: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        requires_aesthetics_score: bool = False,
        transformer: Any = None, text_encoder_3: Any = None, tokenizer_3: Any = None,
        image_noising_scheduler: Any = None, controlnet: Any = None, adapter: Any = None,
        image_normalizer: Any = None, prior: Any = None, prior_text_encoder: Any = None,
        prior_tokenizer: Any = None, prior_scheduler: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("a safety_checker needs a feature_extractor")
        # As stock does, for folders older than these two keys: latents must never be clipped to
        # [-1, 1].
        if vae is not None and getattr(scheduler.config, "steps_offset", 1) != 1:
            scheduler.register_to_config(steps_offset=1)
        if vae is not None and getattr(scheduler.config, "clip_sample", False):
            scheduler.register_to_config(clip_sample=False)
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
            safety_checker=safety_checker, feature_extractor=feature_extractor,
            image_encoder=image_encoder, text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2,
            transformer=transformer, text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
            image_noising_scheduler=image_noising_scheduler, controlnet=as_one(controlnet),
            adapter=as_one(adapter), image_normalizer=image_normalizer, prior=prior,
            prior_text_encoder=prior_text_encoder, prior_tokenizer=prior_tokenizer,
            prior_scheduler=prior_scheduler,
        )  # fmt: skip
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            requires_aesthetics_score=requires_aesthetics_score,
            classes=classes,
            sampling=stated({KEY: sampling or {}}),
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.codec.factor)

    @classmethod
    def of(cls, model: Model, scheduler: Any) -> LatentDiffusionPipeline:
        """The pipeline over the networks of ``model`` as they are, with ``scheduler``."""
        parts = {**model.networks, **model.tokenizers, **model.family.keys(model)}
        absent = {name: None for name in cls._optional_components if name not in parts}
        return cls(
            **parts, **absent, scheduler=scheduler, classes=model.classes, sampling=model.sampling,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> LatentDiffusionPipeline:
        """Opens a pipeline folder, or a whole model in one file; in float32 unless a ``dtype`` is
        passed, and from safetensors only.

        Stock loads the U-Net in float32 but the text encoder in the dtype it was saved in, and then
        crashes on the mixture. Pickled weights run code: ``use_safetensors=False`` allows them.

        Raises:
            OSError: there is no such folder, or a file of it is missing; the message is one line.
            ValueError: something in it is damaged, or larger than its weights; likewise.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        kwargs.setdefault("use_safetensors", True)
        return opened(super().from_pretrained, pretrained_model_name_or_path, kwargs)

    def to_json_string(self) -> str:
        """The text of ``model_index.json``, which names the stock class where there is one."""
        index = json.loads(super().to_json_string())
        sampling, rare = index.pop("sampling"), (*KINDS, *OF_UNCLIP)
        index = {k: v for k, v in index.items() if k not in rare or v[0] is not None}
        index = self.family.index(index) | ({KEY: sampling} if sampling else {})
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes the pipeline as a folder that ``StableDiffusionPipeline.from_pretrained`` opens
        without arguments.

        Beyond what diffusers does, the text encoder and the tokenizer are written so that older
        readers, A1111 and ComfyUI find them, a half-precision folder loads in float32 rather
        than in a mixture, and no config names the folder that a part was read from.

        A pipeline that is in the folder is replaced in one step, whatever its layout was; a kill
        leaves the old one or the new one. What else lies there stays. ``push_to_hub=True`` uploads
        the folder when it is complete, as ``repo_id``.

        Raises:
            ValueError: ``save_directory`` is a file, or adapters are loaded that are not in the
                weights; fused ones are, and the folder is that of the fused weights.
        """
        if kwargs.pop("push_to_hub", False):
            self.pushed(save_directory, kwargs)
            return
        if (plain := merged(self)) is not self:
            return plain.save_pretrained(save_directory, **kwargs)
        save(self, Path(save_directory), super().save_pretrained, kwargs)

    @torch.no_grad()
    @checked
    @in_passes
    def __call__(
        self,
        prompt: str | list[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        guidance: Guidance | None = None,
        prompt_syntax: str | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        feather: int | None = None,
        variation: tuple[Any, Any] | None = None,
        padding_mask_crop: int | None = None,  # taken by in_passes, as the next
        enlarge: float | tuple[Any, ...] | None = None,
        **told: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Draws ``len(prompt) * num_images_per_prompt`` pictures, the pictures of one prompt side
        by side.

        The arguments before ``sampler`` are those of ``StableDiffusionPipeline``, in its order.

        Args:
            prompt: one text or several; of a model of classes their names, of an unconditional
                model, and beside ``prompt_embeds``, nothing.
            height: pixels; by default that of ``image``, else the U-Net's ``sample_size``.
            width: pixels.
            num_inference_steps: steps of the sampler; by default those that the folder states, else
                50, as in stock.
            timesteps: of the scheduler, in place of a number of steps, where it takes them.
            sigmas: the same.
            guidance_scale: 1 or less is no guidance, at half the cost; by default what the folder
                states, else 7.5, as in stock. Families whose network is told it mean it so
                (``Family.guided``).
            negative_prompt: steered away from; one for all or one per prompt; by default "".
            num_images_per_prompt: pictures of every prompt.
            eta: of DDIM.
            generator: one draws the batch as stock does; of a list each draws one picture.
            latents: standard normal noise ``n c h w`` instead of a draw.
            prompt_embeds: tokens ``n l d`` in place of texts, as the model's text towers say them.
            negative_prompt_embeds: the same in place of negative prompts.
            ip_adapter_image: of every IP-Adapter that is loaded a picture, or a list of them.
            ip_adapter_image_embeds: the same as ``prepare_ip_adapter_image_embeds`` says it.
            output_type: ``pil``, ``np`` (n h w 3 in [0, 1]), ``pt`` (n 3 h w in [0, 1]) or
                ``latent``, in the dtype of the U-Net.
            return_dict: False returns (images, nsfw flags or None).
            cross_attention_kwargs: ``{"scale": s}``: LoRAs are s times as strong during this call.
            guidance_rescale: see ``ClassifierFree``.
            clip_skip: layers before the usual one that CLIP towers are read at, for the prompts.
            callback_on_step_end: called with (pipeline, number of the evaluation, timestep,
                {"latents": ...}) after every evaluation; a dict that it returns may replace the
                latents and ``prompt_embeds``, those of the negative prompts first where there is
                guidance. Once per batch if there are several. It may stop the call by
                ``pipe._interrupt = True``: what has been drawn so far is returned.
            callback_on_step_end_tensor_inputs: of ``latents``, ``prompt_embeds`` and
                ``negative_prompt_embeds``, in the dtype of the U-Net; changing the last does
                nothing, as in stock.
            sampler: a name that ``ldm.sampling.sampler`` knows; by default ``self.scheduler``, and
                ``ode-heun`` where the process is not variance preserving.
            seed: picture i is drawn from seed + i (or from seed[i]) and does not depend on
                ``batch_size``.
            batch_size: pictures at a time; by default all. A single ``generator`` draws all initial
                noise at once, but the noise of a stochastic sampler batch by batch.
            guidance: in place of ``ClassifierFree(guidance_scale, guidance_rescale)``, which a
                ``Chain`` may hold; what it says of each picture is for all of one batch.
            prompt_syntax: "a1111" reads ``(word:1.3)``, ``[word]`` and ``BREAK`` in all texts, and
                what is longer than a text tower (``ldm.prompts``); by default brackets are text.
            denoising_start: share of the noise that is gone from ``image`` already (a refiner).
            denoising_end: share that is gone at the end (the base before a refiner); what is drawn
                with ``output_type="latent"`` is then the ``image`` of the rest.
            image: a picture to set out from, or one a prompt, or one for each: PIL, arrays ``h w
                3``, tensors ``3 h w`` in [0, 1], or latents ``n c h w``; with ``denoising_start``
                latents to go on from; of a model that enlarges pictures what it enlarges, numbers
                of arrays and tensors in [-1, 1]; of one that is told embeddings what is varied.
            mask_image: likewise; what is white is drawn, the rest of ``image`` stays as it is.
            strength: share of the steps that is taken from ``image``, of stock's count: at 0 the
                autoencoder's reconstruction, at 1 drawn without it; by default 0.75, or with a mask
                1.
            feather: pixels outside the mask on which what is drawn fades into ``image``; by default
                the side of a latent cell.
            variation: (seed, strength), each also one a picture: noise between that of ``seed`` and
                that of another seed, which it is at 1.
            padding_mask_crop: draw the part of ``image`` around the mask alone, with so many pixels
                around it, at ``height`` and ``width`` (by default the model's own size), and put it
                back at its size: for small things in photographs. PIL images.
            enlarge: draw in two passes: a scale, or (scale, strength, "latent" or "pixel"); what is
                drawn at ``height`` and ``width`` is made so many times larger, and drawn again from
                there with that strength, 0.6 by default.
            told: what the family of the model is told beside these, as its stock pipeline calls it:
                ``prompt_2``, ``negative_prompt_2``, ``pooled_prompt_embeds``,
                ``negative_pooled_prompt_embeds``, ``original_size``, ``image_embeds``,
                ``max_sequence_length`` (tokens of a T5), ...; and a ControlNet ``control_image``,
                a hint as ``image`` may be, and how it speaks: ``controlnet_conditioning_scale``,
                ``control_guidance_start`` and ``..._end``, ``guess_mode``; of several a list.
                T2I-Adapters: ``adapter_image``, ``adapter_conditioning_scale``, ``..._factor``.

        Raises:
            ValueError: an argument is wrong, or what was drawn is not finite; the message is one
                line.
        """
        arguments.refuse(
            callback=told.pop("callback", None),  # of stock's earlier versions
            callback_steps=told.pop("callback_steps", None),
        )
        adapters = arguments.strength(cross_attention_kwargs, told)
        how = _AS_STOCK.but(**self.family.drawing).but(**self.config.sampling)
        how = how.but(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        family, network, dtype = self.family, bare(self.network), self.network.dtype
        form = arguments.output_type(output_type)
        wording = Wording.taken(
            family, network, told, prompt_embeds, negative_prompt_embeds, clip_skip, prompt_syntax
        )
        prompt, negative_prompt = wording.texts(prompt, negative_prompt)
        pictures = Pictures.asked(
            prompt, negative_prompt, num_images_per_prompt, generator, seed, batch_size, variation
        )
        named = arguments.tensor_inputs(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        heard = family.hears(network)
        scale = family.guided(how.guidance_scale, told, negative=pictures.steered, heard=heard)
        call = Call(
            self, scale if self.reads != () else 1.0, guidance_rescale, guidance,
            callback_on_step_end, named, dtype, family.offers,
        )  # fmt: skip
        stepper, codec, device = self._stepper(sampler, eta), self.codec, self._execution_device
        control = Control.taken(call, told, ip_adapter_image, ip_adapter_image_embeds)
        denoiser = call.watched(self._denoiser(dtype, partial(control.strength, call)), network)
        batches = Batches(
            call, pictures, self._texts(pictures, wording), codec,
            predictor(denoiser, target_of(self._own_scheduler.config)),
            self._clip(stepper if sampler is None else None), device,
        )  # fmt: skip
        with running(call), self._scaled(adapters):
            edit = image, mask_image, strength, feather
            span = denoising_start, denoising_end
            asked = Asked(height, width, latents, *edit, *span, told, control)
            begin = begun(pictures, family, self.components, codec, device, asked)
            stepper = stepper.seen_at(family.tokens(network, begin.noise))
            how_many = how.num_inference_steps, timesteps, sigmas
            taken = partial(begin.edit.taken, family.taken)
            steps = walk(call, stepper, device, *how_many, begin.shares, family.spaced, taken)
            hears = how.guidance_scale if heard else None
            said = family.told(told, self.config, codec.size(begin.noise), device, hears)
            batches.told = control.told(*said)
            total = call.num_timesteps * len(pictures.batches())
            with self.progress_bar(total=total) as bar:
                whole = batches.draw(begin, steps, bar, latent=form == "latent")
        images, flagged = self._finished(whole, form)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)
