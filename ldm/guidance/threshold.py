"""Thresholding: x0 is brought back to where data can be (Saharia et al. 2022, section 2.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.diffusion import Condition, Level, Prediction, Predictor
from ldm.guidance.chain import moved

Kind = Literal["none", "static", "dynamic"]


@dataclass(frozen=True)
class Threshold:
    """Clips x0 to [-bound, bound] (static), or to the sample's own [-s, s], s a percentile of its
    |x0| but at least ``bound``, and divides by s / bound (dynamic). For pixels: latents have no
    bound.

    Args:
        bound: of the data.
        percentile: of dynamic thresholding, in (0, 1): 0.995 in the paper; None: static.
        most: s is not taken larger; None: any.
    """

    bound: float = 1.0
    percentile: float | None = None
    most: float | None = None

    @staticmethod
    def of(config: Mapping[str, Any]) -> Threshold | None:
        """What a model of pixels is drawn with whose scheduler has ``config``, because E[x0 | x_t]
        lies where pixels do, and an error of eps is one of x0 sigma / alpha times as large.
        ``clip_sample: false`` says no, ``clip_sample_range`` where to; ``thresholding`` that it is
        dynamic, and with which ``dynamic_thresholding_ratio`` and ``sample_max_value``.
        """
        if config.get("thresholding"):
            ratio, most = (
                float(config.get(key, default))
                for key, default in (("dynamic_thresholding_ratio", 0.995), ("sample_max_value", 1))
            )
            return Threshold(1.0, ratio, most)
        if not config.get("clip_sample", True):
            return None
        return Threshold(float(config.get("clip_sample_range", 1.0)))

    @staticmethod
    def stated(kind: Kind, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a scheduler of ``config`` is to state for ``kind``; a percentile and a largest s
        that it has stay, else they are those of the paper: 0.995 and none, 1,000.
        """
        changed = {"thresholding": kind == "dynamic", "clip_sample": kind == "static"}
        if kind == "dynamic" and not config.get("thresholding"):
            changed |= {"dynamic_thresholding_ratio": 0.995, "sample_max_value": 1000.0}
        return changed

    def __call__(self, predict: Predictor, null: Condition) -> Predictor:
        """The predictor with its x0 clipped; ``null`` is not used."""

        def guided(x_t: Tensor, level: Level, timestep: Tensor, cond: Condition) -> Prediction:
            prediction = predict(x_t, level, timestep, cond)
            x0 = prediction.x0
            limit = torch.full((len(x0),), self.bound, dtype=x0.dtype, device=x0.device)
            if self.percentile is not None:
                found = x0.abs().flatten(1).float().quantile(self.percentile, dim=1)
                most = math.inf if self.most is None else self.most
                limit = limit.maximum(found.clamp(max=most).to(x0.dtype))
            limit = limit.reshape(-1, *(1,) * (x0.ndim - 1))
            return moved(prediction, x0.clamp(-limit, limit) * (self.bound / limit) - x0)

        return guided
