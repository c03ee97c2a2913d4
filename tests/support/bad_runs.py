"""Configs, model folders, archives, run folders and LoRA files of every kind that is wrong.

A row of a table is a kind of input: what makes it, and a part of the one line that names it. What
is wrong with pictures and captions is in ``bad_data``.
"""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# -- configs: the text of a file, or what changes in a good config --

NESTED = "a: " + "[" * 5000
CONFIGS: dict[str, tuple[str | bytes | dict[str, Any], str]] = {
    "empty": ("", "key 'run' is required"),
    "a list": ("- 1\n", "must hold keys and values"),
    "a word": ("run", "must hold keys and values"),
    "open bracket": ("run: [1", "line 1 cannot be used: expected ',' or ']'"),
    "tab": ("run: a\n\tseed: 1\n", "line 2 cannot be used: "),
    "key twice": ("seed: 1\nseed: 2\n", "line 2 cannot be used: key 'seed' stands twice"),
    "deep": (NESTED, "cannot be used: nested too deep"),
    "list as key": ("[1, 2]: 3\n", "line 1 cannot be used: a key is a list or a mapping"),
    "number as key": ("1: 3\n", "unknown key '1'"),
    "null as key": ("null: 3\n", "unknown key 'None'"),
    "python object": ("run: !!python/object:os.system {}\n", "is no plain value"),
    "unknown anchor": ("run: *a\n", "found undefined alias"),
    "endless anchor": ("run: &a [*a]\n", "nested too deep"),
    "Latin-1": (b"run: caf\xe9\n", "is not UTF-8 text"),
    "zeros": (bytes(64), "cannot be used: "),
    "two documents": ("run: a\n---\nrun: b\n", "cannot be used: "),
    "unknown key": ({"batchsize": 3}, "unknown key 'batchsize'; did you mean 'batch_size'?"),
    "key of a part": ({"lr": 1}, "unknown key 'lr'; did you mean 'optimizer.lr'?"),
    "key in a part": ({"optimizer": {"lrr": 1}}, "did you mean 'optimizer.lr'?"),
    "key of another kind": ({"data": {"kind": "shapes", "path": "x"}}, "kind 'folder' does"),
    "unknown kind": ({"data": {"kind": "shape"}}, "key 'data.kind' is 'shape': known kinds"),
    "kind no text": ({"data": {"kind": ["shapes"]}}, "known kinds: 'folder', 'webdataset'"),
    "data as text": ({"data": "pictures"}, "key 'data' is 'pictures': input should be keys and"),
    "no data": ({"data": []}, "data: "),
    "data without path": ({"data": {"kind": "folder"}}, "key 'data.path' is required"),
    "text for a number": ({"batch_size": "many"}, "key 'batch_size' is 'many'"),
    "no images": ({"batch_size": 0}, "key 'batch_size' is 0: input should be greater than 0"),
    "half an image": ({"batch_size": 1.5}, "key 'batch_size' is 1.5"),
    "negative rate": ({"optimizer": {"lr": -1}}, "key 'optimizer.lr' is -1"),
    "endless rate": ({"optimizer": {"lr": float("inf")}}, "key 'optimizer.lr' is inf"),
    "no number": ({"optimizer": {"lr": float("nan")}}, "key 'optimizer.lr' is nan"),
    "one beta": ({"optimizer": {"betas": [0.9]}}, "key 'optimizer.betas' has too few values"),
    "three betas": ({"optimizer": {"betas": [0.9, 0.9, 0.9]}}, "key 'optimizer.betas'"),
    "beta 1": ({"optimizer": {"betas": [0.9, 1]}}, "key 'optimizer.betas.1' is 1"),
    "no duration": ({"duration": "soon"}, "duration: 'soon' is no duration: write '20k steps'"),
    "plain number": ({"duration": 300}, "duration: 300 is no duration"),
    "huge duration": ({"duration": "9" * 400 + " steps"}, "duration: longer than can be counted"),
    "never saved": ({"checkpoints": {"every": "0 steps"}}, "checkpoints.every: '0 steps' is no in"),
    "micro-batch": ({"micro_batch_size": 5}, "micro_batch_size 5 does not divide the 16 images"),
    "precision": ({"precision": "fp16"}, "key 'precision' is 'fp16': input should be 'auto'"),
    "no part learns": ({"train": []}, "key 'train'"),
    "frozen part learns": ({"train": ["vae"]}, "train.0: 'vae' is no part: write unet or"),
    "part as text": ({"train": "unet"}, "key 'train' is 'unet': input should be a list"),
    "no part": ({"vae": None}, "vae is not described: give vae, or model, a pipeline folder"),
    "dropout": ({"text_dropout": 2}, "key 'text_dropout' is 2"),
    "zero SNR": ({"process": {"zero_terminal_snr": True}}, "target 'eps' says nothing about x0"),
    "no target": ({"objective": {"target": "noise"}}, "key 'objective.target' is 'noise'"),
    "no schedulers": ({"objective": {"target": "score"}}, "cannot express target 'score'"),
    "groups": ({"unet": {"block_out_channels": [20, 30]}}, "unet: "),
    "no levels": ({"unet": {"block_out_channels": []}}, "block_out_channels"),
    "no autoencoder": ({"vae": {"block_out_channels": []}}, "block_out_channels"),
    "attention": ({"unet": {"attention": [True] * 2}}, "unet.attention has 2 entries for 1"),
    "heads": ({"text": {"hidden_size": 33}}, "text: "),
    "head sizes": ({"unet": {"attention_head_dim": [2, 2, 2]}}, "unet: "),
    "few tokens": ({"text": {"vocab_size": 500}}, "key 'text.vocab_size' is 500"),
    "short texts": ({"text": {"max_length": 2}}, "key 'text.max_length' is 2"),
    "odd size": ({"images": {"size": 17}}, "images.size 17 is no multiple of 2"),
    "no size": ({"images": {"size": 0}}, "images: size=0"),
    "colour": ({"images": {"background": [0, 0, 300]}}, "images: background=(0, 0, 300)"),
    "buckets": ({"images": {"buckets": {"step": 0}}}, "images.buckets"),
    "bucket of a latent": ({"images": {"buckets": {"step": 7}}}, "images.buckets.step 7 is no mul"),
    "score of buckets": (
        {"images": {"buckets": {"step": 8}, "flip": False}, "score": {"captions": 4}},
        "score compares squares",
    ),
    "sampler": ({"score": {"sampler": "dmpp"}}, "score.sampler: unknown sampler 'dmpp'"),
    "sampler steps": ({"score": {"steps": 0}}, "key 'score.steps' is 0"),
    "too many steps": ({"score": {"steps": 5000}}, "score: "),
    "backend": ({"attention": "xformers"}, "attention xformers needs a CUDA device"),
    "LoRA rank": ({"lora": {"rank": 0}}, "key 'lora.rank' is 0"),
    "LoRA of nothing": ({"lora": {"targets": ["to_x"]}}, "lora.targets: no module ends in 'to_x'"),
    "suite": ({"validation": {"suites": {"shape": 9}}}, "input should be 'shapes', 'shapes-new'"),
    "suites": ({"validation": {"suites": ["shapes"]}}, "input should be keys and values"),
    "tracker": ({"trackers": ["tensorbord"]}, "key 'trackers.0' is 'tensorbord'"),
    "workers": ({"workers": -1}, "key 'workers' is -1"),
    "resume": ({"resume": "sometimes"}, "resume"),
    "allowed key": ({"resume": {"allow": "optimizer"}}, "key 'resume.allow' is 'optimizer'"),
    "no run": ({"run": ""}, "key 'run' is ''"),
    "weight": ({"data": [{"kind": "shapes", "count": 9, "size": 16, "weight": -1}]}, "weight"),
}  # fmt: skip

