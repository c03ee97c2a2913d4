"""Model cards: ``README.md`` of a model's folder, as the Hub shows it, of what the run that made it
has written.

RUN/config.yaml           what was trained, on what, and how
RUN/environment.json      the versions that it ran with
RUN/metrics.jsonl         its last held-out loss
RUN/samples               the newest sheet, and the figures of its suites
RUN/score.json            how often the nearest training picture is the one that was asked for
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm.formats.integrity import json_object, may_be_of_the_hub
from ldm.formats.recognised import INDEX, LORA, WORD
from ldm.storage.disk import write_text
from ldm.storage.json import JsonError, parse_json

NAME, SHEET = "README.md", "sheet.png"
_MARK = "<!-- ldm card: written anew by the same command, but for what stands above the title -->"
_STOCK = {"StableDiffusionPipeline": ["stable-diffusion", "stable-diffusion-diffusers"],
          "StableDiffusionXLPipeline": ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"],
          "StableDiffusion3Pipeline": ["sd3", "sd3-diffusers"],
          "FluxPipeline": ["flux", "flux-diffusers"]}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What a folder holds.

    Args:
        what: in words.
        task: of the Hub, None: it has none for it.
        tags: further ones.
        use: program that opens it, with ``{name}`` for where it is.
    """

    what: str
    task: str | None
    tags: tuple[str, ...]
    use: str


_OPEN = "from ldm import LatentDiffusionPipeline{stock}\n\npipe = LatentDiffusionPipeline.{how}\n"


def kind_of(folder: Path) -> Kind | None:
    """What ``folder`` holds, None: no model."""
    base = 'from_pretrained("BASE")  # the model that it was trained on'
    if (folder / INDEX).is_file():
        index = json_object(folder / INDEX)
        name, texts = str(index.get("_class_name")), index.get("tokenizer", [None])[0]
        stock = f"  # or diffusers' {name}" if name != "LatentDiffusionPipeline" else ""
        task = "text-to-image" if texts else "unconditional-image-generation"
        use = _OPEN.format(stock=stock, how='from_pretrained("{name}")')
        what = f"A pipeline in diffusers' layout (`{name}`)"
        return Kind(what, task, tuple(_STOCK.get(name, [])), use)
    if (folder / LORA).is_file():
        use = _OPEN.format(stock="", how=base) + 'pipe.load_lora_weights("{name}")\n'
        return Kind("A LoRA", "text-to-image", ("lora",), use)
    if (folder / WORD).is_file():
        use = _OPEN.format(stock="", how=base) + 'pipe.load_textual_inversion("{name}")\n'
        return Kind("A word of textual inversion", "text-to-image", ("textual_inversion",), use)
    if (folder / "config.json").is_file():
        name = str(json_object(folder / "config.json").get("_class_name", "network"))
        return Kind(f"A network of diffusers (`{name}`)", None, (), "")
    if (folder / "text_encoder" / "config.json").is_file():
        return Kind("A CLIP: text encoder, tokenizer and picture tower", None, (), "")
    return None


def placed(path: Path) -> tuple[Path, Path | None]:
    """The folder of a model, and that of the run that made it, of either."""
    if (path / "config.yaml").is_file() and (path / "final").is_dir():
        return path / "final", path
    path = path.resolve()
    for run in (path.parent, path.parent.parent):
        if (run / "config.yaml").is_file() and (path.name == "final" or run != path.parent):
            return path, run
    return path, None


