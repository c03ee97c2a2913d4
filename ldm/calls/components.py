"""What the components of a pipeline are to each other: codec, conditioner, denoiser and sampler."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor

from ldm.calls.arguments import TENSORS, Pictures
from ldm.calls.texts import Texts, Wording
from ldm.diffusion import Condition, Denoiser
from ldm.families import Family, FamilyDenoiser, family_of
from ldm.guidance import Threshold
from ldm.models.codec import Codec
from ldm.models.compiled import compile_blocks
from ldm.models.conditioner import Conditioner
from ldm.models.control import Strength
from ldm.models.lora import scaled
from ldm.sampling import (
    Sampler,
    SamplingDefaults,
    SchedulerSampler,
    default_sampler,
    own_sampler,
)
from ldm.sampling import sampler as named_sampler

_KEYS: dict[type, tuple[list[str], list[str]]] = {}  # of components, and of other arguments


class Components:
    """The networks of a pipeline by what they do, whatever family they are of."""

    components: dict[str, Any]
    _execution_device: torch.device
    config: Any
    image_processor: Any
    _asked_through: Callable[[Denoiser], Denoiser] | None = None

    def asking(self, through: Callable[[Denoiser], Denoiser]) -> Self:
        """The same pipeline over the same components, whose calls ask ``through(denoiser)`` in
        place of the denoiser: who evaluates the network, when, and together with what.
        """
        view = copy.copy(self)
        view._asked_through = through
        return view

    @classmethod
    def _get_signature_keys(cls, obj: Any) -> tuple[list[str], list[str]]:
        """Stock's, once for each class: it is asked for whenever ``components`` is."""
        kind = obj if isinstance(obj, type) else type(obj)
        if kind not in _KEYS:
            _KEYS[kind] = super()._get_signature_keys(kind)  # type: ignore[misc]
        modules, others = _KEYS[kind]
        return [*modules], [*others]

    @property
    def family(self) -> Family:
        """The family of the model."""
        return family_of(self.components)

    @property
    def network(self) -> Any:
        """The network that predicts."""
        return getattr(self, self.family.network)

    def compile(self) -> int:
        """Compiles the residual and transformer blocks of the network that predicts, in place, each
        when it is first called with a shape (``torch.compile``, regional); returns how many they
        are. Names and what is saved do not change; results do, by rounding.
        """
        return compile_blocks(self.network)

    @property
    def codec(self) -> Codec:
        """What makes latents of pictures, and pictures of latents."""
        return self.family.codec(self.components)

    @property
    def conditioner(self) -> Conditioner:
        """What makes conditions of prompts."""
        return self._reading(None)

    def _reading(self, length: int | None) -> Conditioner:
        """What makes conditions of prompts whose tokens of a T5 are so many, where that is said."""
        parts, zeros = self.components, self.config.force_zeros_for_empty_prompt
        classes = self.config.classes
        return self.family.conditioner(parts, parts, classes, zeros=zeros, length=length)

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """How the command line, validations and evaluations draw where nothing else is asked for:
        as the folder states, else as its family's stock pipeline does where that has ways of its
        own, else in 30 steps of ``default_sampler`` at a guidance of 7.5.
        """
        named = default_sampler(self._own_scheduler.config)
        usual = SamplingDefaults(sampler=named).but(**self.family.drawing)
        return usual.but(**self.config.sampling)

    @property
    def reads(self) -> Sequence[str] | None:
        """Names of classes that are its prompts, () of an unconditional model; None: any text."""
        return None if self.family.towers else self.config.classes or ()

    @property
    def _callback_tensor_inputs(self) -> list[str]:
        """What a callback may be handed."""
        return [*TENSORS, *self.family.offers] if self.reads is None else [*TENSORS[:1]]

    @property
    def _own_scheduler(self) -> Any:
        """Not that of a call from whose callback this is asked."""
        return vars(self)["scheduler"]

    def _stepper(self, sampler: str | None, eta: float) -> Sampler:
        if sampler is None:
            return own_sampler(self._own_scheduler, eta)
        return named_sampler(sampler, self._own_scheduler.config, eta)

    def _clip(self, own: Sampler | None) -> Threshold | None:
        """What keeps pixels within bounds, where it is not the model's ``own`` scheduler."""
        if self.codec.network is not None or isinstance(own, SchedulerSampler):
            return None
        return Threshold.of(self._own_scheduler.config)

    def _texts(self, pictures: Pictures, wording: Wording) -> Texts:
        """What ``pictures`` are told; ``ValueError`` where there are texts that nothing reads."""
        text = "".join(pictures.prompts + pictures.negatives)
        if text and self.reads == ():
            raise ValueError(f"this model is unconditional: it reads no prompt, {text!r}")
        said = self._reading(wording.length)
        return Texts(said, wording, pictures.prompts, pictures.negatives)

    def _scaled(self, strength: float) -> AbstractContextManager[None]:
        """Inside, LoRAs are ``strength`` times as strong."""
        networks = [self.components.get(name) for name in self.family.adaptable]
        return scaled([network for network in networks if network is not None], strength)

    @torch.no_grad()
    def embed(self, image: Any) -> Tensor:
        """Embeddings ``n d`` of PIL pictures, float32: ``image_embeds`` of a call, where the model
        is told them.

        Raises:
            ValueError: it is not, or these are no pictures.
        """
        return self.family.embedded(self.components, image, self._execution_device)

    @torch.no_grad()
    def embed_text(self, prompt: str | list[str]) -> Tensor:
        """Embeddings ``n d`` of texts by the prior's CLIP, in the space of those of pictures.

        Raises:
            ValueError: the model has no prior.
        """
        texts = [prompt] if isinstance(prompt, str) else prompt
        return self.family.text_embedded(self.components, texts, self._execution_device)

    @property
    def denoiser(self) -> Denoiser:
        """The network, which alone computes in its own dtype: guidance and the scheduler's maths
        stay in float32.
        """
        return self._denoiser(self.network.dtype, Strength)

    def _denoiser(self, dtype: torch.dtype, strength: Callable[[], Strength]) -> Denoiser:
        """The same with ControlNets, where there are some and hints for them; the dtype of whose
        network is known: to ask goes through all of it.
        """
        beside = self.components.get("controlnet")
        network = FamilyDenoiser(self.family, self.network, beside, strength)

        def denoise(x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
            return network(x_t.to(dtype), timestep, cond).float()

        return denoise if self._asked_through is None else self._asked_through(denoise)

    def _finished(self, whole: Tensor, form: str) -> tuple[Any, list[bool] | None]:
        """Pictures of pixels, or latents, ``whole``, in their ``form``, those black that must not
        be seen; and which these are, if that is asked. Embeddings are as they are.
        """
        flagged = None
        if self.family.embeds:
            return whole, flagged
        if form != "latent":
            whole, flagged = self._check_safety(whole)
        shown = [True] * len(whole) if flagged is None else [not flag for flag in flagged]
        made = self.image_processor.postprocess(whole, output_type=form, do_denormalize=shown)
        return made, flagged

    def _check_safety(
        self, pixels: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, list[bool] | None]:
        checker = self.components.get("safety_checker")
        if checker is None:
            return pixels, None
        pictures = self.image_processor.postprocess(pixels, output_type="pil")
        extractor = self.components["feature_extractor"]
        features = extractor(pictures, return_tensors="pt").to(pixels.device)
        dtype = self.network.dtype if dtype is None else dtype
        return checker(images=pixels, clip_input=features.pixel_values.to(dtype))
