"""Parameters in shards: FSDP2, where each process holds a part of the weights, of their average and
of the optimiser's moments.

Weights are gathered block by block in forward and backward, gradients are reduced and scattered
(Zhao et al. 2023, section 3; torch's ``fully_shard`` by way of accelerate). Whatever is measured,
drawn or written sees whole weights, so that nothing else has to know of shards, and a checkpoint is
the same with and without them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.errors import ConfigError


def asked_for() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def settle(accelerator: Accelerator) -> None:
    """Makes of what the launcher asked for what a run needs.

    Raises:
        ConfigError: it asks for what a run cannot be.
    """
    state = accelerator.state
    if state.distributed_type is DistributedType.MULTI_CPU:
        # accelerate shards on GPUs only, and on CPUs would go on in silence with whole copies; all
        # that it does works there too.
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    elif state.distributed_type is not DistributedType.FSDP:
        raise ConfigError("the launcher asks for FSDP, which takes several processes")
    plugin: FullyShardedDataParallelPlugin = state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError("the launcher asks for FSDP 1: set fsdp_version to 2")
    if plugin.activation_checkpointing or plugin.ignored_modules:
        key = "activation_checkpointing" if plugin.activation_checkpointing else "ignored_modules"
        raise ConfigError(f"the launcher's fsdp_{key} is not supported: leave it out")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError("the launcher's fsdp_offload_params is not supported: set it to false")
    # Every process reads the weights. transformers takes the variable for leave not to.
    plugin.cpu_ram_efficient_loading = False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # It would cast a batch with its times and noise to bfloat16 before they are mixed. Weights and
    # all that is summed stay float32; autocast says what is computed in less.
    plugin.mixed_precision_policy = None


def prepare(
    accelerator: Accelerator, task: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """``accelerator.prepare``; with FSDP the parameters of ``task`` are other objects after it.

    What is gathered at once is a block that its library says should stay in one piece, where the
    launcher does not name others.

    Raises:
        ConfigError: the optimiser looks at whole weights.
    """
    if accelerator.is_fsdp2:
        if not isinstance(optimizer, torch.optim.AdamW):
            raise ConfigError("optimizer.kind: in shards (FSDP) there is adamw alone: set it")
        plugin = accelerator.state.fsdp_plugin
        named = plugin.transformer_cls_names_to_wrap is not None
        if plugin.auto_wrap_policy in (None, transformer_auto_wrap_policy) and not named:
            plugin.auto_wrap_policy = transformer_auto_wrap_policy
            plugin.transformer_cls_names_to_wrap = _blocks(task)
    # The optimiser stays where it is: ``state.read`` knows where it counts its steps.
    return accelerator.prepare(task, optimizer, device_placement=[True, False])


def _blocks(module: nn.Module) -> list[str]:
    """Names of the classes in ``module`` that are not to be split."""
    units = {name for m in module.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    return sorted(units & {type(m).__name__ for m in module.modules()})


def whole(tensor: Tensor) -> Tensor:
    """The tensor that this process holds a shard of; a collective where it is one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds, or all of it: the same memory.

    What is done to each number on its own is done to that: an operation on shards first asks of
    every tensor it is given how its result will lie.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, weight: Tensor) -> Tensor:
    """What this process is to hold of ``value`` beside ``weight``: a shard where that is one, and
    in memory as that is where it has its shape (channels last).
    """
    if not isinstance(weight, DTensor):
        if value.shape != weight.shape:
            return value.to(weight.device)
        return torch.empty_like(weight, dtype=value.dtype).copy_(value)
    # Without a source every process takes its part of what it has read.
    mine = value.to(weight.to_local().device)
    return distribute_tensor(mine, weight.device_mesh, weight.placements, src_data_rank=None)


@contextmanager
def gathered(module: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Inside, ``module`` and its parts compute without a word between the processes, which may
    then do different things. A collective at the start.
    """
    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    with ExitStack() as stack:
        for unit in units:
            stack.callback(unit.reshard)
            unit.unshard()
        for unit in units[1:]:  # the root stays whole after forward anyway
            again = accelerator.state.fsdp_plugin.reshard_after_forward
            unit.set_reshard_after_forward(False, recurse=False)
            stack.callback(unit.set_reshard_after_forward, again, recurse=False)
        yield


@contextmanager
def written(module: nn.Module, *, here: bool) -> Iterator[None]:
    """Inside, the parameters of ``module`` are ordinary whole tensors, and those that learn are
    float32, where ``here`` is true: it can be saved, but not used. A collective at the start.

    ``gathered`` does not do: a state dict puts the shards back.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is None:
                    continue
                learns = parameter.requires_grad
                halved = learns and parameter.dtype == torch.bfloat16
                if halved or isinstance(parameter, DTensor):
                    value = whole(parameter.detach())
                    if here:
                        kept.append((part, name, parameter))
                        value = value.cpu().float() if halved else value.cpu()
                        part._parameters[name] = nn.Parameter(value, requires_grad=learns)
        yield
    finally:
        for part, name, parameter in kept:
            part._parameters[name] = parameter