def write(
    folder: Path,
    run: Path | None = None,
    *,
    name: str | None = None,
    license: str | None = None,
    figures: Path | None = None,
    replace: bool = False,
) -> Path:
    """Writes the card of ``folder``, and the sheet that it shows, and returns its path.

    Args:
        folder: of a model.
        run: that made it; None: the card tells what the folder does.
        name: of the model; None: that of the run, or of the folder.
        license: an identifier of the Hub, as ``apache-2.0``; None: that of the card before.
        figures: what ``ldm evaluate --out`` wrote.
        replace: a card that somebody else wrote, too.

    Raises:
        ValueError: ``folder`` is no model, or has a card of somebody else's.
        OSError: something cannot be read or written.
    """
    kind, file = kind_of(folder), folder / NAME
    if kind is None:
        raise ValueError(f"{folder} is no model: name a run, or what it has written")
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    if before and _MARK not in before and not replace:
        raise ValueError(f"{file} was not written by ldm card: --replace writes it anew")
    config = _config(run)
    data = _metadata(kind, config) | (_front(before) if _MARK in before else {})
    data |= {"license": license} if license else {}
    name = name or (run.name if run else folder.name)
    shown = run and _sheet(run)
    if shown:
        shutil.copyfile(shown, folder / SHEET)
    parts = [
        f"# {name}\n\n{_MARK}",
        f"{kind.what}{_from(config)}.",
        _how(kind, name, config, folder),
        f"![What it draws]({SHEET})" if (folder / SHEET).is_file() else "",
        _licence(data),
        *_figures(run, figures),
        *_training(run, config),
    ]
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    write_text(file, f"---\n{front}---\n\n" + "\n\n".join(part for part in parts if part) + "\n")
    return file


def _front(text: str) -> dict[str, Any]:
    """What a card says above its title; ``ValueError`` where that cannot be read."""
    try:
        found = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())[:100]
        raise ValueError(f"{NAME}: what stands between its --- lines is no YAML ({line})") from None
    return found if isinstance(found, dict) else {}


def _config(run: Path | None) -> dict[str, Any]:
    """Of a run, without where things lie on the machine that it ran on."""
    if run is None:
        return {}
    try:
        found = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())[:100]
        raise ValueError(f"{run / 'config.yaml'} is no YAML ({line})") from None
    return _without_places(found) if isinstance(found, dict) else {}


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    away = isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~"))
    return f".../{Path(value).name}" if away else value


