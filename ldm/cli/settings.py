"""What ``ldm sample`` draws pictures with, each by the name of its option, and the calls of a
pipeline that draw them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ldm.cli.edits import Edits, enlarging
from ldm.formats.png import Parameters
from ldm.sampling.names import canonical

_SEEDS = 2**32
_MOST = 256  # pictures that one is drawn among because its file says so
_WINDOWS = 64  # the same of the windows of its texts

Company = tuple[int, int, int, int]
"""Where in its batch a picture was drawn, of how many pictures, of how many texts, and the windows
that the texts of its call were read in. A batch of another shape rounds otherwise.
"""


@dataclass(frozen=True)
class Settings:
    """Options of a picture, each as it was given.

    Args:
        negative: what to steer away from.
        seed: of the picture.
        size: WxH in pixels.
        steps: of the sampler.
        guidance: scale.
        guidance_rescale: 0 to 1.
        guidance_interval: LOW,HIGH.
        sampler: a name, or "model".
        strength: of image to image.
        variation_seed: of other noise.
        variation_strength: how far towards it.
        syntax: "a1111", or None.
        argument: NAME=VALUE of the model's family, each.
        enlarge: SCALE,STRENGTH,BY of a second pass.
    """

    negative: str = ""
    seed: int = 0
    size: str | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: str | None = None
    sampler: str | None = None
    strength: float | None = None
    variation_seed: int | None = None
    variation_strength: float = 0.1
    syntax: str | None = None
    argument: tuple[str, ...] = ()
    enlarge: str | None = None

    def checked(self) -> Settings:
        """The same, the sampler in this library's words.

        Raises:
            ValueError: one is none; the message names its option.
        """
        self.sides()
        self.interval()
        self.arguments()
        enlarging(self.enlarge)
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"--guidance-rescale must lie in 0..1, not {self.guidance_rescale}")
        if self.syntax not in (None, "a1111"):
            raise ValueError(f"--syntax is a1111, or left out, not {self.syntax!r}")
        if self.sampler in (None, "model"):
            return self
        return replace(self, sampler=canonical(str(self.sampler)))

    def but(self, told: Mapping[str, Any]) -> Settings:
        """The same with what a file says by these names.

        Raises:
            ValueError: there is no such setting, or its value is none; the message names it.
        """
        return replace(
            self, **{name: _value(name, value) for name, value in told.items()}
        ).checked()

    def sides(self) -> tuple[int | None, int | None]:
        """Width and height; ``ValueError`` if the size is none."""
        if self.size is None:
            return None, None
        found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", self.size)
        if found is None:
            raise ValueError(f"--size must look like 512x512, not {self.size!r}")
        return int(found[1]), int(found[2])

    def interval(self) -> tuple[float, float] | None:
        """The interval of guidance as numbers; ``ValueError`` if it is none."""
        text = self.guidance_interval
        if text is None:
            return None
        try:
            low, high = map(float, text.split(","))
        except ValueError:
            raise ValueError(f"--guidance-interval must look like -3,3, not {text!r}") from None
        if not low < high:
            raise ValueError(f"--guidance-interval: {low:g} is not less than {high:g}")
        return low, high

    def arguments(self) -> dict[str, Any]:
        """By name, a number or several; ``ValueError`` if one is none."""
        found: dict[str, Any] = {}
        for text in self.argument:
            name, _, value = text.partition("=")
            try:
                parts = value.split(",")
                numbers = [int(part) if part.isdecimal() else float(part) for part in parts]
            except ValueError:
                numbers = []
            if not numbers or not name.isidentifier():
                raise ValueError(
                    f"--argument must look like NAME=4.5 or NAME=512,512, not {text!r}"
                )
            found[name] = numbers[0] if len(numbers) == 1 else tuple(numbers)
        return found

    def parameters(self, prompt: str, **told: Any) -> Parameters:
        """What a web UI reads of them, beside what is ``told`` of the picture."""
        width, height = self.sides()
        varied = self.variation_seed is not None
        return Parameters(
            prompt,
            negative=self.negative,
            **{
                "steps": self.steps,
                "sampler": self.sampler,
                "guidance": self.guidance,
                "seed": self.seed,
                "width": width,
                "height": height,
                "rescale": self.guidance_rescale or None,
                "interval": self.guidance_interval,
                "strength": self.strength,
                "variation_seed": self.variation_seed,
                "variation_strength": self.variation_strength if varied else None,
                "arguments": " ".join(self.argument) or None,
            }
            | told,
        )


def of_parameters(found: Parameters) -> dict[str, Any]:
    """What ``found`` says of settings, by their names."""
    told = {
        "negative": found.negative,
        "seed": found.seed,
        "size": f"{found.width}x{found.height}" if found.width and found.height else None,
        "steps": found.steps,
        "guidance": found.guidance,
        "guidance_rescale": found.rescale,
        "guidance_interval": found.interval,
        "sampler": found.sampler,
        "strength": found.strength,
        "variation_seed": found.variation_seed,
        "variation_strength": found.variation_strength,
        "argument": tuple(found.arguments.split()) if found.arguments else None,
    }
    return {name: value for name, value in told.items() if value is not None}


_DEFAULTS = asdict(Settings())
_WHOLE = {"seed": 0, "steps": 1, "variation_seed": 0}  # and the least of each
_REAL = {"guidance", "guidance_rescale", "strength", "variation_strength"}
_SHARES = {"strength", "variation_strength"}


def _value(name: str, value: Any) -> Any:
    """What a file says of a setting, as the setting has it."""
    if name not in _DEFAULTS:
        near = difflib.get_close_matches(name, ["prompt", *_DEFAULTS], n=1, cutoff=0.5)
        meant = f", did you mean {near[0]}?" if near else ":"
        raise ValueError(f"{name} is no setting{meant} There are prompt, {', '.join(_DEFAULTS)}")
    if value is None and _DEFAULTS[name] is None:
        return None
    option = f"--{name.replace('_', '-')}"
    if name in _WHOLE:
        if type(value) is not int or not _WHOLE[name] <= value < _SEEDS:
            raise ValueError(f"{option} must be a whole number from {_WHOLE[name]}, not {value!r}")
        return value
    if name in _REAL:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{option} must be a finite number, not {value!r}")
        if name in _SHARES and not 0 <= value <= 1:
            raise ValueError(f"{option} must lie in 0..1, not {value}")
        return float(value)
    if name == "argument":
        if isinstance(value, dict):
            parts = {k: v if isinstance(v, list) else [v] for k, v in value.items()}
            value = [f"{key}={','.join(map(str, each))}" for key, each in parts.items()]
        if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
            raise ValueError(f'{option} must look like {{"NAME": 4.5}}, not {value!r}')
        return tuple(value)
    if not isinstance(value, str):
        raise ValueError(f"{option} must be a text, not {value!r}")
    return value


@dataclass(frozen=True)
class Row:
    """A prompt and what it is drawn with.

    Args:
        prompt: the text.
        settings: those of its first picture.
        own: names of those that are its own, and not of the command.
        where: what an error of it begins with.
        company: it is drawn in, if in any.
        label: what a page says of it, in place of the prompt.
    """

    prompt: str
    settings: Settings
    own: frozenset[str] = frozenset()
    where: str = ""
    company: Company | None = None
    label: str | None = None

    def shots(self, before: int, count: int) -> list[Settings]:
        """Of each of its ``count`` pictures, ``before`` which there are others of the command."""
        name = "seed" if self.settings.variation_seed is None else "variation_seed"
        first = getattr(self.settings, name) + (0 if name in self.own else before)
        return [replace(self.settings, **{name: first + k}) for k in range(count)]


@dataclass(frozen=True)
class Drawn:
    """A picture, and what it was drawn with.

    Args:
        picture: PIL.
        prompt: its text.
        settings: with what the folder states in place of what was not asked for.
        scheduler: the class of the model's own sampler, where that was asked for.
        company: it was drawn in, if in any.
        before: the pictures that it was enlarged from, if they are written.
    """

    picture: Any
    prompt: str
    settings: Settings
    scheduler: str | None
    company: Company | None
    before: tuple[Any, ...] = ()

    def parameters(self, **told: Any) -> Parameters:
        """What a web UI reads, beside what is ``told`` of the command."""
        of_it: dict[str, Any] = {"width": self.picture.width, "height": self.picture.height}
        if self.scheduler is not None:
            of_it["sampler"] = self.scheduler
        return self.settings.parameters(self.prompt, **of_it | told)


@dataclass
class Call:
    """Rows that one call of the pipeline draws.

    Args:
        each: pictures of every prompt.
        where: what an error of it begins with.
        company: the one picture is drawn in.
        prompts: texts.
        shots: settings of each picture, alike but for seeds and negative prompts.
    """

    each: int
    where: str
    company: Company | None
    prompts: list[str] = field(default_factory=list)
    shots: list[Settings] = field(default_factory=list)

    def asked(self, pipe: Any, edit: Edits, batch: int) -> dict[str, Any]:
        """Arguments of the call of ``pipe``."""
        from ldm.guidance import ClassifierFree

        common, prompts, shots, each = self.resolved(pipe), self.prompts, self.shots, self.each
        if self.company is not None:
            _, batch, texts, windows = self.company
            each = math.ceil(batch / texts)
            longest = [" BREAK ".join("a" * windows)] if windows > 1 else []
            prompts = prompts * texts + longest
            shots = shots * (each * len(prompts))
        width, height = common.sides()
        negatives = [shot.negative for shot in shots[::each]]
        found: dict[str, Any] = {
            "prompt": prompts,
            "height": height,
            "width": width,
            "num_inference_steps": common.steps,
            "guidance_scale": common.guidance,
            "guidance_rescale": common.guidance_rescale,
            "negative_prompt": negatives[0] if len(set(negatives)) == 1 else negatives,
            "num_images_per_prompt": each,
            "sampler": None if common.sampler == "model" else common.sampler,
            "prompt_syntax": common.syntax,
            "batch_size": batch,
        }
        if (enlarge := enlarging(common.enlarge)) is not None:
            found["enlarge"] = tuple(enlarge)
        interval = common.interval()
        if interval is not None:
            rescale = common.guidance_rescale
            found["guidance"] = ClassifierFree(common.guidance, rescale, interval)
        others = [shot.variation_seed for shot in shots if shot.variation_seed is not None]
        return found | edit.call([shot.seed for shot in shots], others) | common.arguments()

    def resolved(self, pipe: Any) -> Settings:
        """What all have, with what the folder of ``pipe`` states."""
        first = self.shots[0]
        how = pipe.sampling_defaults.but(
            num_inference_steps=first.steps, guidance_scale=first.guidance, sampler=first.sampler
        )
        return replace(
            first, steps=how.num_inference_steps, guidance=how.guidance_scale, sampler=how.sampler
        )

    def told(self, pipe: Any, edit: Edits, batch: int, pictures: Sequence[Any]) -> Iterator[Drawn]:
        """The ``pictures`` that the call drew, each with what it was drawn with."""
        common, company = self.resolved(pipe), self.company
        if company is not None:
            pictures = pictures[company[0] :][:1]
        if pipe.reads == ():
            common = replace(common, guidance=1.0)  # there is nothing to guide by
        longest = self._windows(pipe, self.prompts + [shot.negative for shot in self.shots])
        for i, (picture, shot) in enumerate(zip(pictures, self.shots, strict=True)):
            start = i // batch * batch
            of = min(batch, len(self.shots) - start)
            texts = (start + of - 1) // self.each - start // self.each + 1
            prompt = self.prompts[i // self.each]
            own = self._windows(pipe, [prompt, shot.negative]) if longest > 1 else 1
            windows = longest if longest > own else 1
            yield Drawn(
                picture,
                prompt,
                replace(
                    common,
                    negative=shot.negative,
                    seed=shot.seed,
                    variation_seed=shot.variation_seed,
                    size=edit.size(picture, shot),
                    strength=edit.share(),
                ),
                type(pipe.scheduler).__name__ if common.sampler == "model" else None,
                company or ((i - start, of, texts, windows) if max(of, windows) > 1 else None),
            )

    def _windows(self, pipe: Any, texts: Sequence[str]) -> int:
        """In which ``texts`` are read if they are of one call."""
        from ldm.prompts.windows import count

        towers = pipe.conditioner.towers.values()
        return max([count(tower, texts, self.shots[0].syntax) for tower in towers], default=1)


def calls(rows: Sequence[Row], count: int) -> list[Call]:
    """Those that draw ``count`` pictures of each row; rows that follow each other and are alike
    share one.
    """
    found: list[Call] = []
    last: Any = None
    for number, row in enumerate(rows):
        varied = row.settings.variation_seed is not None
        alike = replace(row.settings, negative="", seed=0, variation_seed=0 if varied else None)
        if not found or alike != last or row.company is not None:
            found.append(Call(count, row.where, row.company))
        last = alike
        found[-1].prompts.append(row.prompt)
        found[-1].shots.extend(row.shots(number * count, count))
    return found


def company(value: Any) -> Company | None:
    """What a file says of a picture's company; ``ValueError`` if it is none."""
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 4 and all(type(n) is int for n in value):
        place, of, texts, windows = value
        if 0 <= place < of <= _MOST and 1 <= texts <= of and 1 <= windows <= _WINDOWS:
            return place, of, texts, windows
    raise ValueError(f"batch must be [place, pictures, texts, windows], not {value!r}")