# -- model folders: what becomes of a good one --


def rewritten(name: str, **changes: Any) -> Callable[[Path], object]:
    """Other values in a JSON file; None takes a key out."""

    def change(model: Path) -> None:
        content = {**json.loads((model / name).read_text()), **changes}
        kept = {key: value for key, value in content.items() if value is not None}
        (model / name).write_text(json.dumps(kept))

    return change


def replaced(name: str, data: str | bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(
        data if isinstance(data, bytes) else data.encode()
    )


def cut(name: str, keep: int) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:keep])


def gone(name: str) -> Callable[[Path], object]:
    def remove(model: Path) -> None:
        path = model / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return remove


def reshaped(name: str, key: str) -> Callable[[Path], None]:
    """A tensor with one row more."""

    def change(model: Path) -> None:
        tensors = load_file(model / name)
        tensors[key] = torch.cat([tensors[key], tensors[key][:1]])
        save_file(tensors, model / name, metadata={"format": "pt"})

    return change


def lacking(name: str, part: str) -> Callable[[Path], None]:
    """A file without the tensors that have ``part`` in their name."""

    def change(model: Path) -> None:
        kept = {key: value for key, value in load_file(model / name).items() if part not in key}
        save_file(kept, model / name, metadata={"format": "pt"})

    return change


