"""One file as a pipeline folder, or as the networks of a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.formats import integrity, pickled
from ldm.formats.recognised import INDEX, header
from ldm.formats.single import header as beside
from ldm.formats.single import original_config, text
from ldm.formats.single.families import ALONE, NONE, Kind, kind_in, own, placed
from ldm.formats.single.place import from_file

_CLASSES = {
    **dict.fromkeys(("UNet2DConditionModel", "UNet2DModel", "AutoencoderKL",
                     "SD3Transformer2DModel", "FluxTransformer2DModel"), diffusers),
    **dict.fromkeys(("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"),
                    transformers),
}  # fmt: skip
"""What a file may ask for, and where it comes from."""
_SCHEDULER = "scheduler/scheduler_config.json"
_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
# What published files hold beside their networks: tables of the noise, averages, marks.
_BESIDE = (
    "model_ema.", "alphas_", "betas", "sqrt_", "log_one_minus_", "posterior_", "logvar", "lvlb_",
    "denoiser.sigmas", "global_step", "v_pred", "ztsnr", "edm_",
)  # fmt: skip
_UNUSED = (".logit_scale", ".text_projection", text.IDS)
_SHARD = "safetensors.index.json"


class SingleFile:
    """A whole model in one safetensors file.

    Args:
        path: of it.
        average: read the averages of the U-Net that the file holds beside it (``model_ema``).
        only: part that it is meant to hold alone; None: it is a whole model.

    Raises:
        OSError: it is not there.
        ValueError: it is pickled, damaged, or no whole model; the message is one line.
    """

    def __init__(self, path: Path, *, average: bool = False, only: str | None = None) -> None:
        if not path.is_file():
            raise OSError(f"{path}: there is no such file")
        pickled.refuse(path, "model")
        self.path, self.average = path, average
        entries = header(path)
        self.shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        kind = kind_in(self.shapes) if only is None else ALONE.get(only)
        if kind is None:
            raise ValueError(
                f"{path} is no whole model: it holds {len(self.shapes):,} tensors,"
                f" {next(iter(self.shapes), 'none')} for one"
            )
        self.kind: Kind = kind
        if average and not any(name.startswith("model_ema.") for name in self.shapes):
            raise ValueError(f"{path} holds no averages (model_ema)")
        self.used: set[str] = set()

    @cached_property
    def configs(self) -> dict[str, bytes] | None:
        """The folder's files that its header holds, by path; None: it is another program's."""
        return beside.unpacked(self.path)

    def unpack(self, folder: Path, configs: Path | None = None) -> None:
        """Writes all of its pipeline folder that is no tensor.

        Args:
            folder: where to.
            configs: a pipeline folder of the same kind, in place of what the header holds.

        Raises:
            ValueError: neither is there.
        """
        if configs is not None:
            files = beside.files_of(configs)
            files = {n: data for n, data in files.items() if not n.endswith(_SHARD)}
            files |= self._told(files)
        elif self.configs is not None:
            files = self.configs
        else:
            raise ValueError(
                f"{self.path} holds tensors alone, of the kind {self.kind.name}: configs and"
                " tokenizer come from a pipeline folder of the same kind, --config FOLDER"
            )
        for name, data in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

    def _told(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Configs of another model, as the marks of this file have it: what it predicts, and how
        many channels it takes.
        """
        found: dict[str, dict[str, Any]] = {}
        yaml, scheduler = self.path.with_suffix(".yaml"), json.loads(files[_SCHEDULER])
        v = "v_pred" in self.shapes
        if self.kind.name in ("sd1", "sd2") and yaml.is_file():
            try:
                v = original_config.predicts_v(yaml.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{yaml}: {error}") from None
        if v:
            found[_SCHEDULER] = scheduler | {"prediction_type": "v_prediction"}
        if "ztsnr" in self.shapes:
            told = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            found[_SCHEDULER] = found.get(_SCHEDULER, scheduler) | told
        unet, shape = files.get("unet/config.json"), self.shapes.get(_CONV_IN)
        if unet is not None and shape is not None and len(shape) == 4:
            config = json.loads(unet)
            if config.get("in_channels") != shape[1]:  # of inpainting
                found["unet/config.json"] = config | {"in_channels": shape[1]}
        return {
            name: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
            for name, config in found.items()
        }

    def holds(self, part: str) -> bool:
        """Whether tensors of ``part`` are in it."""
        return self._number(part) is not None or self._own(part)

    def _own(self, part: str) -> bool:
        return any(name.startswith(own(part, "")) for name in self.shapes)

    def _number(self, part: str) -> int | None:
        """Which of the prefixes of a part it has."""
        entry = self.kind.parts.get(part)
        for number, prefix in enumerate(entry.prefixes if entry else ()):
            if any(name.startswith(prefix) for name in self.shapes):
                return number
        return None

    def network(self, folder: Path, part: str, dtype: torch.dtype | None = None) -> nn.Module:
        """A network of ``folder``, unpacked, with its tensors; in the dtypes of the file unless
        one is asked for.

        Raises:
            ValueError: a tensor is missing, or of another shape; the message is one line.
        """
        network = self._shape(folder, part)
        tensors = self._tensors(folder, part, network)
        if dtype is not None:
            tensors = {n: v.to(dtype) if v.is_floating_point() else v for n, v in tensors.items()}
        network.load_state_dict(tensors, strict=False, assign=True)
        if isinstance(network, transformers.T5EncoderModel):
            network.tie_weights()
        return network.eval()

    def weights(self, folder: Path, part: str) -> dict[str, Tensor]:
        """Tensors of a network, as its folder holds them; ``ValueError`` as ``network`` has it."""
        network = self._shape(folder, part)
        tensors = self._tensors(folder, part, network)
        if isinstance(
            network, (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
        ):
            tensors = {text.in_files(name): value for name, value in tensors.items()}
        return tensors

    def left(self) -> list[str]:
        """Names of tensors that nothing has read and nothing is known about."""
        return sorted(
            name
            for name in self.shapes.keys() - self.used
            if not name.startswith(_BESIDE)
            and not name.endswith(_UNUSED)
            and not (self.kind.name == "sd2" and ".resblocks.23." in name)  # 23 layers are read
        )

    def _shape(self, folder: Path, part: str) -> nn.Module:
        cls_name = classes(self.path, folder)[part]
        config = integrity.json_object(folder / part / "config.json")
        integrity.check_size(self.path / part / "config.json", config, self.shapes)
        cls = getattr(_CLASSES[cls_name], cls_name)
        try:
            with init_empty_weights(include_buffers=False):
                if _CLASSES[cls_name] is transformers:
                    return cls(cls.config_class.from_dict(config))
                return cls.from_config(config)
        except Exception as error:  # whatever the libraries raise at a config that makes no sense
            line = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{self.path}: the config of its {part} makes none: {line}") from None

    def _tensors(self, folder: Path, part: str, network: nn.Module) -> dict[str, Tensor]:
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        if text.TIED[1] in shapes:
            shapes.pop(text.TIED[0], None)
        config = integrity.json_object(folder / part / "config.json")
        number, kind = self._number(part), self.kind
        place = placed(kind if number is not None else NONE, part, config, number or 0)
        try:
            with safe_open(self.path, framework="pt") as opened:

                def read(name: str) -> Tensor | None:
                    self.used.add(name)
                    if self.average and name.startswith("model.diffusion_model."):
                        name = "model_ema." + name.removeprefix("model.").replace(".", "")
                    if name not in self.shapes:
                        return None
                    return opened.get_tensor(name)

                return from_file(shapes, place, read)
        except (ValueError, SafetensorError) as error:
            line = " ".join(str(error).split())[:300]
            raise ValueError(f"{self.path}, {part}: {line}") from None


def classes(file: Path, folder: Path) -> dict[str, str]:
    """Classes of the networks that ``folder``, unpacked, lists, by part.

    Raises:
        ValueError: one is unknown; the message is one line and names ``file``.
    """
    index = integrity.json_object(folder / INDEX)
    found = {n: entry[1] for n, entry in index.items() if integrity.is_part(entry)}
    networks = {n: c for n, c in found.items() if (folder / n / "config.json").is_file()}
    for part, cls in networks.items():
        if cls not in _CLASSES:
            raise ValueError(f"{file}: {part} is a {cls[:60]}, which no single file holds")
    return networks
