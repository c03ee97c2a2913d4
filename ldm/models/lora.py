"""Low-rank updates of a network's linear layers and convolutions.

    LoRA   W = W0 + (alpha / r) B A                                    (Hu et al. 2021, eq. 3)
    DoRA   W = m (W0 + (alpha / r) B A) / ||W0 + (alpha / r) B A||     (Liu et al. 2024, eq. 5)

A is ``down``, B is ``up``, m is ``magnitude`` with one number, and one norm, per output. The layers
are peft's own; here is what they are made of, apart from any network and any file format.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from torch import Tensor, nn

_LAYERS = (LoraLayer, LycorisLayer)
ADAPTER = "default"
"""What peft calls the adapter of a run."""


@dataclass(frozen=True)
class Update:
    """The update of one module.

    Args:
        down: A, ``r in`` of a linear layer, ``r in k k`` of a convolution.
        up: B, ``out r`` or ``out r 1 1``.
        alpha: the update is scaled by ``alpha / r``.
        magnitude: m of DoRA, ``out`` or ``1 out 1 1`` as peft has it; None is LoRA.

    Raises:
        ValueError: the shapes do not belong together.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) not in (2, 4) or len(up) != len(down) or up[1] != down[0] or not down[0]:
            raise ValueError(f"{down} and {up} are no pair of low rank")
        if self.magnitude is not None and self.magnitude.numel() != up[0]:
            raise ValueError(f"{self.magnitude.numel()} magnitudes for {up[0]} outputs")

    @property
    def rank(self) -> int:
        """The r of eq. 3."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this updates, ``out in [k k]``."""
        return (self.up.shape[0], *self.down.shape[1:])


Updates = Mapping[str, Update]
"""Updates by the name of their module."""


def attach(
    network: nn.Module, targets: Sequence[str], *, rank: int, alpha: float, dora: bool
) -> None:
    """Puts fresh adapters into ``network``; they alone learn from then on.

    B starts at zero and A from the global generator (Hu et al. 2021, section 4.1), so that the
    network computes what it computed before.

    Args:
        network: a diffusers or transformers model.
        targets: names that modules end in.
        rank: r.
        alpha: the update is scaled by ``alpha / r``.
        dora: learn magnitudes too.

    Raises:
        ValueError: nothing ends in a target, or something that has no low-rank update does.
    """
    for target in targets:
        meant = {
            n: m for n, m in network.named_modules() if n == target or n.endswith("." + target)
        }
        if not meant:
            layers = (n for n, m in network.named_modules() if isinstance(m, nn.Linear))
            ends = {n.rpartition(".")[2] for n in layers}
            known = ", ".join(sorted(end for end in ends if not end.isdecimal()))
            raise ValueError(f"no module ends in {target!r}; linear layers end in {known}")
        for name, module in meant.items():
            if not isinstance(module, (nn.Linear, nn.Conv2d)):
                kind = type(module).__name__
                raise ValueError(
                    f"{target!r} means {name}, a {kind}: only linear layers and convolutions have"
                    " a low-rank update"
                )
    network.add_adapter(  # type: ignore[operator]
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), use_dora=dora),  # type: ignore[arg-type]
        ADAPTER,
    )
    # Autocast computes in less; what the optimiser adds up must not.
    assert all(p.dtype == torch.float32 for p in weights(network).values())


def normed(network: nn.Module) -> list[LoraLayer]:
    """The layers of ``network`` whose adapters take the norm of the whole weight (DoRA)."""
    layers = (module for module in network.modules() if isinstance(module, LoraLayer))
    return [layer for layer in layers if layer.lora_magnitude_vector]