def pickled(name: str, pickle: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        torch.save(load_file(model / name), (model / name).with_name(pickle))
        (model / name).unlink()

    return change


UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT, SCHEDULER = "text_encoder/model.safetensors", "scheduler/scheduler_config.json"
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (gone("model_index.json"), "is no pipeline folder (it has no model_index.json)"),
    "no U-Net": (gone("unet"), "unet holds no UNet2DConditionModel (it has no config.json)"),
    "no autoencoder": (gone("vae"), "vae holds no AutoencoderKL (it has no config.json)"),
    "no text encoder": (gone("text_encoder"), "text_encoder holds no CLIPTextModel"),
    "no tokenizer": (gone("tokenizer"), "tokenizer is no folder of a tokenizer"),
    "no scheduler": (gone("scheduler"), "config.json cannot be used: "),
    "no weights": (gone(UNET), "unet cannot be read: "),
    "no weights of text": (gone(TEXT), "text_encoder cannot be read: "),
    "pickle alone": (pickled(UNET, "diffusion_pytorch_model.bin"), "unet cannot be read: "),
    "pickle of text": (pickled(TEXT, "pytorch_model.bin"), "text_encoder cannot be read: "),
    "half the weights": (cut(UNET, 100_000), "unet cannot be read: "),
    "half of the text": (cut(TEXT, 20_000), "text_encoder cannot be read: "),
    "a header's half": (cut(VAE, 20), "vae cannot be read: "),
    "empty weights": (cut(VAE, 0), "vae cannot be read: "),
    "web page": (replaced(UNET, "<html>404 Not Found</html>"), "unet cannot be read: "),
    "pointer of LFS": (replaced(UNET, "version https://git-lfs.github.com/spec/v1\n"), "unet cann"),
    "other size": (reshaped(UNET, "conv_out.weight"), "unet cannot be read: "),
    "other size of text": (reshaped(TEXT, "text_model.final_layer_norm.weight"), "text_encoder"),
    "lacks a tensor": (lacking(UNET, "conv_out"), "unet cannot be read: "),
    "lacks many": (lacking(VAE, "decoder"), "vae cannot be read: "),
    "text lacks a tensor": (lacking(TEXT, "final_layer_norm"), "text_encoder cannot be read: "),
    "broken config": (cut("unet/config.json", 50), "unet"),
    "empty config": (replaced("vae/config.json", ""), "vae"),
    "config as list": (replaced("unet/config.json", "[]"), "unet"),
    "config of text": (cut("text_encoder/config.json", 50), "text"),
    "config of another": (lambda m: shutil.copy(m / "vae/config.json", m / "unet"), "unet"),
    "unknown block": (rewritten("unet/config.json", down_block_types=["X", "Y"]), "unet"),
    "number as text": (rewritten("unet/config.json", layers_per_block="many"), "unet"),
    "groups of config": (rewritten("vae/config.json", norm_num_groups=7), "vae"),
    "channels": (rewritten("unet/config.json", in_channels=9), "unet"),
    "broken scheduler": (cut(SCHEDULER, 30), "config.json cannot be used: "),
    "scheduler as list": (replaced(SCHEDULER, "[]"), "config.json cannot be used: "),
    "unknown target": (rewritten(SCHEDULER, prediction_type="flow"), "prediction_type 'flow' is n"),
    "unknown betas": (rewritten(SCHEDULER, beta_schedule="mine"), "config.json cannot be"),
    "trained betas": (rewritten(SCHEDULER, trained_betas=[0.1]), "config.json cannot be"),
    "betas as text": (rewritten(SCHEDULER, beta_start="low"), "config.json cannot be used"),
    "broken tokenizer": (cut("tokenizer/tokenizer.json", 200), "tokenizer cannot be read"),
    "empty tokenizer": (replaced("tokenizer/tokenizer.json", "{}"), "tokenizer cannot be read"),
    "broken settings": (cut("tokenizer/tokenizer_config.json", 20), "tokenizer cannot be read"),
    "settings alone": (
        lambda m: [(m / "tokenizer" / n).unlink() for n in ("tokenizer.json", "vocab.json")],
        "tokenizer is no folder of a tokenizer",
    ),
    "longer tokenizer": (
        rewritten("tokenizer/tokenizer_config.json", model_max_length=99), "pads to 99 tokens but",
    ),
    "endless tokenizer": (
        rewritten("tokenizer/tokenizer_config.json", model_max_length=None), "text: the tokenizer",
    ),
    "other end of text": (rewritten("text_encoder/config.json", eos_token_id=7), "pools at eos_to"),
}  # fmt: skip

