"""What a picture is going to be, seen on the way: small, and without the decoder.

    colour of a cell = W z + b,    z the latent that the network takes x_0 to be

with W and b fitted to what the decoder makes of plain latents, one colour a cell.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from ldm.diffusion import Condition, Level, Prediction, Predictor

_LATENTS, _CELLS = 8, 8  # of so many cells a side
_LEAST = 64  # pixels of the shorter side


class Preview:
    """Pictures of latents of one codec.

    Args:
        codec: its decoder is asked once, here.
        device: where it is.
    """

    @torch.no_grad()
    def __init__(self, codec: Any, device: Any) -> None:
        self._weights: Tensor | None = None
        if codec.network is None:
            return
        draw = torch.Generator().manual_seed(0)
        shape = _LATENTS, codec.channels, _CELLS // 2, _CELLS // 2
        latents = interpolate(torch.randn(shape, generator=draw), scale_factor=2).to(device)
        pixels = adaptive_avg_pool2d(codec.decode(latents).float(), _CELLS)
        known, seen = (x.cpu().movedim(1, -1).flatten(0, 2) for x in (latents, pixels))
        known = torch.cat([known, torch.ones(len(known), 1)], 1)
        self._weights = torch.linalg.lstsq(known, seen).solution

    def url(self, x0: Tensor) -> str:
        """``x0``, ``1 c h w``, as a JPEG in a ``data:`` URL."""
        cells = x0[0].float().cpu().movedim(0, -1)
        if self._weights is not None:
            cells = cells @ self._weights[:-1] + self._weights[-1]
        colours = ((cells.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        image = Image.fromarray(colours.numpy())
        scale = max(1, -(-_LEAST // min(image.size)))
        large = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        large.save(file, "JPEG", quality=80)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True)
class Watched:
    """A guidance whose predictions are seen, and nothing else.

    Args:
        guidance: whose.
        see: is told every prediction.
    """

    guidance: Callable[[Predictor, Condition], Predictor]
    see: Callable[[Prediction], None]

    def __call__(self, predict: Predictor, null: Condition) -> Predictor:
        """``guidance``, seen."""
        guided = self.guidance(predict, null)

        def seen(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            found = guided(x_t, level, timestep, cond)
            self.see(found)
            return found

        return seen
