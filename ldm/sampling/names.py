"""The names of the samplers, and those by which others know them.

A1111 and ComfyUI, k-diffusion, CompVis and the classes of diffusers call the same methods
differently. An alias is a name of the same method, no more: with Karras' noise levels, a noise of
its own (SDE) or another order it is another sampler, and so it is no alias. Told without torch, so
that a config and a command line can be read before it is imported.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple


class Known(NamedTuple):
    """How others call a sampler.

    Args:
        label: A1111, in its menu and in the pictures that it saves.
        aliases: and others, folded, with spaces between.
    """

    label: str
    aliases: str


SCHEDULED: dict[str, Known] = {
    "ddim": Known("DDIM", "ddimscheduler"),
    "ddpm": Known("DDPM", "ddpmscheduler"),
    "dpm++": Known(
        "DPM++ 2M",
        "dpmpp dpm++2m dpmpp_2m dpmpp2m k_dpmpp_2m k_dpm++_2m dpmsolver++ dpmsolvermultistep"
        " dpmsolvermultistepscheduler",
    ),
    "euler": Known("Euler", "k_euler euler_discrete eulerdiscretescheduler"),
    "euler-a": Known(
        "Euler a",
        "euler_ancestral eulera k_euler_a k_euler_ancestral eulerancestral"
        " eulerancestraldiscretescheduler",
    ),
    "heun": Known("Heun", "k_heun heundiscretescheduler"),
    "dpm2": Known("DPM2", "dpm_2 k_dpm2 k_dpm_2 kdpm2 kdpm2discretescheduler"),
    "unipc": Known("UniPC", "uni_pc_bh2 unipcmultistep unipcmultistepscheduler"),
    "pndm": Known("PLMS", "pndmscheduler"),
    "flow-euler": Known(
        "FlowMatch Euler",
        "flowmatcheuler flowmatcheulerdiscrete flowmatcheulerdiscretescheduler",
    ),
    "flow-heun": Known(
        "FlowMatch Heun", "flowmatchheun flowmatchheundiscrete flowmatchheundiscretescheduler"
    ),
    "lcm": Known("LCM", "lcmscheduler k_lcm"),
    "tcd": Known("TCD", "tcdscheduler"),
}
"""The samplers that are schedulers of diffusers."""
OF_ANY_PROCESS = ("ode-euler", "ode-heun", "ode-adaptive", "sde", "ancestral", "langevin", "pc")
"""This library's own, which run any process."""
NAMES = (*SCHEDULED, *OF_ANY_PROCESS)
"""All of them, as errors and ``--help`` list them; ``samplers`` says how each steps."""


def _folded(name: str) -> str:
    """Upper case, spaces and hyphens make no difference."""
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


_KNOWN = {_folded(name): name for name in NAMES} | {
    alias: name
    for name, known in SCHEDULED.items()
    for alias in (_folded(known.label), *known.aliases.split())
}


def canonical(name: str) -> str:
    """The one of ``NAMES`` that ``name`` stands for; ``ValueError`` tells the nearest otherwise."""
    asked = _folded(name)
    if asked in _KNOWN:
        return _KNOWN[asked]
    without = asked.removesuffix("_karras")
    if without != asked and without in _KNOWN:
        raise ValueError(
            f"sampler {name!r}: no named sampler steps through Karras' noise levels; without them"
            f" it is {_KNOWN[without]!r}, and pipe.scheduler = SCHEDULER.from_config("
            "pipe.scheduler.config, use_karras_sigmas=True) with sampler=None steps through them"
        )
    (near,) = difflib.get_close_matches(asked, _KNOWN, n=1, cutoff=0.0)
    raise ValueError(
        f"unknown sampler {name!r}: did you mean {_KNOWN[near]!r}? There are {', '.join(NAMES)}"
    )