# -- what a run folder holds of a run before --


def forged(folder: Path) -> None:
    """The manifest says that all is well."""
    from ldm.storage.checkpoint import MANIFEST, sha256

    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    listed = {str(path.relative_to(folder)): sha256(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps({"sha256": listed}))


def state(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    """A file of the state that is wrong though its manifest holds."""

    def make(folder: Path) -> None:
        change(folder / "training")
        forged(folder)

    return make


def flipped(name: str) -> Callable[[Path], object]:
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return flip


WEIGHTS = "training/raw.safetensors"
# Of the only checkpoint: the run cannot go on.
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (flipped(UNET), f"{UNET} is not what was written"),
    "flipped state": (flipped("training/optimizer.safetensors"), "optimizer.safetensors is not wh"),
    "truncated": (cut(WEIGHTS, 999), f"{WEIGHTS} is not what was written"),
    "file gone": (gone(WEIGHTS), f"{WEIGHTS} is missing"),
    "folder gone": (gone("unet"), "is missing"),
    "no manifest": (gone("manifest.json"), "it has no manifest"),
    "half a manifest": (cut("manifest.json", 40), "its manifest cannot be read"),
    "manifest as list": (replaced("manifest.json", "[]"), "its manifest cannot be read"),
    "manifest of numbers": (replaced("manifest.json", '{"sha256": 3}'), "its manifest cannot be r"),
    "manifest in Latin-1": (replaced("manifest.json", b"\xe9"), "its manifest cannot be read"),
    "nothing in it": (lambda f: (shutil.rmtree(f), f.mkdir()), "it has no manifest"),
    "manifest of nothing": (replaced("manifest.json", '{"sha256": {}}'), "its manifest lists"),
    "counters": (state("", cut("run.json", 10)), "run.json"),
    "counters as list": (state("", replaced("run.json", "[]")), "run.json"),
    "counters without images": (state("", rewritten("run.json", images=None)), "run.json"),
    "no counters": (state("", gone("run.json")), "run.json"),
    "deep counters": (state("", replaced("run.json", "[" * 10_000)), "run.json cannot be read: it"),
    "long counters": (
        state("", replaced("run.json", '{"images": %s}' % ("9" * 5000))), "of too many digits",
    ),
    "counters in Latin-1": (state("", replaced("run.json", b'{"a": "\xe9"}')), "not UTF-8 text"),
    "images as text": (state("", rewritten("run.json", images="32")), "due at images: input"),
    "images of nothing": (state("", rewritten("run.json", images=float("nan"))), "due at images"),
    "fewer than no images": (state("", rewritten("run.json", images=-16)), "due at images: input"),
    "window as list": (state("", rewritten("run.json", window=[1])), "due at window: input should"),
    "identity as list": (state("", rewritten("run.json", identity=["a"])), "due at identity"),
    "identity of numbers": (state("", rewritten("run.json", identity={"seed": 3})), "identity.s"),
    "broken identity": (state("", rewritten("run.json", identity={"seed": "{"})), "identity.seed"),
    "deep identity": (
        state("", rewritten("run.json", identity={"seed": "[" * 9999})), "identity.seed is not val",
    ),
    "average as text": (state("", rewritten("run.json", average="64")), "due at average: input"),
    "memory as numbers": (state("", rewritten("run.json", memory=[1])), "due at memory.0: input"),
    "deep manifest": (replaced("manifest.json", "[" * 10_000), "its manifest cannot be read"),
    "manifest of digits": (replaced("manifest.json", "9" * 5000), "its manifest cannot be read"),
    "manifest as folder": (
        lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()), "no manifest",
    ),
    "moments of a parameter gone": (
        state("", lacking("optimizer.safetensors", "unet.conv_out.bias/")),
        "it lacks the optimiser's state of 1 parameters, the first is ['unet.conv_out.bias']",
    ),
    "no moments of any": (state("", lacking("optimizer.safetensors", "/")), "it lacks the opt"),
    "steps gone": (state("", lacking("optimizer.safetensors", "/step")), "/step is no number"),
    "shape of a moment": (
        state("", reshaped("optimizer.safetensors", "unet.conv_out.weight/exp_avg")), "exp_avg is",
    ),
    "model in front cut": (state("", lambda t: cut(UNET, 999)(t.parent)), "32 cannot be read"),
    "no weights": (state("", gone("raw.safetensors")), "raw.safetensors"),
    "broken weights": (state("", cut("raw.safetensors", 99)), "raw.safetensors"),
    "no moments": (state("", gone("optimizer.safetensors")), "optimizer.safetensors"),
    "half the moments": (
        state("", lacking("optimizer.safetensors", "exp_avg_sq")), "optimizer.safetensors",
    ),
    "weights of another": (state("", lacking("raw.safetensors", "conv_out")), "it lacks unet.con"),
    "other shape": (
        state("", reshaped("raw.safetensors", "unet.conv_out.weight")), "unet.conv_out.weight is",
    ),
}  # fmt: skip
# Of the run folder: what it may hold besides.
RUNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda run: (shutil.rmtree(run), run.write_text("")), "run"),
    "below a file": (lambda run: (shutil.rmtree(run / "checkpoints"),
                                  (run / "checkpoints").write_text("")), "checkpoints"),
    "metrics as folder": (lambda run: ((run / "metrics.jsonl").unlink(),
                                       (run / "metrics.jsonl").mkdir()), "metrics.jsonl"),
}  # fmt: skip
# The same, which a run passes over or puts right: it ends as if they were not there.
HARMLESS: dict[str, Callable[[Path], object]] = {
    "staging folder": lambda run: shutil.copytree(
        run / "checkpoints/images-000000000032", run / "checkpoints/.staging-images-000000000048"
    ),
    "name without number": lambda run: (run / "checkpoints/images-old").mkdir(),
    "file named like a checkpoint": lambda run: (run / "checkpoints/images-9").write_text(""),
    "cut line": lambda run: (run / "metrics.jsonl").open("a").write('{"images": 4'),
    "line of another program": lambda run: (run / "metrics.jsonl").open("a").write("[1]\n{}\n3\n"),
    "line in Latin-1": lambda run: (run / "metrics.jsonl").open("ab").write(b"\xe9\n"),
    "no metrics": lambda run: (run / "metrics.jsonl").unlink(),
}

