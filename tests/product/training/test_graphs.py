"""Steps that are recorded and replayed, by a double of a GPU: the same run in the same memory."""

import json
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launched import digests
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.diffusion import process
from ldm.engine import graphs
from ldm.engine.graphs import WARM, Graphs, graphs_of, recorder_of
from ldm.engine.sampler_state import Memory
from ldm.errors import ConfigError
from ldm.tasks.text_to_image import step
from runs import train, tree

pytestmark = pytest.mark.usefixtures("kept_cache")


class Double:
    """Records as a GPU does: nothing is computed meanwhile; a replay reads and writes the memory
    that was there.
    """

    def __init__(self, weights=()) -> None:
        self.weights, self.calls, self.fails = list(weights), [], False

    def warm(self, work):
        self.calls.append("warm")
        return work()

    def record(self, work):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing. And so on")
        self.calls.append("record")
        before = [(p, p.grad, p.grad.clone()) for p in self.weights if p.grad is not None]
        made = work()
        for p, grad, value in before:
            assert p.grad is grad  # added in place
            grad.copy_(value)
        for value in made.values():
            value.fill_(torch.nan)

        def replay() -> None:
            self.calls.append("replay")
            for name, value in work().items():
                made[name].copy_(value)

        return made, replay


class Layers:
    """Two layers, of which one is not reached, with dropout, and a step's worth of what is done."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.weights = dict(self.network.named_parameters()) | {"no": nn.Parameter(torch.ones(2))}

    def work(self, batch):
        loss = self.network(batch["x"]).square().mean(1)
        loss.sum().backward()
        return {"loss": loss.detach()}


def batches():
    generator = torch.Generator().manual_seed(1)
    for number, length in enumerate([3, 3, 2, 3, 3, 2, 2, 3, 2, 2, 3, 2]):
        yield number, {"x": torch.randn(length, 4, generator=generator)}


def test_one_graph_for_each_shape_in_the_memory_of_all():
    plain, mine = Layers(), Layers()
    double = Double(mine.weights.values())
    recorded = Graphs(mine.work, mine.weights, double)
    where = None
    for number, batch in batches():
        seed = partial(torch.manual_seed, number)
        seed()
        expected, given = plain.work(batch)["loss"], {n: x.clone() for n, x in batch.items()}
        assert torch.equal(recorded(given, seed)["loss"], expected), number
        if number % 2:  # a step of two micro-batches
            for name, p in plain.weights.items():
                grad = mine.weights[name].grad
                assert (grad is None) == (p.grad is None) == (name == "no")
                assert p.grad is None or torch.equal(grad, p.grad), (number, name)
                p.grad = None
            if recorded.recorded:
                found = [p.grad.data_ptr() for n, p in mine.weights.items() if n != "no"]
                where = where or found
                assert found == where
            if not recorded.clear():
                for p in mine.weights.values():
                    p.grad = None
            assert all(p.grad is None or not p.grad.any() for p in mine.weights.values())
    assert len(recorded.recorded) == 2 and double.calls.count("record") == 2
    assert double.calls.count("warm") == 2 * WARM and double.calls.count("replay") == 12 - 2 * WARM


def test_what_cannot_be_recorded_is_told_once(caplog):
    mine, plain = Layers(), Layers()
    double = Double(mine.weights.values())
    double.fails = True
    recorded = Graphs(mine.work, mine.weights, double)
    with caplog.at_level(logging.WARNING):
        for number, batch in batches():
            seed = partial(torch.manual_seed, number)
            found = recorded(batch, seed)
            seed()
            assert torch.equal(plain.work(batch)["loss"], found["loss"])
    (line,) = caplog.messages
    assert line.endswith("does without: operation not permitted when stream is capturing")
    assert not recorded.clear() and "record" not in double.calls
    for name, p in plain.weights.items():
        assert p.grad is None or torch.equal(mine.weights[name].grad, p.grad)


def test_a_run_of_graphs_is_the_same_run(tmp_path, monkeypatch):
    """With dropout, a validation between, and two micro-batches of each step."""
    doubles = []

    def made(work, weights, recorder):
        doubles.append(Double(weights.values()))
        return Graphs(work, weights, doubles[-1])

    monkeypatch.setattr(graphs, "recorder_of", lambda device: None)
    monkeypatch.setattr(graphs, "Graphs", made)
    found = {}
    for way in (False, True):
        run = tmp_path / str(way)
        final = train(
            run, cuda_graphs=way, duration="3 steps", batch_size=4, micro_batch_size=2,
            dropout=0.1, validation={"every": "2 steps", "images": 2, "levels": 1},
        )  # fmt: skip
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        keys = ("loss", "gradient_norm", "held_out_loss")
        found[way] = [[line.get(key) for key in keys] for line in lines], digests(final, at_least=3)
    assert found[False] == found[True] and len(found[True][0]) == 5
    (double,) = doubles
    assert double.calls == ["warm"] * WARM + ["record"] + ["replay"] * (6 - WARM)


class Watch(TorchDispatchMode):
    """What makes the host wait, or sends what lies in its memory: neither can be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(func)
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        there = torch.device(kwargs.get("device") or "cpu").type
        sends = "copy" in name and devices | {there} == {"cpu", "cuda"} and "cpu" in devices
        if sends or "_local_scalar_dense" in name or "nonzero" in name:
            self.found.append(name)
        return func(*args, **kwargs)


@pytest.fixture
def imagined(monkeypatch):
    """Lets networks be on a GPU that is not there, and forgets what was cached for it. It computes
    no gradients, which times are asked for theirs.
    """
    monkeypatch.setattr(torch.autograd, "grad", lambda y, x: (torch.ones_like(x),))
    future = torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)
    yield
    future.set_overwrite_module_params_on_conversion(before)
    process._nodes.cache_clear()


def test_a_step_neither_waits_for_the_device_nor_sends_it_anything(tmp_path, imagined):
    asked = validate(TrainConfig, tree(tmp_path, train=["unet", "text_encoder"]))
    made, found = step(asked), []
    with torch.device("meta"):
        example = made.task.example(2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in made.networks.values():
            network.to_empty(device="cuda")
        batch = {n: torch.empty(x.shape, dtype=x.dtype, device="cuda") for n, x in example.items()}
        for _ in range(2):
            with Watch() as watch:
                terms = made.task(batch)
            found.append(watch.found)
    assert terms["loss"].device.type == "cuda"
    # The table of levels, once; before anything is recorded.
    assert found == [["aten._to_copy.default"] * 2, []]


def test_what_graphs_exclude(tmp_path):
    def asked(**changes):
        config = validate(TrainConfig, tree(tmp_path, **{"cuda_graphs": True} | changes))
        return partial(graphs_of, config)

    one, two = (SimpleNamespace(num_processes=n, device=torch.device("cpu")) for n in (1, 2))
    rest = (Memory(), lambda batch: batch, {})
    assert asked(cuda_graphs=False)(two, *rest) is None
    with pytest.raises(ConfigError, match="^cuda_graphs: there is no CUDA GPU here"):
        asked()(one, *rest)
    with pytest.raises(ConfigError, match="^cuda_graphs: not with several processes"):
        asked()(two, *rest)
    with pytest.raises(ConfigError, match="not with optimizer.in_backward"):
        asked(optimizer={"in_backward": True, "clip_norm": None})(one, *rest)
    with pytest.raises(ConfigError, match="not with precision float16"):
        asked(precision="float16")(one, *rest)
    learnt = SimpleNamespace()
    with pytest.raises(ConfigError, match="not with objective.times that learn"):
        asked()(one, learnt, *rest[1:])
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        recorder_of(torch.device("cpu"))
