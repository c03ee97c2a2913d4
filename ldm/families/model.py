"""What a run is made of and what a folder holds: a model, and the family that it is of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config

from ldm.config.learning import CONTROLNET
from ldm.config.schema import Score, TrainConfig, Validation
from ldm.diffusion import Condition, NoiseProcess, Predictor, Target, scheduler_config
from ldm.families.drawing import Drawing
from ldm.families.seeing import Seeing
from ldm.models.aside import Aside
from ldm.models.codec import Codec
from ldm.models.conditioner import Conditioner, TextConditioner, Towers
from ldm.models.control import Strength, spoken
from ldm.models.wrapped import bare
from ldm.sampling import SamplingDefaults, default_sampler

INPAINTED = "inpainted"
"""``Condition.extra`` of networks that inpaint: the mask, and latents of what is not behind it,
``b 1 + c h w``."""


@dataclass(frozen=True)
class Tower:
    """A text tower, by the folders it lies in.

    Args:
        part: of the network.
        words: of its tokenizer.
        network: the class of transformers that reads the former.
        layer: the hidden state that is read bare, -2 the one before the last; None: what the tower
            ends in.
        pooled: name of the output that is one vector a text; None: it has none to say.
        reader: the class of transformers that reads the tokenizer's folder.
        length: tokens of a text at most; None: as many as its tokenizer says.
        masked: whether the network is told which tokens are padding.
        lower: whether it reads small letters alone.
    """

    part: str
    words: str
    network: type
    layer: int | None = None
    pooled: str | None = "pooler_output"
    reader: type = CLIPTokenizer
    length: int | None = None
    masked: bool = False
    lower: bool = False

    @property
    def clip(self) -> bool:
        """Whether it is a CLIP, of which there may be a LoRA."""
        return issubclass(self.network, (CLIPTextModel, CLIPTextModelWithProjection))

    def tokens(self, network: Any) -> int:
        """Tokens of a text as far as ``network``, this tower's, tells."""
        told = ("max_position_embeddings", "n_positions")
        limits = [self.length, *(getattr(network.config, name, None) for name in told)]
        return min(limit for limit in limits if limit is not None)


