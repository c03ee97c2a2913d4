"""What a call of the pipeline asks of a family of models, by the names of its stock pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.guidance.told import SCALE
from ldm.models.aside import Drawn
from ldm.models.wrapped import bare


class Drawing:
    """How a family draws: what its network is told, and where a call sets out."""

    name: ClassVar[str]

    drawing: ClassVar[Mapping[str, Any]] = {}
    """How its stock pipeline draws where nothing else is asked for, by arguments of
    ``SamplingDefaults``; {}: as Stable Diffusion's does."""

    longest: ClassVar[int | None] = None
    """Tokens of its T5 that a call asks for at most (``max_sequence_length``); None: it has no such
    argument."""
    encoded: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")
    """What ``encode_prompt`` of its stock pipeline returns."""

    offers: ClassVar[Mapping[str, str]] = {}
    """What a callback may be handed beside latents and tokens, by stock's names: ``pooled``, or an
    entry of ``Condition.extra``."""

    def taken(self, steps: int, strength: float) -> int:
        """How many of so many steps its stock pipeline takes from a picture: ``steps *
        strength``, rounded down.
        """
        return int(steps * strength)

    def spaced(self, steps: int) -> list[float] | None:
        """Sigmas, before they are shifted, of so many steps of a flow's scheduler where the stock
        pipeline has its own; None: those of the scheduler.
        """
        return None

    def hears(self, network: nn.Module) -> bool:
        """Whether ``network`` is told the scale of guidance, as one distilled from a guided one."""
        return bare(network).config.get("time_cond_proj_dim") is not None

    def guided(self, scale: float, asked: dict[str, Any], *, negative: bool, heard: bool) -> float:
        """The scale of classifier-free guidance of a call whose ``guidance_scale`` is ``scale``.

        Args:
            scale: which may also be what the network is told (``told``).
            asked: further arguments of the call, without those that this one takes away.
            negative: whether there are negative prompts.
            heard: whether the network ``hears`` it.

        Raises:
            ValueError: it is no scale, or there is nothing to steer away from.
        """
        if heard and negative:
            raise ValueError(
                "negative_prompt: this network is told its guidance and steers away from no text:"
                " leave it out"
            )
        return 1.0 if heard else scale

    def told(
        self,
        asked: dict[str, Any],
        keys: Mapping[str, Any],
        size: tuple[int, int],
        device: Any,
        scale: float | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the network is told beside the texts of a drawing, and beside negative prompts.

        Args:
            asked: further arguments of the call, by the names that the stock pipeline has for them.
            keys: of ``model_index.json``.
            size: height and width of the pictures, in pixels.
            device: where the network is.
            scale: ``guidance_scale`` of the call; None: the network does not hear it.

        Raises:
            ValueError: it cannot be told this.
        """
        for name in asked:
            raise ValueError(f"{name} is no argument of a model of the family {self.name}")
        if scale is None:
            return {}, {}
        told = {SCALE: torch.tensor([scale], dtype=torch.float64, device=device)}
        return told, told

    before: ClassVar[bool] = False
    """Whether its stock pipeline draws the noise of what is ``beside`` before that of latents."""

    embeds: ClassVar[bool] = False
    """Whether it draws embeddings, ``n d``, and no pictures."""

    def shown(self, network: nn.Module) -> bool:
        """Whether ``image`` of a call is something that ``network`` is told, and nothing to set out
        from.
        """
        return False

    def enlarges(self, network: nn.Module) -> bool:
        """Whether ``network`` enlarges the picture that it is told."""
        return False

    def unsaid(self, beside: dict[str, Tensor]) -> dict[str, Tensor]:
        """What guidance steers away from in place of ``beside``: the same."""
        return beside

    def embedded(self, parts: Mapping[str, Any], pictures: Any, device: Any) -> Tensor:
        """Embeddings ``n d`` of pictures, as ``image_embeds`` of a call.

        Raises:
            ValueError: its models know none, or these are no pictures.
        """
        raise ValueError(f"a model of the family {self.name} knows no embeddings")

    def text_embedded(self, parts: Mapping[str, Any], texts: list[str], device: Any) -> Tensor:
        """Embeddings ``n d`` of texts, in the space of those of pictures.

        Raises:
            ValueError: its models know none.
        """
        raise ValueError(f"a model of the family {self.name} knows no embeddings of texts")

    def beside(
        self,
        asked: dict[str, Any],
        parts: Mapping[str, Any],
        pictures: Drawn,
        size: tuple[int, int],
        device: Any,
    ) -> dict[str, Tensor]:
        """What the network is told of the pictures themselves in a drawing, each by itself, ``n
        ...``.

        Args:
            asked: further arguments of the call, of which it takes its own away.
            parts: of the pipeline, by name.
            pictures: that are drawn.
            size: their height and width, in pixels.
            device: where the network is, or comes to be.

        Raises:
            ValueError: something is missing, or wrong.
        """
        return {}
