"""Networks beside a U-Net that are told a picture, and what they say to it.

    h_k <- h_k + s z_k(E_k(x_t, t, text, hint))        ControlNet (Zhang et al. 2023, eqs. 2 and 9)
    g_k <- g_k + s F_k(hint)                           T2I-Adapter (Mou et al. 2023, eq. 4)
    a <- attention(q, text) + s attention(q, W picture)     IP-Adapter (Ye et al. 2023, eq. 5)

h_k are the skip connections and the middle of the U-Net, E_k those of a copy of its first half, z_k
convolutions that begin as 0, and g_k what each of its levels ends in on the way down. What is
said stands in ``Condition.extra``, a tensor a sample, and
whoever calls the U-Net hands it on (``side_inputs``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from diffusers import MultiAdapter, MultiControlNetModel, T2IAdapter
from torch import Tensor, nn

from ldm.diffusion import Condition
from ldm.models.wrapped import bare

HINT = "hint:"
"""``Condition.extra`` of ControlNet number k, behind the colon: its picture, ``b 3 h w`` in
[0, 1]."""
SHARE = "hint share"
"""How much of what ControlNets say a sample hears, ``b``; all, where there is none."""
RESIDUAL = "residual:"
"""What they say to skip connection number k, and last to the middle, ``b c h w``."""


FEATURE = "feature:"
"""What T2I-Adapters say to level number k, ``b c h w``."""
IMAGE = "image:"
"""What IP-Adapter number k is told, ``b pictures ...``."""


@dataclass(frozen=True)
class Hint:
    """The aside of a ControlNet that learns: ``hint``, ``b 3 h w``, bytes."""

    network = part = None
    hinted = True
    printed: ClassVar[tuple[Any, ...]] = ("hint",)

    def made(self, pixels: Tensor) -> dict[str, Tensor]:
        """Nothing: the hint is a picture of its own."""
        return {}

    def drawn(
        self, seed: int, index: int, shape: tuple[int, int], name: str = "aside"
    ) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def told(self, made: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The hint in [0, 1]."""
        return {f"{HINT}0": made["hint"] / 255}

    def asked(self, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``control_image``."""
        return {"control_image": made["hint"]}


@dataclass(frozen=True)
class Strength:
    """How strongly ControlNets speak.

    Args:
        scales: s of each; None: 1.
        guess: whether s falls to a tenth from the middle to the first skip connection, as in stock.
        features: whether those of T2I-Adapters are heard.
    """

    scales: Sequence[float] | None = None
    guess: bool = False
    features: bool = True


def as_one(networks: Any) -> Any:
    """A pipeline's component of one ControlNet or T2I-Adapter, or of a list of them."""
    if not isinstance(networks, (list, tuple)):
        return networks
    kind = MultiAdapter if isinstance(networks[0], T2IAdapter) else MultiControlNetModel
    return kind(list(networks))


def adapters_of(adapter: Any) -> list[Any]:
    """The T2I-Adapters of a pipeline's component: itself, those of several, or none."""
    found = bare(adapter)
    if found is None:
        return []
    return list(found.adapters) if isinstance(found, MultiAdapter) else [adapter]


def ip_adapters_of(network: Any) -> list[nn.Module]:
    """What IP-Adapters put into a U-Net to read their pictures, of each; of others none."""
    # Not what its config states: there diffusers sets an attribute, and leaves the key as it is.
    projection = getattr(bare(network), "encoder_hid_proj", None)
    return list(getattr(projection, "image_projection_layers", []))


def nets_of(controlnet: Any) -> list[Any]:
    """The ControlNets of a pipeline's component: itself, those of several, or none."""
    found = bare(controlnet)
    if found is None:
        return []
    return list(found.nets) if isinstance(found, MultiControlNetModel) else [controlnet]


def spoken(
    controlnet: nn.Module | None,
    x_t: Tensor,
    timestep: Tensor,
    cond: Condition,
    told: Callable[[], Mapping[str, Any]],
    strength: Strength,
) -> Condition:
    """``cond`` with what ControlNets say to its hints in their place, and without features that are
    not heard.

    Args:
        controlnet: one, several, or None.
        x_t: ``b c h w``.
        timestep: ``b`` or ``()``.
        cond: of the batch.
        told: what they are told beside hints, as the U-Net is; asked where there are hints.
        strength: of each.
    """
    if not strength.features:
        cond = _without(cond, FEATURE)
    nets = nets_of(controlnet)
    hints = listed(cond, HINT)
    if not nets or not hints:
        return cond
    arguments = told()
    total: list[Tensor] = []
    for net, hint, scale in zip(nets, hints, strength.scales or [1.0] * len(nets), strict=True):
        if scale == 0:
            continue
        down, middle = net(
            x_t,
            timestep,
            controlnet_cond=hint.to(x_t),
            conditioning_scale=scale,
            guess_mode=strength.guess,
            return_dict=False,
            **arguments,
        )
        said = [*down, middle]
        total = [a + b for a, b in zip(total, said, strict=True)] if total else said
    share = cond.extra.get(SHARE)
    if share is not None:
        total = [part * share.to(part).reshape(-1, 1, 1, 1) for part in total]
    rest = _without(cond, HINT, SHARE)
    return replace(rest, extra=rest.extra | numbered(RESIDUAL, total))


def side_inputs(told: Mapping[str, Any], cond: Condition) -> dict[str, Any]:
    """Arguments ``told`` of a U-Net, and those that hand on what ``cond`` holds of others."""
    found = dict(told)
    if not cond.extra:
        return found
    if residuals := listed(cond, RESIDUAL):
        *down, middle = residuals
        found["down_block_additional_residuals"] = down
        found["mid_block_additional_residual"] = middle
    if features := listed(cond, FEATURE):
        found["down_intrablock_additional_residuals"] = features
    if images := listed(cond, IMAGE):
        found["added_cond_kwargs"] = {**found.get("added_cond_kwargs", {}), "image_embeds": images}
    return found


def _without(cond: Condition, *starts: str) -> Condition:
    """``cond`` without what its names of ``extra`` begin with."""
    rest = {name: x for name, x in cond.extra.items() if not name.startswith(starts)}
    return replace(cond, extra=rest)


def numbered(start: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """``tensors`` for ``Condition.extra``, under names that begin with ``start``."""
    return {f"{start}{number}": x for number, x in enumerate(tensors)}


def listed(cond: Condition, start: str) -> list[Tensor]:
    """Those of ``cond`` again, in their order."""
    count = sum(name.startswith(start) for name in cond.extra)
    return [cond.extra[f"{start}{number}"] for number in range(count)]