def _sources(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    data = config.get("data") or []
    return [data] if isinstance(data, dict) else list(data)


def _metadata(kind: Kind, config: Mapping[str, Any]) -> dict[str, Any]:
    hub = [s["path"] for s in _sources(config) if s.get("kind") == "datasets" and s.get("path")]
    model = str(config.get("model") or "").partition("@")[0]
    based = "/" in model and may_be_of_the_hub(model) and not Path(model.split("/")[0]).exists()
    found = {
        "library_name": "diffusers",
        "pipeline_tag": kind.task,
        "base_model": model if based else None,
        "datasets": [path for path in hub if may_be_of_the_hub(path)] or None,
        "tags": [*([kind.task] if kind.task else []), "diffusers", "ldm", *kind.tags,
                 *(["diffusers-training"] if config else [])],
    }  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


def _from(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    names = [_source(source) for source in _sources(config)]
    model = config.get("model")
    began = f"trained from `{model}`" if model else "trained from random init"
    return f", {began} on {', '.join(names)}" if names else f", {began}"


def _source(source: Mapping[str, Any]) -> str:
    kind, path = source.get("kind"), source.get("path")
    return f"`{path}` ({kind})" if path else f"{kind}"


def _how(kind: Kind, name: str, config: Mapping[str, Any], folder: Path) -> str:
    if not kind.use:
        return ""
    prompts = (config.get("validation") or {}).get("prompts") or [""]
    word = (config.get("textual_inversion") or {}).get("token")
    told = f"{word or prompts[0]!r}, " if kind.task == "text-to-image" else ""
    draw = f"pipe({told}seed=0).images[0]"
    use = kind.use.replace("{name}", name).replace("BASE", str(config.get("model") or "BASE"))
    stated = json_object(folder / INDEX).get("sampling") if (folder / INDEX).is_file() else None
    how = ", ".join(f"{key} {value}" for key, value in (stated or {}).items())
    return f"```python\n{use}{draw}\n```" + (f"\n\nIt is drawn with {how}." if how else "")


def _licence(data: Mapping[str, Any]) -> str:
    if data.get("license"):
        return f"Licence: {data['license']}."
    return "Licence: none is stated. Pictures and models that it learnt from have theirs."


def _sheet(run: Path) -> Path | None:
    """The newest pictures of a run."""
    scored = run / "samples.png"
    sheets = sorted((run / "samples").glob("images-*.png"))
    return scored if scored.is_file() else sheets[-1] if sheets else None


def _figures(run: Path | None, measured: Path | None) -> Iterator[str]:
    """Tables of what was measured, each beside what measured it."""
    found = [*_of_run(run)] if run else []
    if measured is not None:
        record = json_object(measured / "figures.json")
        how = [one.get("drawing", {}) for one in record.get("measured", [])]
        told = ", ".join(f"{key} {value}" for key, value in (how[0] if how else {}).items())
        data = f", compared with `{Path(str(record['data'])).name}`" if record.get("data") else ""
        table = (measured / "table.md").read_text(encoding="utf-8").rstrip()
        found.append(f"By `ldm evaluate`{data} ({told}), 95 % intervals in brackets:\n\n{table}")
    if found:
        yield "## Figures"
        yield from found


def _of_run(run: Path) -> Iterator[str]:
    if last := _held_out(run / "metrics.jsonl"):
        loss = f"{last['held_out_loss']:.4g}"
        yield f"Held-out loss {loss} after {last['images']:,} images of training."
    tables = sorted((run / "samples").glob("images-*.md"))
    if tables:
        seen = int(tables[-1].stem.partition("-")[2])
        table = tables[-1].read_text(encoding="utf-8").rstrip()
        yield f"After {seen:,} images, 95 % intervals in brackets:\n\n{table}"
    if (run / "score.json").is_file():
        yield _score(json_object(run / "score.json"), run / "score.json")


def _held_out(file: Path) -> dict[str, Any] | None:
    found = None
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            told = parse_json(line, dict[str, Any])
        except JsonError:  # cut short by a kill
            continue
        found = told if "held_out_loss" in told and "images" in told else found
    return found


def _score(record: Mapping[str, Any], file: Path) -> str:
    lines = ["| source | model | first | first five |", "|---|---|---|---|"]
    try:
        for entry in record["scores"]:
            for model, hits in entry.items():
                if model != "source":
                    shares = [_share(hits[top]) for top in ("top1", "top5")]
                    lines.append(f"| {entry['source']} | {model} | {' | '.join(shares)} |")
        told = f"{record['measure']}, of {record['gallery']:,} (n {_n(record)})"
    except (LookupError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{file} is not what a run writes: remove it") from None
    return f"How often the {told}; 95 % intervals in brackets:\n\n" + "\n".join(lines)


def _n(record: Mapping[str, Any]) -> str:
    return ", ".join(
        str(hits["top1"]["n"]) for entry in record["scores"] for k, hits in entry.items()
        if k == "drawn"
    )  # fmt: skip


def _share(share: Mapping[str, float]) -> str:
    value, low, high = (100 * share[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def _training(run: Path | None, config: Mapping[str, Any]) -> Iterator[str]:
    if run is None:
        return
    yield "## Training"
    optimizer = config.get("optimizer") or {}
    told = {
        "what learns": config.get("train") and ", ".join(config["train"]),
        "length": config.get("duration"),
        "batch": config.get("batch_size"),
        "learning rate": optimizer.get("lr"),
        "size": (config.get("images") or {}).get("size"),
        "precision": config.get("precision"),
        "seed": config.get("seed"),
    }
    rows = [f"| {key} | {value} |" for key, value in told.items() if value is not None]
    yield "\n".join(["| | |", "|---|---|", *rows])
    if (run / "environment.json").is_file():
        record = json_object(run / "environment.json")
        versions = ", ".join(f"{k} {v}" for k, v in (record.get("packages") or {}).items())
        yield f"Python {record.get('python')}, {versions}; code {record.get('git') or 'unknown'}."
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip()
    yield f"<details><summary>The run's config</summary>\n\n```yaml\n{text}\n```\n\n</details>"
