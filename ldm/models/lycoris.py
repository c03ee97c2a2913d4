"""LyCORIS updates that peft has layers for: products of two low ranks, and Kronecker products.

    LoHa   W = W0 + (alpha / r) (A1 B1) * (A2 B2)       (Hyeon-Woo et al. 2021, proposition 2)
    LoKr   W = W0 + (alpha / r) kron(C, D)              (Yeh et al. 2024, section 3.2)

``*`` is elementwise. C, D and the factors of a convolution may be products themselves: A B, or with
a core T of the kernel's size sum_ij T[i, j, k, l] A[i, p] B[j, q] (Hyeon-Woo et al. 2021,
proposition 3). Where neither C nor D is one there is no r, and the scale is 1, as in LyCORIS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from torch import Tensor, nn

KINDS: Mapping[str, tuple[Any, Any, tuple[str, ...]]] = {
    "LoHa": (
        LoHaConfig,
        LoHaLayer,
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    ),
    "LoKr": (
        LoKrConfig,
        LoKrLayer,
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ),
}
"""peft's config and layer, and the names that factors have in both peft and files."""


@dataclass(frozen=True)
class Factors:
    """The update of one module.

    Args:
        kind: of ``KINDS``.
        tensors: by the names of the kind.
        alpha: the update is scaled by ``alpha / r``; None: by 1.

    Raises:
        ValueError: the factors do not belong together.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    alpha: float | None = None

    def __post_init__(self) -> None:
        try:
            _ = self.size
        except (KeyError, RuntimeError, ValueError, IndexError):
            told = ", ".join(f"{k} {tuple(v.shape)}" for k, v in self.tensors.items())
            raise ValueError(f"this is no {self.kind}: {told}") from None

    @property
    def rank(self) -> int | None:
        """r, where there is one."""
        names = ("hada_w1_b", "lokr_w1_b", "lokr_w2_b")
        return next((len(self.tensors[name]) for name in names if name in self.tensors), None)

    @property
    def size(self) -> tuple[int, int]:
        """Outputs, and numbers of each, of the weight that this updates."""
        shapes = {name: value.to("meta") for name, value in self.tensors.items()}

        def product(name: str, core: str) -> Tensor:
            if name in shapes:
                return shapes[name]
            a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
            if core in shapes:
                return torch.einsum("ijkl,ip,jq->pqkl", shapes[core], a, b)
            return a @ b

        if self.kind == "LoHa":
            whole = product("hada_w1", "hada_t1") * product("hada_w2", "hada_t2")
            return len(whole), whole[0].numel()
        one, two = product("lokr_w1", ""), product("lokr_w2", "lokr_t2")
        if one.ndim != 2:
            raise ValueError("lokr_w1 is no matrix")
        return len(one) * len(two), one[0].numel() * two[0].numel()


def check_fit(updates: Mapping[str, Factors], network: nn.Module) -> None:
    """``ValueError`` naming the first update that ``network`` has no weight for."""
    modules = dict(network.named_modules())
    for name, update in updates.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim not in (2, 4):
            raise ValueError(f"there is no layer {name}")
        if (len(weight), weight[0].numel()) != update.size:
            raise ValueError(f"{name} is {tuple(weight.shape)}, its update is for {update.size}")


def attach(network: nn.Module, updates: Mapping[str, Factors], adapter: str) -> None:
    """Puts ``updates``, all of one kind, into ``network`` as the adapter of this name.

    peft would choose factors by the width of a layer; here they are those of the file.
    """
    config, layer, names = KINDS[next(iter(updates.values())).kind]
    exact = {name: "^" + re.escape(name) for name in updates}
    ranks = {name: update.rank or 1 for name, update in updates.items()}
    alphas = {
        name: update.alpha if update.rank and update.alpha is not None else float(ranks[name])
        for name, update in updates.items()
    }
    asked = config(
        r=1,
        rank_pattern={exact[name]: rank for name, rank in ranks.items()},
        alpha_pattern={exact[name]: alpha for name, alpha in alphas.items()},
        target_modules=rf"({'|'.join(map(re.escape, updates))})(\.base_layer)*",
    )
    with torch.random.fork_rng():  # what peft draws is replaced
        network.add_adapter(asked, adapter)  # type: ignore[operator]
    modules: dict[str, Any] = dict(network.named_modules())
    for name, update in updates.items():
        module = modules[name]
        while not isinstance(module, layer):  # below another kind of adapter
            module = module.base_layer
        weight = module.get_base_layer().weight
        for key in names:
            factors = getattr(module, key)
            if adapter in factors:
                del factors[adapter]
            if key in update.tensors:
                value = update.tensors[key].to(weight.device, weight.dtype)
                factors[adapter] = nn.Parameter(value, requires_grad=False)