# -- archives and tables that cannot be read as a whole --


def tar(**members: bytes) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.txt", "a")
    return data.getvalue()


ARCHIVES: dict[str, tuple[str, bytes, str]] = {
    "empty tar": ("a.tar", b"", "a.tar"),
    "tar of nothing": ("a.tar", tar(), "a.tar"),
    "tar cut in a header": ("a.tar", tar(a_txt=b"a")[:300], "a.tar"),
    "zip as tar": ("a.tar", zipped(), "a.tar"),
    "text as tar": ("a.tar", b"hello" * 300, "a.tar"),
    "pickles alone": ("a.tar", tar(a_pkl=b"\x80\x04N.", b_pyd=b"x"), "a"),
    "texts alone": ("a.tar", tar(a_txt=b"a", b_txt=b"b"), "a"),
    "not compressed": ("a.tar.gz", tar(a_txt=b"a"), "a.tar.gz"),
    "cut gzip": ("a.tar.gz", b"\x1f\x8b\x08\x00\x00", "a.tar.gz"),
    "empty parquet": ("a.parquet", b"", "a.parquet"),
    "cut parquet": ("a.parquet", b"PAR1" + bytes(40), "a.parquet"),
    "text as parquet": ("a.parquet", b"file_name,text\n", "a.parquet"),
    "empty TOML": ("a.toml", b"", "a.toml"),
    "broken TOML": ("a.toml", b"a = ?", "a.toml"),
    "zip of pictures": ("a.zip", zipped(), "a.zip"),
    "a picture": ("a.png", b"\x89PNG", "a.png"),
}

