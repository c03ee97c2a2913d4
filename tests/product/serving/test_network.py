"""Calls that share one network draw what each draws alone, to the bit."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from ldm.diffusion import Condition
from ldm.models import rows
from ldm.pipeline import LatentDiffusionPipeline
from ldm.sampling.names import OF_ANY_PROCESS
from ldm.serving import network as shared
from ldm.serving.network import Network
from runs import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
NAMES = ("ddim", "ddpm", "dpm++", "euler", "euler-a", "heun", "dpm2", "unipc", "pndm")
OWN = [name for name in OF_ANY_PROCESS if name not in ("ode-adaptive", "langevin", "pc")]


def asked() -> list[dict[str, Any]]:
    """Calls of many kinds, no two of which are alike."""
    found = []
    for number, sampler in enumerate((*NAMES, *OWN)):
        call = {
            "prompt": f"picture {number} " + "of many words " * (number % 3),
            "num_inference_steps": 1 + number % 3,
            "guidance_scale": (1.0, 3.0, 5.5)[number % 3],
            "sampler": sampler,
            "seed": number,
            "height": 16 + 8 * (number % 2),
            "width": 16,
            "prompt_syntax": "a1111" if number % 3 == 2 else None,
            "output_type": "pt",
        }
        if number % 4 == 3:
            pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
            call |= {"image": Image.fromarray(pixels), "height": 16, "strength": 0.7}
            call["num_inference_steps"] = 3
        if number % 8 == 7:
            mask = np.zeros((16, 16), np.uint8)
            mask[4:12, 4:12] = 255
            call["mask_image"] = Image.fromarray(mask)
        found.append(call)
    return found


def drawn(net: Network, call: dict[str, Any]) -> torch.Tensor:
    with net.drawing() as pipe:
        return pipe(**call).images


def in_company(net: Network, calls: list[dict[str, Any]]) -> list[torch.Tensor]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda call: drawn(net, call), calls))


@pytest.fixture
def evaluations() -> list[int]:
    return []


@pytest.fixture
def net(evaluations: list[int]) -> Iterator[Network]:
    found = Network(tiny.pipeline(), seen=lambda rows, seconds: evaluations.append(rows))
    found.start()
    yield found
    found.close()


def test_what_is_drawn_at_once_is_what_is_drawn_alone(net: Network, evaluations: list[int]) -> None:
    calls = asked()
    alone = [drawn(net, call) for call in calls]
    assert max(evaluations) == 2
    many, ours = sum(evaluations), len(evaluations)
    evaluations.clear()
    together = in_company(net, calls)
    same = [torch.equal(a, b) for a, b in zip(alone, together, strict=True)]
    assert same == [True] * len(calls)
    assert sum(evaluations) == many and max(evaluations) <= 8
    assert len(evaluations) < 0.7 * ours, "hardly anybody shares an evaluation"


def test_rows_that_know_each_other_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "separate", lambda network: None)
    pipe = LatentDiffusionPipeline.from_pretrained(ROOT / "assets" / "ldm-small")
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    calls = [{"prompt": "a red heart", "seed": seed, **steps} for seed in range(2)]
    same, exact = {}, {}
    for independent in (False, True):
        if independent:
            rows.separate(pipe.network)
        net = Network(pipe, most=4)
        net.start()
        with net.alone():
            told = pipe.conditioner.encode(["a red heart"])
        exact[independent] = net.exact(told, (4, 16, 16))
        alone = [drawn(net, call) for call in calls]
        pairs = zip(alone, in_company(net, calls), strict=True)
        same[independent] = [torch.equal(a, b) for a, b in pairs]
        net.close()
    assert not all(same[False]) and all(same[True])
    assert exact == {False: False, True: True}


def test_a_guided_picture_is_that_of_the_pipeline_itself(net: Network) -> None:
    call = {"prompt": "a", "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt"}
    plain = tiny.pipeline()(**call, seed=5).images
    assert torch.equal(drawn(net, {**call, "seed": 5}), plain)


def test_equal_neighbours_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of guided pictures, whose two rows are at one timestep."""
    layer, seen = torch.nn.Linear(8, 4), list[tuple[int, ...]]()
    plain = rows.linear
    monkeypatch.setattr(
        rows, "linear", lambda x, *of: (seen.append(tuple(x.shape)), plain(x, *of))[1]
    )
    rows.separate(layer)
    a, b = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    for order, read in (([a, a, b, b], 2), ([a, b, a, b], 4)):
        seen.clear()
        with torch.no_grad():
            found = layer(torch.cat(order))
        assert seen == [(2, 8)] * read
        alone = [plain(row.expand(2, -1), layer.weight, layer.bias)[:1] for row in order]
        assert torch.equal(found, torch.cat(alone))