class Family(Drawing, Seeing, ABC):
    """A family of models: how its folders look and how its network is called."""

    stock: ClassVar[tuple[str, ...]] = ()
    """Classes of diffusers that open its folders; what one saves names the first."""
    network: ClassVar[str] = "unet"
    """Folder of the network that predicts."""
    towers: ClassVar[tuple[Tower, ...]] = ()
    flow: ClassVar[str | None] = None
    """The scheduler that its folders of a rectified flow state (``scheduler_config``)."""
    zeros: ClassVar[bool] = False
    """Whether the null condition is zeros, and not the encoding of the empty text, where no folder
    tells."""

    mutes: ClassVar[bool] = False
    """Whether a tower that alone is not told a text says zeros, and not what it says
    to the empty one."""

    pooled: ClassVar[bool] = False
    """Whether its network is told one vector of a text beside the tokens."""

    skips: ClassVar[bool] = False
    """Whether its network reads tokens of CLIP towers, which may be those of an earlier layer."""

    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """What names of the network's modules end in that a LoRA adapts where no config says."""

    side_networks: ClassVar[Mapping[str, str]] = {}
    """Names of the stock pipelines that have a ControlNet, or a T2I-Adapter, beside its network, by
    the component; {}: neither may stand there, and there is no IP-Adapter."""

    grows_from: ClassVar[str | None] = None
    """A family whose folders its models may begin from (``grow``)."""

    unlearnt: ClassVar[tuple[str, ...]] = ("time_proj.weight",)
    """Parameters of the network that never learn: random Fourier features, which are drawn."""

    stepping: ClassVar[Mapping[str, Any]] = {}
    """What the scheduler that its folders state is set to beside the noise process."""

    @property
    def controlled(self) -> bool:
        """Whether networks may stand beside its own (``side_networks``)."""
        return bool(self.side_networks)

    @property
    def adaptable(self) -> list[str]:
        """Folders of the networks that a LoRA may have updates of: the one that predicts, and CLIP
        text towers, as diffusers reads them.
        """
        return [self.network, *(tower.part for tower in self.towers if tower.clip)]

    def present(self, networks: Mapping[str, Any]) -> list[Tower]:
        """The towers whose network is among ``networks``, which are by folder, and is not None."""
        return [tower for tower in self.towers if networks.get(tower.part) is not None]

    @abstractmethod
    def fits(self, parts: Mapping[str, Any]) -> bool:
        """Whether a pipeline of the components ``parts`` (None: absent) is of this family."""

    @abstractmethod
    def make(self, config: TrainConfig, model: Model) -> nn.Module:
        """The network that ``config`` describes, from random init, to go with the rest of
        ``model``.

        Raises:
            ConfigError: it cannot be described like this.
        """

    @abstractmethod
    def check(self, config: TrainConfig, model: Model, network: nn.Module) -> None:
        """``ConfigError`` where ``network``, read from a folder, does not go with the rest."""

    def grow(self, config: TrainConfig, model: Model, network: nn.Module) -> None:
        """Gives ``network``, of a folder of the family ``grows_from``, what it has not.

        Raises:
            ConfigError: it cannot have it.
        """
        return None

    @property
    @abstractmethod
    def reads(self) -> type:
        """The class of diffusers that reads the network's folder."""

    @abstractmethod
    def call(
        self,
        network: nn.Module,
        x_t: Float[Tensor, "b c h w"],
        timestep: Shaped[Tensor, "..."],
        cond: Condition,
    ) -> Float[Tensor, "b y h w"]:
        """What ``network`` says at ``timestep`` (``b`` or ``()``, float32)."""

    def arguments(self, network: nn.Module, cond: Condition) -> dict[str, Any]:
        """What of ``cond`` its network and the ControlNets beside it are told alike, by the names
        of their arguments; of a family that may have some.
        """
        return {}

    def join(self, said: Sequence[Condition], networks: Mapping[str, Any]) -> Condition:
        """One condition of what all towers that are among ``networks`` say, in their order."""
        (only,) = said
        return only

    def patch(self, network: nn.Module) -> int:
        """Latent cells along each side of one token of ``network``; those of a U-Net are 1."""
        return bare(network).config.get("patch_size") or 1

    def channels(self, network: nn.Module) -> int:
        """Channels of the latents that ``network`` is given."""
        config = bare(network).config
        return min(config.in_channels, config.get("out_channels") or config.in_channels)

    def inpaints(self, network: nn.Module) -> bool:
        """Whether ``network`` is told a mask and the rest of the picture (``INPAINTED``)."""
        return bare(network).config.in_channels == 2 * self.channels(network) + 1

    def side(self, network: nn.Module) -> int | Sequence[int] | None:
        """Side, or height and width, in latent cells of the pictures that ``network`` draws where
        nothing is asked for; None: nothing says it.
        """
        return bare(network).config["sample_size"]

    def state_side(self, network: Any, side: int) -> None:
        """Lets ``network`` and its folder say it."""
        network.register_to_config(sample_size=side)

    def tokens(self, network: nn.Module, latent: Tensor) -> int:
        """How many tokens of ``network`` a picture of ``latent``, ``... h w``, is."""
        side = self.patch(network)
        return (latent.shape[-2] // side) * (latent.shape[-1] // side)

    def index(self, index: dict[str, Any]) -> dict[str, Any]:
        """``model_index.json`` as the stock pipeline that runs the folder writes it; by default
        under the name of this library's own, without the components that are absent.

        Args:
            index: with all components and keys of ``LatentDiffusionPipeline``.
        """
        return {key: value for key, value in index.items() if value != [None, None]}

    def keys(self, model: Model) -> dict[str, Any]:
        """Keys of ``model_index.json`` that ``model`` has, by the pipeline's arguments."""
        return {}

    def conditioner(
        self,
        networks: Mapping[str, Any],
        tokenizers: Mapping[str, Any],
        classes: Sequence[str] | None = None,
        *,
        zeros: bool = False,
        length: int | None = None,
    ) -> Conditioner:
        """What makes conditions of texts.

        Args:
            networks: by folder; a tower that is not among them is absent.
            tokenizers: the same.
            classes: of a family without text.
            zeros: whether no text is zeros, of a family of several towers.
            length: tokens of a T5, of a family with ``longest``; None: as ever.

        Raises:
            ValueError: a tower and its tokenizer do not belong together.
        """
        read = self._read(networks, tokenizers, length)
        if len(self.towers) == 1 and read:
            return read[0]
        return Towers(read, partial(self.join, networks=networks), zeros=zeros, mutes=self.mutes)

    def _read(
        self, networks: Mapping[str, Any], tokenizers: Mapping[str, Any], length: int | None
    ) -> list[TextConditioner]:
        """The towers that are among ``networks``."""
        read = []
        for t in self.present(networks):
            parts, how = (tokenizers[t.words], networks[t.part]), (t.part, t.layer, t.pooled)
            given = {"masked": t.masked, "lower": t.lower}
            read.append(TextConditioner(*parts, *how, t.length, **given))
        for tower in read if length is not None else ():
            if isinstance(tower.text_encoder.config, T5Config):
                tower.length = length  # its positions are relative: its tokenizer's limit is none
        return read


class FamilyDenoiser(nn.Module):
    """The network of a family as a ``Denoiser``: (x_t, timestep, condition) -> y.

    Args:
        family: of it.
        network: used as it is, be it compiled or wrapped by peft.
        controlnet: one, or several, that stand beside it (``ldm.models.control``).
        strength: theirs, asked at every call.
    """

    def __init__(
        self,
        family: Family,
        network: nn.Module,
        controlnet: nn.Module | None = None,
        strength: Callable[[], Strength] = Strength,
    ) -> None:
        super().__init__()
        self.family, self.network = family, network
        self.controlnet, self.strength = controlnet, strength

    def forward(
        self, x_t: Float[Tensor, "b c h w"], timestep: Shaped[Tensor, "..."], cond: Condition
    ) -> Float[Tensor, "b y h w"]:
        """Output ``b y h w``, y = c (2 c with a learned variance); ``timestep`` ``b`` or ``()``."""
        # Not below float32: random Fourier features are turns of up to hundreds of radians.
        timestep = timestep.float()
        if cond.extra:  # else nothing is told beside
            told = partial(self.family.arguments, self.network, cond)
            cond = spoken(self.controlnet, x_t, timestep, cond, told, self.strength())
        return self.family.call(self.network, x_t, timestep, cond)


@dataclass(frozen=True)
class Teacher:
    """What a student learns of.

    Args:
        predict: its network, not guided, frozen.
        network: it, where it is one of its own; None: it is the student's without adapters.
        heard: whether it is told the scale of guidance itself.
        fingerprint: of its weights; of shapes alone "".
    """

    predict: Predictor
    network: nn.Module | None
    heard: bool
    fingerprint: str


@dataclass
class Model:
    """Networks and tokenizers by the names of their folders, with the noise they know.

    Args:
        family: how its folders look, and how its network is called.
        networks: those that there are.
        tokenizers: the same, on the meta device their shapes; and what prepares pictures.
        process: the noise.
        target: what the network predicts.
        learned_variance: whether it also predicts a variance.
        classes: of a model without text, () of an unconditional one; None: it reads text.
        sampling: how its folder states that it is drawn (``ldm.sampling.defaults``).
        stated: the same of the folder that it was read from.
        origin: what was read from folders, by the keys of a run's identity: fingerprints.
        zeros: whether no text is zeros to it, and not the encoding of the empty one.
        stored: folder with all of its networks but the one that predicts, where those are shapes
            alone, on the meta device.
        kept: folder of the parts that do not learn, where a run writes them from there and not from
            memory, in which they are rounded.
        teacher: of a student.
        scheduler: what its folder states of the scheduler beside noise and target.
        aside: what its network learns to be told of the picture itself.
        measures: whether mean and standard deviation of embeddings are to be measured yet.
    """

    family: Family
    networks: dict[str, Any]
    tokenizers: dict[str, Any]
    process: NoiseProcess
    target: Target
    learned_variance: bool = False
    classes: tuple[str, ...] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    zeros: bool = False
    stored: Path | None = None
    kept: Path | None = None
    teacher: Teacher | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    aside: Aside | None = None
    measures: bool = False

    @property
    def network(self) -> Any:
        """The one that predicts."""
        return self.networks[self.family.network]

    @property
    def codec(self) -> Codec:
        """What makes latents of pictures."""
        return self.family.codec(self.networks | self.tokenizers)

    @property
    def conditioner(self) -> Conditioner:
        """What makes conditions of captions; ``ValueError`` where parts do not belong together."""
        parts = self.networks, self.tokenizers
        return self.family.conditioner(*parts, self.classes, zeros=self.zeros)

    @property
    def denoiser(self) -> FamilyDenoiser:
        """The network, behind one call."""
        return FamilyDenoiser(self.family, self.network, self.networks.get(CONTROLNET))

    def seen_by(self, latent: Tensor) -> NoiseProcess:
        """The noise as pictures of the size of ``latent`` see it."""
        return self.process.seen_at(self.family.tokens(self.network, latent))

    def scheduler_config(self) -> dict[str, Any]:
        """What a saved folder says of noise and target."""
        learned, flow = self.learned_variance, self.family.flow
        config = scheduler_config(self.process, self.target, learned_variance=learned, flow=flow)
        return config | self.scheduler

    def drawn_with(self, asked: Validation | Score) -> SamplingDefaults:
        """What ``asked`` gives, over what the folder of the model states, over the defaults."""
        named = SamplingDefaults(sampler=default_sampler(self.scheduler_config()))
        return named.but(**self.family.drawing).but(**self.stated).but(**given(asked))


def given(asked: Validation | Score) -> dict[str, Any]:
    """What a config says of drawing, by the arguments of ``SamplingDefaults``."""
    told = {
        "num_inference_steps": asked.steps,
        "guidance_scale": asked.guidance,
        "sampler": asked.sampler,
    }
    return {name: value for name, value in told.items() if value is not None}
