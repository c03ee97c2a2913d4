"""Text to image: x_0 = decode(sampler(guidance(denoiser), noise)).

Rombach et al. 2022, section 3; the components, the folder and the call are those of diffusers'
StableDiffusionPipeline, and on the same latents the pictures are the same.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.calls.values import checked
from ldm.diffusion import Condition, Denoiser, predictor, target_of
from ldm.guidance import Chain, ClassifierFree, Guidance, Threshold
from ldm.interop.loader import EmbeddingLoader, LoraLoader
from ldm.interop.pipeline_folder import opened, save
from ldm.interop.stock import stock_index
from ldm.models.codec import codec_of
from ldm.models.conditioner import ClipConditioner
from ldm.models.denoiser import UNetDenoiser
from ldm.models.labels import LabelConditioner
from ldm.models.lora import adapted, fused
from ldm.sampling import SchedulerSampler, own_sampler
from ldm.sampling import sampler as named_sampler

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_SEEDS = 2**32  # torch's CPU generator keeps no more of a seed than this


class LatentDiffusionPipeline(DiffusionPipeline, EmbeddingLoader, LoraLoader):
    """A ``StableDiffusionPipeline`` on this library's denoiser, guidance and samplers; without an
    autoencoder and a text encoder, a ``DDPMPipeline`` or ``DDIMPipeline``.

    Folders go both ways: stock diffusers opens what this saves and this opens what stock saves. A
    call changes no state of the pipeline and builds its own scheduler, so threads may share one
    pipeline.

    Args:
        vae: the autoencoder; None: pictures are their own latents.
        text_encoder: the text tower; None: the prompts are names of ``classes``, or there are none.
        tokenizer: its tokenizer.
        unet: the denoiser, used as it is.
        scheduler: any diffusers scheduler; its config states the noise process and what the U-Net
            predicts.
        safety_checker: runs on every picture if given, as in stock.
        feature_extractor: of the safety checker.
        image_encoder: kept for the folder's sake, not used.
        requires_safety_checker: written to the folder.
        classes: of a U-Net with labels, of which the last is that of no class.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = [
        "vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder",
    ]  # fmt: skip
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel | UNet2DModel,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
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
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker, classes=classes)
        self.image_processor = VaeImageProcessor(vae_scale_factor=codec_of(vae).factor)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> LatentDiffusionPipeline:
        """Opens a pipeline folder; in float32 unless a ``dtype`` is passed, and from safetensors
        only.

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
        index = stock_index(json.loads(super().to_json_string()))
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes the pipeline as a folder that ``StableDiffusionPipeline.from_pretrained`` opens
        without arguments.

        Beyond what diffusers does, the text encoder and the tokenizer are written so that older
        readers, A1111 and ComfyUI find them, a half-precision folder loads in float32 rather
        than in a mixture, and no config names the folder that a part was read from.

        A pipeline that is in the folder is replaced in one step, whatever its layout was; a kill
        leaves the old one or the new one. What else lies there stays.

        Raises:
            ValueError: ``save_directory`` is a file, or adapters are loaded that are not in the
                weights; fused ones are, and the folder is that of the fused weights.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub would upload before the folder is complete: save first, then upload it"
            )
        loaded = {name: getattr(self, name) for name in self._lora_loadable_modules}
        loaded = {name: network for name, network in loaded.items() if network and adapted(network)}
        if not all(fused(network) for network in loaded.values()):
            raise ValueError(
                "a pipeline folder has no place for adapters: call fuse_lora() to save with them in"
                " the weights, or unload_lora_weights() to save without"
            )
        if loaded:
            plain = type(self)(**{**self.components, **copy.deepcopy(loaded)})
            plain.register_to_config(requires_safety_checker=self.config.requires_safety_checker)
            plain.unload_lora_weights()
            return plain.save_pretrained(save_directory, **kwargs)
        save(self, Path(save_directory), super().save_pretrained, kwargs)

    @torch.no_grad()
    @checked
    def __call__(
        self,
        prompt: str | list[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_rescale: float = 0.0,
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        eta: float = 0.0,
        batch_size: int | None = None,
        guidance: Guidance | None = None,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Draws ``len(prompt) * num_images_per_prompt`` pictures, the pictures of one prompt side
        by side.

        Args:
            prompt: one text or several; of a model of classes their names, of an unconditional
                model nothing.
            height: pixels; by default the U-Net's ``sample_size``.
            width: pixels.
            num_inference_steps: steps of the sampler.
            guidance_scale: 1 or less is no guidance, at half the cost.
            negative_prompt: steered away from; one for all or one per prompt; by default "".
            num_images_per_prompt: pictures of every prompt.
            generator: one draws the batch as stock does; of a list each draws one picture.
            latents: standard normal noise ``n c h w`` instead of a draw.
            output_type: ``pil``, ``np`` (n h w 3 in [0, 1]), ``pt`` (n 3 h w in [0, 1]) or
                ``latent``.
            return_dict: False returns (images, nsfw flags or None).
            callback_on_step_end: called with (pipeline, number of the evaluation, timestep,
                {"latents": ...}) after every evaluation; a dict that it returns may replace the
                latents. Once per batch if there are several.
            callback_on_step_end_tensor_inputs: ``["latents"]`` or nothing.
            guidance_rescale: see ``ClassifierFree``.
            sampler: a name that ``ldm.sampling.sampler`` knows; by default ``self.scheduler``, and
                ``ode-heun`` where the process is not variance preserving.
            seed: picture i is drawn from seed + i (or from seed[i]) and does not depend on
                ``batch_size``.
            eta: of DDIM.
            batch_size: pictures at a time; by default all. A single ``generator`` draws all initial
                noise at once, but the noise of a stochastic sampler batch by batch.
            guidance: in place of ``ClassifierFree(guidance_scale, guidance_rescale)``, which a
                ``Chain`` may hold; what it says of each picture is for all of one batch.

        Raises:
            ValueError: an argument is wrong; the message is one line.

        """
        if callback_on_step_end is not None and not set(callback_on_step_end_tensor_inputs) <= {
            "latents"
        }:
            wrong = sorted(set(callback_on_step_end_tensor_inputs) - {"latents"})
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: only 'latents' can be passed, not {wrong}"
            )
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(
                f"output_type must be one of {', '.join(_OUTPUT_TYPES)}, not {output_type!r}"
            )
        if self.unet.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "a U-Net with an embedded guidance scale (time_cond_proj_dim) is not supported"
            )
        prompts = _texts("prompt", prompt)
        negatives = _texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        if len(negatives) not in (1, len(prompts)):
            raise ValueError(
                f"negative_prompt has {len(negatives)} texts for {len(prompts)} prompts"
            )
        if len(negatives) == 1:
            negatives = negatives * len(prompts)
        for name, value in (
            ("num_images_per_prompt", num_images_per_prompt),
            ("batch_size", batch_size),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        count = len(prompts) * num_images_per_prompt
        generators = _generators(generator, seed, count)
        stepper = (
            own_sampler(self.scheduler, eta)
            if sampler is None
            else named_sampler(sampler, self.scheduler.config, eta)
        )

        device = self._execution_device
        noise = self._noise(count, height, width, latents, generators, device)
        if self.text_encoder is not None:
            conditioner = ClipConditioner(self.tokenizer, self.text_encoder)
        else:
            conditioner = LabelConditioner(self.config.classes or ())
            if not conditioner.names and any(prompts + negatives):
                text = "".join(prompts + negatives)
                raise ValueError(f"this model is unconditional: it reads no prompt, {text!r}")
            guidance_scale = guidance_scale if conditioner.names else 1.0
        codec = codec_of(self.vae)
        predict = predictor(self._denoiser(), target_of(self.scheduler.config))
        guide = guidance or ClassifierFree(guidance_scale, guidance_rescale)
        bare = guidance is None and guidance_scale <= 1
        own = sampler is None and isinstance(stepper, SchedulerSampler)  # which clips by itself
        if self.vae is None and not own and (clip := Threshold.of(self.scheduler.config)):
            guide, bare = Chain((clip,) if bare else (guide, clip)), False
        evaluations = stepper.evaluations(num_inference_steps)
        pictures: list[Tensor] = []
        size = batch_size or count
        batches = [slice(n, min(n + size, count)) for n in range(0, count, size)]
        with self.progress_bar(total=evaluations * len(batches)) as bar:

            def after(index: int, timestep: Tensor, latent: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                tensors = {"latents": latent} if callback_on_step_end_tensor_inputs else {}
                return (callback_on_step_end(self, index, timestep, tensors) or {}).get("latents")

            for part in batches:

                def encode(texts: list[str], part: slice = part) -> Condition:
                    first = part.start // num_images_per_prompt
                    last = (part.stop - 1) // num_images_per_prompt
                    skip = part.start - first * num_images_per_prompt
                    cond = conditioner.encode(texts[first : last + 1]).to(device, self.unet.dtype)
                    end = skip + part.stop - part.start
                    return cond.map(
                        lambda x: x.repeat_interleave(num_images_per_prompt, 0)[skip:end]
                    )

                guided = predict if bare else guide(predict, encode(negatives))
                latent = stepper(
                    guided,
                    noise[part],
                    encode(prompts),
                    steps=num_inference_steps,
                    generators=generators[part] if isinstance(generators, list) else generators,
                    callback=after,
                )
                pictures.append(latent if output_type == "latent" else codec.decode(latent).float())
        whole = torch.cat(pictures)
        flagged = None
        if output_type != "latent":
            whole, flagged = self._check_safety(whole)
        shown = [True] * count if flagged is None else [not flag for flag in flagged]
        images = self.image_processor.postprocess(
            whole, output_type=output_type, do_denormalize=shown
        )
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    def _denoiser(self) -> Denoiser:
        network, dtype = UNetDenoiser(self.unet), self.unet.dtype

        def denoise(x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
            # Only the network computes in its own dtype: guidance and the scheduler's maths stay in
            # float32.
            return network(x_t.to(dtype), timestep, cond).float()

        return denoise

    def _noise(
        self,
        count: int,
        height: int | None,
        width: int | None,
        latents: Tensor | None,
        generators: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> Tensor:
        codec, side = codec_of(self.vae), self.unet.config.sample_size
        rows, columns = (side, side) if isinstance(side, int) else side
        if latents is not None and latents.ndim == 4:
            rows, columns = latents.shape[2:]
        sizes: list[int] = []
        for name, pixels, cells in (("height", height, rows), ("width", width, columns)):
            if pixels is not None and (pixels < 1 or pixels % codec.factor):
                raise ValueError(
                    f"{name} must be a multiple of {codec.factor} pixels, not {pixels}"
                )
            sizes.append(cells if pixels is None else pixels // codec.factor)
        shape = (count, self.unet.config.in_channels, *sizes)
        if latents is None:
            return randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, not {shape}")
        return latents.to(device, torch.float32)

    def _check_safety(self, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
        if self.safety_checker is None:
            return pixels, None
        pictures = self.image_processor.postprocess(pixels, output_type="pil")
        features = self.feature_extractor(pictures, return_tensors="pt").to(pixels.device)
        return self.safety_checker(
            images=pixels, clip_input=features.pixel_values.to(self.unet.dtype)
        )


def _texts(name: str, texts: str | list[str]) -> list[str]:
    many = [texts] if isinstance(texts, str) else texts
    if not isinstance(many, list) or not many or not all(isinstance(text, str) for text in many):
        raise ValueError(f"{name} must be a text or a list of texts, not {texts!r}")
    return many


def _generators(
    generator: torch.Generator | list[torch.Generator] | None,
    seed: int | Sequence[int] | None,
    count: int,
) -> torch.Generator | list[torch.Generator] | None:
    if seed is None:
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images")
        return generator
    if generator is not None:
        raise ValueError("pass either generator or seed, not both")
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} images")
    if not all(0 <= one < _SEEDS for one in seeds):
        raise ValueError(f"seeds must lie in 0..2^32 - 1, not {seed}")
    return [torch.Generator().manual_seed(one) for one in seeds]
