"""Pipelines of whole models in one file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ldm.formats.recognised import whole
from ldm.formats.single.folder import networks, prepare
from ldm.formats.single.read import SingleFile


class SingleFileLoader:
    """diffusers' ``from_single_file`` on this library's reader of files."""

    from_pretrained: Callable[..., Any]

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """Opens a whole model in one safetensors file, of Stable Diffusion 1, 2, XL or its refiner,
        3 or Flux.1, or of any shape that ``ldm export`` wrote; in float32 unless a ``dtype`` is
        passed.

        Args:
            pretrained_model_link_or_path: the file.
            kwargs: those of ``from_pretrained``; ``config``, a pipeline folder of the same kind for
                configs, tokenizers and what the file does not hold, by default what its header
                holds, else the Hub's; and components in place of the file's, of which ``vae`` may
                also be a path.

        Raises:
            OSError: there is no such file, or nothing tells its configs; the message is one line.
            ValueError: it is pickled, damaged, or no whole model; likewise.
        """
        path = Path(pretrained_model_link_or_path)
        if not whole(path):
            SingleFile(path)  # tells why
        return cls.from_pretrained(path, **kwargs)


@contextmanager
def unpacked(path: Path, asked: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A folder with all of a file that is no tensor, and what ``from_pretrained`` is asked for with
    it: the networks among it.

    Args:
        path: the file.
        asked: keywords of ``from_single_file``.
    """
    asked = dict(asked)
    configs, vae = asked.pop("config", None), asked.get("vae")
    dtype = asked.get("dtype") or asked.get("torch_dtype") or torch.float32
    if isinstance(vae, (str, os.PathLike)):
        vae = Path(asked.pop("vae"))
    else:
        vae = None
    with tempfile.TemporaryDirectory(prefix="ldm-single-") as name:
        folder = Path(name)
        source = SingleFile(path)
        given = {part for part, value in asked.items() if value is not None}
        found = prepare(source, folder, configs and Path(configs), vae, given)
        made = networks(found, folder, dtype)
        try:
            yield name, {**made, **asked}
        except (OSError, ValueError) as error:
            kind = ValueError if isinstance(error, ValueError) else OSError
            raise kind(str(error).replace(name, str(path))) from error
