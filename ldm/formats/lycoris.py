"""Files of LyCORIS in kohya's naming: LoHa and LoKr.

lora_unet_MODULE.hada_w1_a   .hada_w1_b   .hada_w2_a   .hada_w2_b   .hada_t1   .hada_t2   .alpha
lora_unet_MODULE.lokr_w1   .lokr_w2   or   .lokr_w2_a   .lokr_w2_b   .lokr_t2   .alpha
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.formats import lora_names
from ldm.models.lycoris import KINDS, Factors


def parse(
    tensors: Mapping[str, Tensor], unet: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Factors]]:
    """The updates in the tensors of a file, by part and module.

    Args:
        tensors: of a file that ``lora_names.kind_of`` knows.
        unet: config of the U-Net that it is for, as ``lora.read`` takes it.

    Raises:
        ValueError: a tensor is of no LoHa or LoKr, or they do not belong together.
    """
    kind = lora_names.kind_of(tensors)
    if kind not in KINDS:
        raise ValueError(f"this is {kind} of LyCORIS, and of those LoHa and LoKr alone are read")
    modules_of = lora_names.from_kohya((key.partition(".")[0] for key in tensors), unet)
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, value in tensors.items():
        stem, _, name = key.partition(".")
        if stem not in modules_of or name not in (*KINDS[kind][2], "alpha"):
            raise ValueError(f"{key} is of no {kind} that peft has a layer for")
        part, module = modules_of[stem]
        found.setdefault(part, {}).setdefault(module, {})[name] = value

    def factors(part: str, module: str, named: dict[str, Tensor]) -> Factors:
        alpha = named.pop("alpha", None)
        if alpha is not None and alpha.numel() != 1:
            raise ValueError(f"{part}.{module}: alpha has the shape {tuple(alpha.shape)}")
        try:
            return Factors(kind, named, None if alpha is None else float(alpha))
        except ValueError as error:
            raise ValueError(f"{part}.{module}: {error}") from None

    return {
        part: {name: factors(part, name, named) for name, named in modules.items()}
        for part, modules in found.items()
    }