# -- LoRA files --


def module(name: str, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.{key.replace('__', '.')}": value for key, value in tensors.items()}


KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP, ODD = torch.ones(2, 32), torch.ones(32, 2), torch.ones(2, 31)
PAIR = {"lora_down__weight": DOWN, "lora_up__weight": UP}
LORAS: dict[str, tuple[bytes | dict[str, torch.Tensor], str]] = {
    "no safetensors": (b"not safetensors", "cannot be read as safetensors"),
    "empty": (b"", "cannot be read as safetensors"),
    "header alone": (b"\x08\0\0\0\0\0\0\0{}      ", "is no LoRA"),
    "endless header": (b"\xff" * 16, "cannot be read as safetensors"),
    "another network": ({"conv.weight": torch.ones(2)}, "is no LoRA of a U-Net"),
    "half a pair": (module(KOHYA, lora_down__weight=DOWN), "lacks its up weight"),
    "other half": (module(KOHYA, lora_up__weight=UP), "lacks its down weight"),
    "two ranks": (module(KOHYA, lora_down__weight=DOWN, lora_up__weight=torch.ones(32, 3)), "are "),
    "no rank": (module(KOHYA, lora_down__weight=torch.ones(0, 32),
                       lora_up__weight=torch.ones(32, 0)), "are no pair of low rank"),
    "flat": (module(KOHYA, lora_down__weight=torch.ones(2), lora_up__weight=torch.ones(2)), ""),
    "alpha of many": (module(KOHYA, **PAIR, alpha=torch.ones(3)), "has the shape"),
    "alpha of nothing": (module(KOHYA, **PAIR, alpha=torch.tensor(float("nan"))), "alpha"),
    "weights of nothing": (module(KOHYA, lora_down__weight=DOWN * float("nan"),
                                  lora_up__weight=UP), "nan"),
    "whole numbers": (module(KOHYA, lora_down__weight=DOWN.int(), lora_up__weight=UP.int()), ""),
    "LoHa": (module(KOHYA, hada_w1_a=DOWN, hada_w1_b=UP), "this is no LoHa: hada_w1_a"),
    "LoKr": (module("unet.a", lokr_w1=DOWN), "is no tensor of a LoRA"),
    "a second tower": (module("lora_te2_a", **PAIR), "and this model has none"),
    "a third tower": (module("lora_te3_a", **PAIR), "is of no LoRA"),
    "blocks of SDXL": (module("lora_unet_middle_block_7_to_q", **PAIR), "not have a layer"),
    "other size": (module(KOHYA, lora_down__weight=ODD, lora_up__weight=UP), "not for"),
    "other layer": (module("unet.no.layer", lora_A__weight=DOWN, lora_B__weight=UP), "no layer"),
    "magnitudes": (module(KOHYA, **PAIR, dora_scale=torch.ones(5)), "magnitudes"),
}  # fmt: skip