def attach_updates(network: nn.Module, updates: Updates) -> None:
    """Puts ``updates`` into ``network`` as adapters, to the bit; they alone learn from then on.

    Args:
        network: a diffusers or transformers model; on the meta device shapes alone are put in.
        updates: of its modules, which they fit (``check_fit``).

    Raises:
        ValueError: some have magnitudes and some have not; peft's config knows only all or none.
    """
    dora = [update.magnitude is not None for update in updates.values()]
    if any(dora) and not all(dora):
        raise ValueError(f"DoRA in {sum(dora)} of {len(dora)} modules: not in all")
    # peft's patterns are for the ends of names unless they begin with "^".
    exact = {name: "^" + re.escape(name) for name in updates}
    network.add_adapter(  # type: ignore[operator]
        LoraConfig(
            rank_pattern={exact[name]: update.rank for name, update in updates.items()},
            alpha_pattern={exact[name]: update.alpha for name, update in updates.items()},
            target_modules="|".join(map(re.escape, updates)),
            use_dora=any(dora),
        ),
        ADAPTER,
    )
    made = weights(network)
    assert all(p.dtype == torch.float32 for p in made.values())
    with torch.no_grad():
        for name, value in named(updates).items():
            parameter = made.pop(name)
            parameter.copy_(value.reshape(parameter.shape))
    assert not made


def weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that ``attach`` made, by their names in ``network``."""
    made = {
        f"{name}.{part}.{ADAPTER}.weight"
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer)
        for part in ("lora_A", "lora_B", "lora_magnitude_vector")
    }
    return {name: p for name, p in network.named_parameters() if name in made}


def collect(network: nn.Module) -> dict[str, Update]:
    """The updates that ``attach`` made, as they are now."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            m = module.lora_magnitude_vector
            found[name] = Update(
                down=module.lora_A[ADAPTER].weight.detach(),
                up=module.lora_B[ADAPTER].weight.detach(),
                alpha=float(module.lora_alpha[ADAPTER]),
                magnitude=m[ADAPTER].weight.detach() if ADAPTER in m else None,
            )
    return found


def named(updates: Updates) -> dict[str, Tensor]:
    """The tensors of ``updates`` under the names that ``weights`` gives them."""
    found = {}
    for name, update in updates.items():
        found[f"{name}.lora_A.{ADAPTER}.weight"] = update.down
        found[f"{name}.lora_B.{ADAPTER}.weight"] = update.up
        if update.magnitude is not None:
            found[f"{name}.lora_magnitude_vector.{ADAPTER}.weight"] = update.magnitude
    return found


def fingerprint(lora: Mapping[str, Updates]) -> str:
    """Hex SHA-256 of what the updates of some networks, by part, are in float32: the same in every
    format of files.
    """
    told = hashlib.sha256()
    for part, updates in sorted(lora.items()):
        tensors = named(updates)
        alphas = {name: update.alpha for name, update in sorted(updates.items())}
        shapes = {name: tuple(value.shape) for name, value in sorted(tensors.items())}
        told.update(f"{part} {alphas} {shapes}".encode())
        for name in shapes:
            told.update(tensors[name].detach().cpu().float().contiguous().numpy().tobytes())
    return told.hexdigest()


def check_fit(updates: Updates, network: nn.Module) -> None:
    """``ValueError`` naming the first update that ``network`` has no weight for."""
    modules = dict(network.named_modules())
    for name, update in updates.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim not in (2, 4):
            raise ValueError(f"there is no layer {name}")
        if tuple(weight.shape) != update.shape:
            raise ValueError(
                f"{name} is {tuple(weight.shape)}, its update is for {tuple(update.shape)}"
            )


def adapted(network: nn.Module) -> bool:
    """Whether there are adapters in ``network``, fused or not."""
    return any(isinstance(module, _LAYERS) for module in network.modules())


def fused(network: nn.Module) -> bool:
    """Whether the weights of ``network`` hold every active adapter, of which a layer need not have
    all.
    """
    return all(
        set(module.active_adapters) & module.r.keys() <= set(module.merged_adapters)
        for module in network.modules()
        if isinstance(module, _LAYERS)
    )


@contextmanager
def scaled(networks: Sequence[nn.Module], scale: float) -> Iterator[None]:
    """Inside, the updates of ``networks`` are ``scale`` times as strong; nobody else may use the
    networks meanwhile.
    """
    if scale == 1:  # nothing to look for in all of them
        yield
        return
    layers = [m for n in networks for m in n.modules() if isinstance(m, _LAYERS)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(scale)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
