"""What T2I-Adapters and IP-Adapters of a pipeline are told in a call, by stock's names for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.calls.arguments import Pictures
from ldm.calls.values import each, real, several, shown
from ldm.editing.pictures import KINDS, is_picture, masks, numbers, pictures, resized, size
from ldm.models.control import FEATURE, adapters_of, ip_adapters_of, numbered
from ldm.models.wrapped import bare

_IMAGE = "adapter_image"
_FACTOR = "adapter_conditioning_factor"
_ARGUMENTS = (_IMAGE, "adapter_conditioning_scale", _FACTOR)
_IP = "ip_adapter_image"


def given_to(
    nets: Sequence[Any], told: dict[str, Any], names: Sequence[str], kind: str, part: str
) -> dict[str, Any]:
    """Takes ``names`` out of ``told``, arguments of networks of this kind.

    Args:
        nets: those that the pipeline has.
        told: further arguments of the call.
        names: of theirs.
        kind: what they are called.
        part: the component that they are.

    Raises:
        ValueError: there is such an argument and no network that is told it.
    """
    given = {name: told.pop(name) for name in names if name in told}
    if not nets:
        for name in given:
            raise ValueError(
                f"{name} is told a {kind}, and this pipeline has none: open it with"
                f" from_pretrained(FOLDER, {part}=...)"
            )
    return given


@dataclass(frozen=True)
class Features:
    """What T2I-Adapters are told, each a picture; without any there is nothing of it.

    Args:
        nets: they.
        hints: pictures for each, as ``ldm.editing.pictures`` has them.
        scales: of each.
        factor: share of the steps from the first that hear them.
    """

    nets: tuple[Any, ...] = ()
    hints: tuple[Any, ...] = ()
    scales: tuple[float, ...] = ()
    factor: float = 1.0

    @classmethod
    def taken(cls, parts: Mapping[str, Any], told: dict[str, Any]) -> Features:
        """Takes its arguments out of ``told``.

        Raises:
            ValueError: there is no adapter or no picture, or they do not go together.
        """
        nets = adapters_of(parts.get("adapter"))
        given = given_to(nets, told, _ARGUMENTS, "T2I-Adapter", "adapter")
        if not nets:
            return cls()
        if given.get(_IMAGE) is None:
            raise ValueError(f"{_IMAGE} is missing: the picture that the T2I-Adapter follows")
        alone = bare(parts["adapter"]) is nets[0]
        found = []
        hints = [given[_IMAGE]] if alone else several(_IMAGE, given[_IMAGE], len(nets))
        for net, hint in zip(nets, hints, strict=True):
            if not is_picture(hint):
                raise ValueError(f"{_IMAGE} must be {KINDS}, not {shown(hint)}")
            gray = bare(net).config["in_channels"] == 1
            found.append((masks if gray else pictures)(_IMAGE, hint))
        scales = each("adapter_conditioning_scale", given, 1.0, len(nets))
        factor = real(_FACTOR, given.get(_FACTOR, 1.0))
        if not 0 <= factor <= 1:
            raise ValueError(f"{_FACTOR} must lie in [0, 1], not {factor:g}")
        return cls(tuple(nets), tuple(found), tuple(scales), factor)

    def sides(self, unit: int) -> tuple[int, int] | None:
        """Height and width of the first picture, cut to multiples that its adapter takes, as in
        stock; None: there is none.
        """
        if not self.hints:
            return None
        unit = math.lcm(unit, bare(self.nets[0]).config["downscale_factor"])
        rows, columns = (side - side % unit for side in size(self.hints[0]))
        return rows, columns

    def beside(
        self, drawn: Pictures, sides: tuple[int, int], device: torch.device
    ) -> dict[str, Tensor]:
        """What the adapters say to every picture that is ``drawn``, of height and width ``sides``,
        for ``Condition.extra``.

        Raises:
            ValueError: an adapter does not take pictures of this size.
        """
        total: list[Tensor] = []
        for net, hint, scale in zip(self.nets, self.hints, self.scales, strict=True):
            if any(side % (unit := bare(net).config["downscale_factor"]) for side in sides):
                raise ValueError(f"{_IMAGE}: height and width must be multiples of {unit} pixels")
            pixels = resized(hint, *sides).to(device, bare(net).dtype)
            which = numbers(_IMAGE, len(pixels), len(drawn.prompts), drawn.each)
            said = [scale * part[which] for part in net(pixels)]
            total = [a + b for a, b in zip(total, said, strict=True)] if total else said
        return numbered(FEATURE, total)

    def heard(self, done: int, count: int) -> bool:
        """Whether evaluation number ``done`` of ``count`` hears them."""
        return done < int(count * self.factor)


@torch.no_grad()
def embedded(pipe: Any, image: Any, embeds: Any, guided: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What IP-Adapters are told beside prompts and beside negative prompts, ``1 pictures ...`` of
    each adapter.

    Args:
        pipe: the pipeline.
        image: ``ip_adapter_image``: for each adapter a picture, or a list of them.
        embeds: ``ip_adapter_image_embeds`` in its place: for each adapter what
            ``prepare_ip_adapter_image_embeds`` returns.
        guided: whether there is classifier-free guidance; ``embeds`` begin with those of no picture
            then.

    Raises:
        ValueError: there is no such adapter, or the arguments do not fit those that there are.
    """
    layers = ip_adapters_of(pipe.network)
    if image is None and embeds is None:
        if layers:
            raise ValueError(
                f"{_IP} is missing: an IP-Adapter is loaded; unload_ip_adapter() takes it out"
            )
        return [], []
    name = _IP if image is not None else f"{_IP}_embeds"
    if not layers:
        raise ValueError(f"{name} is told an IP-Adapter, and none is loaded: load_ip_adapter")
    if image is not None and embeds is not None:
        raise ValueError(f"pass either {_IP} or {_IP}_embeds, not both")
    given = image if image is not None else embeds
    many = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(many) != len(layers):
        raise ValueError(f"{name} has {len(many)} entries for {len(layers)} IP-Adapters")
    if image is not None:
        for one in many:
            if not is_picture(one):
                raise ValueError(f"{_IP} must be {KINDS}, for each adapter, not {shown(one)}")
        if pipe.image_encoder is None:
            raise ValueError(f"{_IP}: there is no image_encoder; pass {_IP}_embeds")
        found = pipe.prepare_ip_adapter_image_embeds(many, None, pipe._execution_device, 1, True)
    else:
        rows = 2 if guided else 1
        for one in many:
            fits = isinstance(one, Tensor) and one.ndim in (3, 4) and len(one) == rows
            if not fits:
                told = tuple(one.shape) if isinstance(one, Tensor) else shown(one)
                raise ValueError(
                    f"{name} must be tensors {rows} pictures ... of each adapter"
                    f"{' (no picture first)' if guided else ''}, not {told}"
                )
        found = [one if guided else torch.cat([torch.zeros_like(one), one]) for one in many]
    found = [one.to(pipe._execution_device, bare(pipe.network).dtype) for one in found]
    return [one[1:] for one in found], [one[:1] for one in found]
