"""A LoRA of a file that learns on: its weights to the bit, and a run that needs the file once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import tiny_flux
from ldm.config.loader import validate
from ldm.config.schema import TrainConfig
from ldm.errors import CheckpointError, ConfigError
from ldm.families.build import build
from ldm.families.model import Model
from ldm.formats import lora
from ldm.models.lora import Update, collect, named, weights
from ldm.pipeline import LatentDiffusionPipeline
from loras import equal, short
from runs import train, tree

pytestmark = pytest.mark.usefixtures("kept_cache")
BOTH = ["unet", "text_encoder"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("base") / "model")


def asked(base: Path, file: Path | str, **changes: Any) -> dict[str, Any]:
    parts = {"model": str(base), "vae": None, "text": None, "unet": None, "train": BOTH}
    more = {"lora": {"file": str(file)}, "optimizer": {"lr": 1e-2}}
    return {**parts, **more, **changes}


def built(base: Path, file: Path | str, meta: bool = False, **changes: Any) -> Model:
    config = validate(TrainConfig, tree(Path("run"), **asked(base, file, **changes)))
    return build(config, [], meta=meta)


@pytest.fixture(scope="module")
def there(base: Path) -> lora.Lora:
    """Of two networks, with DoRA in one, ranks and alphas of which no two are alike, and names that
    are the ends of others."""
    generator = torch.Generator().manual_seed(0)
    model = built(base, "", lora=None)
    ends = {"unet": ("to_q", "to_out.0", "proj_in", "conv1"), "text_encoder": ("fc1", "q_proj")}
    found: dict[str, dict[str, Update]] = {}
    for part, targets in ends.items():
        modules = dict(model.networks[part].named_modules()).items()
        chosen = [(name, m) for name, m in modules if name.endswith(targets)]
        for rank, (name, module) in enumerate(chosen, 1):
            out, *rest = module.weight.shape
            draw = [(rank, *rest), (out, rank, *(1 for _ in rest[1:]))]
            down, up = (torch.randn(shape, generator=generator).half() for shape in draw)
            m = torch.rand(out, generator=generator).half()
            m = m if len(rest) == 1 else m.reshape(1, -1, 1, 1)
            dora = m if part == "unet" else None
            found.setdefault(part, {})[name] = Update(down, up, rank / 2 + 0.25, dora)
    return found


def in_float32(read: lora.Lora) -> lora.Lora:
    def one(u: Update) -> Update:
        m = None if u.magnitude is None else u.magnitude.float()
        return Update(u.down.float(), u.up.float(), u.alpha, m)

    return {part: {name: one(u) for name, u in read[part].items()} for part in read}


def test_a_file_learns_on_from_its_own_bits(base, there, tmp_path):
    assert min(len(there[part]) for part in BOTH) > 1
    prints = set()
    for form in ("kohya", "diffusers"):
        file = lora.write(there, tmp_path / f"{form}.safetensors", form)
        before = torch.get_rng_state()
        model = built(base, file)
        assert torch.equal(torch.get_rng_state(), before)
        for part, updates in in_float32(there).items():
            made = weights(model.networks[part])
            assert made.keys() == named(updates).keys()
            assert all(torch.equal(made[k], v) for k, v in named(updates).items())
        assert equal({part: collect(model.networks[part]) for part in BOTH}, in_float32(there))
        prints.add(model.origin["lora.file"])
        shapes = built(base, file, meta=True)
        for part in BOTH:
            one, other = (weights(m.networks[part]) for m in (model, shapes))
            assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    assert len(prints) == 1  # one LoRA, whatever the format
    first = next(iter(there["unet"]))
    other = {**there["unet"][first].__dict__, "alpha": 7.0}
    lora.write(
        {**there, "unet": {**there["unet"], first: Update(**other)}}, tmp_path / "other.safetensors"
    )
    prints.add(built(base, tmp_path / "other.safetensors").origin["lora.file"])
    assert len(prints) == 2


def test_the_file_is_needed_once(base, there, tmp_path):
    file = lora.write(there, tmp_path / "in.safetensors")
    whole, broken = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    every = {
        "data": {"kind": "shapes", "count": 12, "size": 16},
        "batch_size": 4,
        "duration": "2 steps",
        "checkpoints": {"every": "1 step", "keep": 9},
    }
    train(whole, **asked(base, file, **every))
    first, last = (f"checkpoints/images-{4 * steps:012d}" for steps in (1, 2))
    assert not equal_weights(lora.read(whole / first), in_float32(there))  # it has learnt
    shutil.copytree(whole / first, broken / first)
    moved = file.rename(tmp_path / "moved.safetensors")
    train(broken, **asked(base, file, **every))
    for name in (f"final/{lora.FILE}", f"{last}/training/raw.safetensors", f"{last}/{lora.FILE}"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    raw = load_file(whole / last / "training" / "raw.safetensors")
    assert len(raw) == sum(2 + (part == "unet") for part in there for _ in there[part])
    identity = json.loads((whole / last / "training" / "run.json").read_text())["identity"]
    assert len(json.loads(identity["lora.file"])) == 64  # and no path
    told = lora.told(whole / "final")
    assert told["ss_network_dim"] == told["ss_network_alpha"] == "Dynamic"
    # Another LoRA is another run.
    lora.write({**there, "text_encoder": dict(list(there["text_encoder"].items())[1:])}, moved)
    with pytest.raises(CheckpointError, match="lora.file: the LoRA that it holds changed"):
        train(broken, **asked(base, moved, **every))
    with pytest.raises(ConfigError, match=rf"lora\.file: {file}: there is no such file or folder"):
        train(tmp_path / "new", **asked(base, file, **every))


def equal_weights(one: lora.Lora, other: lora.Lora) -> bool:
    pairs = [(one[p][n], other[p][n]) for p in one for n in one[p]]
    return all(torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in pairs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"rank": 4}}, r"lora\.rank is 4, and in \S+ it is 2 in unet: leave it out, and"),
        ({"lora": {"alpha": 2}}, r"lora\.alpha is 2\.0, and in \S+ it is 3\.0 in unet: leave it"),
        ({"lora": {"dora": True}}, r"lora\.dora is True, and in \S+ it is False in unet: leave"),
        (
            {"lora": {"targets": ["to_q", "to_k"]}},
            r"lora\.targets means other modules of unet than \S+ has, \S+to_k for one: leave it",
        ),
        ({"train": ["unet"]}, r"lora\.file: \S+ has updates of text_encoder as well: add it to tr"),
        ({"lora": {"rank": 2, "alpha": 3, "dora": False, "targets": ["to_q"]}}, None),
        (
            {"unet": {"block_out_channels": [24]}},
            r"is not for this unet: there is no layer \S+to_q$",
        ),
    ],
)
def test_what_does_not_agree_with_the_file_is_named(base, there, tmp_path, change, message):
    def short(part: str, end: str) -> dict[str, Update]:
        made = {name: u for name, u in there[part].items() if name.endswith(end)}
        return {
            n: Update(u.down[:1].repeat(2, 1), u.up[:, :1].repeat(1, 2), 3) for n, u in made.items()
        }

    file = tmp_path / "in.safetensors"
    lora.write({"unet": short("unet", "to_q"), "text_encoder": short("text_encoder", "fc1")}, file)
    change = {**change, "lora": {"file": str(file), **change.get("lora", {})}}
    if message is None:
        built(base, file, meta=True, **change)
        return
    with pytest.raises(ConfigError, match=message) as caught:
        built(base, file, meta=True, **change)
    assert "\n" not in str(caught.value)
    alone = lora.write({"unet": short("unet", "to_q")}, tmp_path / "alone.safetensors")
    with pytest.raises(ConfigError, match="has no updates of text_encoder, which train names, but"):
        built(base, alone, meta=True)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_kohya_s_file_of_a_transformer_learns_on(tmp_path):
    LatentDiffusionPipeline(**tiny_flux.components(), unet=None).save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(s, generator=generator) for s in ((2, 16), (16, 2)))
    stem, file = "lora_unet_double_blocks_0_img_attn_proj", tmp_path / "in.safetensors"
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(8.0)}
    save_file({f"{stem}.{key}": value for key, value in tensors.items()}, file)
    config = short(
        "flux_lora", tmp_path / "base", tmp_path / "run", "lora=null", f"lora={{file: {file}}}"
    )
    ((name, update),) = collect(build(config, []).network).items()
    assert name == "transformer_blocks.0.attn.to_out.0"
    moved = update.alpha / update.rank * update.up @ update.down
    assert (moved - 4.0 * up @ down).abs().max() <= 1e-5