def test_a_lone_row_is_asked_of_as_two() -> None:
    def knows(x_t: torch.Tensor, timestep: torch.Tensor, cond: Condition) -> torch.Tensor:
        assert len(x_t) == len(timestep) == len(cond)
        return x_t * len(x_t)

    ask, x_t = rows.paired(knows), torch.ones(3, 4, 2, 2)
    for count, said in ((1, 2), (2, 2), (3, 3)):
        cond = Condition(torch.zeros(count, 2, 3), pooled=torch.zeros(count, 3))
        found = ask(x_t[:count], torch.tensor(7), cond)
        assert torch.equal(found, said * x_t[:count])


def test_a_call_that_is_stopped_costs_two_evaluations_at_most(
    net: Network, evaluations: list[int]
) -> None:
    gone = threading.Event()

    class Gone(Exception):
        pass

    def check() -> None:
        if gone.is_set():
            raise Gone

    def seen(pipe: Any, index: int, timestep: Any, told: Any) -> None:
        if index == 2:
            gone.set()

    with pytest.raises(Gone), net.drawing(check=check) as pipe:
        pipe("a", num_inference_steps=200, seed=0, callback_on_step_end=seen)
    assert len(evaluations) <= 5
    assert drawn(net, asked()[0]).shape == (1, 3, 16, 16)  # the next is drawn


def test_an_error_of_the_network_is_that_of_who_asked(net: Network) -> None:
    with pytest.raises(ValueError, match="height must be a multiple"):
        drawn(net, {"prompt": "a", "height": 17})

    def broken(*told: Any) -> Any:
        raise RuntimeError("out of memory")

    whole, net._denoiser = net._denoiser, broken
    with pytest.raises(RuntimeError, match="out of memory"):
        drawn(net, {"prompt": "a", "num_inference_steps": 2})
    net._denoiser = whole
    assert drawn(net, asked()[0]).shape == (1, 3, 16, 16)


def test_adapters_are_put_in_for_those_who_draw_with_them(tmp_path: Path) -> None:
    put: list[Any] = []
    net = Network(tiny.pipeline(), put.append)
    net.start()
    call = {"prompt": "a", "num_inference_steps": 2, "seed": 0}
    for adapters in ((), (("one", 1.0),), (("one", 1.0),), (("one", 0.5),), ()):
        with net.drawing(adapters) as pipe:
            pipe(**call)
    net.close()
    assert put == [(), (("one", 1.0),), (("one", 0.5),), ()]


def test_batches_of_one_size_where_sizes_matter(evaluations: list[int]) -> None:
    seen: list[int] = []
    net = Network(tiny.pipeline(), most=4, constant=True)

    def denoiser(x_t: torch.Tensor, timestep: torch.Tensor, cond: Condition) -> torch.Tensor:
        seen.append(len(x_t))
        return x_t * len(x_t)  # which knows how many there are

    net._denoiser = denoiser
    told = Condition(torch.zeros(1, 2, 3))
    assert net.exact(told, (4, 8, 8)) and set(seen) == {4}
    net.least = 2
    assert not net.exact(told, (4, 8, 8))
