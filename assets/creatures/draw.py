"""Draws the 24 pictures of this folder and their ``metadata.jsonl``.

    python assets/creatures/draw.py

Six creatures that exist nowhere else, under six words that mean nothing, each four times: so a
model that draws them from their captions has learnt them here (``configs/creatures.yaml``).
"""

from __future__ import annotations

import json
from pathlib import Path

import resvg_py

SIDE = 256  # pixels
LINE = "#2b2b33"
COLOURS = {"blue": "#4a90e2", "yellow": "#f7c948", "green": "#57b85c", "purple": "#9b6bd3"}


def _eye(x: float, y: float, r: float = 3.2) -> str:
    return (
        f'<circle cx="{x}" cy="{y}" r="{r}" fill="#fff"/>'
        f'<circle cx="{x}" cy="{y}" r="{r * 0.5}" fill="{LINE}"/>'
    )


def _stroke(path: str, colour: str = LINE, width: float = 3) -> str:
    return (
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"'
        ' stroke-linecap="round"/>'
    )


def _wug(colour: str) -> str:
    """A round bird on two long legs."""
    return (
        _stroke("M26 46 V58 H21 M38 46 V58 H43", "#e8833a")
        + f'<circle cx="32" cy="33" r="17" fill="{colour}"/>'
        + '<path d="M27 34 L37 34 L32 41 Z" fill="#e8833a"/>'
        + _eye(26, 28)
        + _eye(38, 28)
    )


def _dax(colour: str) -> str:
    """A cube with one eye and two feelers."""
    return (
        _stroke("M24 22 L18 11 M40 22 L46 11")
        + f'<circle cx="18" cy="11" r="3" fill="{LINE}"/>'
        + f'<circle cx="46" cy="11" r="3" fill="{LINE}"/>'
        + f'<rect x="15" y="20" width="34" height="34" rx="4" fill="{colour}"/>'
        + _eye(32, 34, 8)
        + _stroke("M25 48 H39")
    )


def _fep(colour: str) -> str:
    """A star with three eyes."""
    star = "32,10 38.5,25 55,26.5 42.5,37.5 46.5,54 32,45 17.5,54 21.5,37.5 9,26.5 25.5,25"
    return (
        f'<polygon points="{star}" fill="{colour}" stroke="{colour}" stroke-width="5"'
        ' stroke-linejoin="round"/>' + _eye(23, 31) + _eye(32, 27) + _eye(41, 31)
        + _stroke("M27 38 Q32 42 37 38", width=2.5)
    )  # fmt: skip


def _toma(colour: str) -> str:
    """A dome on four waving arms."""
    arms = "".join(f"M{x} 36 Q{x - 5} 44 {x} 49 T{x} 59 " for x in (17, 27, 37, 47))
    return (
        _stroke(arms, colour, 4.5)
        + f'<path d="M10 38 A22 24 0 0 1 54 38 Z" fill="{colour}"/>'
        + _eye(25, 29, 4)
        + _eye(39, 29, 4)
    )


def _blick(colour: str) -> str:
    """A tall post with two raised arms."""
    return (
        _stroke("M24 40 H14 V27 M40 36 H50 V23", colour, 7)
        + f'<rect x="22" y="12" width="20" height="47" rx="10" fill="{colour}"/>'
        + _eye(28, 23, 3)
        + _eye(36, 23, 3)
        + _stroke("M28 31 Q32 35 36 31", width=2.5)
    )


def _zorp(colour: str) -> str:
    """A pyramid between two wings."""
    return (
        '<path d="M20 40 Q2 34 5 18 Q17 20 25 34 Z M44 40 Q62 34 59 18 Q47 20 39 34 Z"'
        ' fill="#cfd8e3"/>'
        f'<path d="M32 12 L52 56 H12 Z" fill="{colour}" stroke="{colour}" stroke-width="3"'
        ' stroke-linejoin="round"/>' + _eye(32, 36, 6) + _stroke("M26 49 H38", width=2.5)
    )


# The height of the top of each head, where a hat sits.
CREATURES = {
    "wug": (_wug, 17),
    "dax": (_dax, 21),
    "fep": (_fep, 13),
    "toma": (_toma, 15),
    "blick": (_blick, 13),
    "zorp": (_zorp, 14),
}


def _hat(top: float) -> str:
    return (
        f'<rect x="19" y="{top - 3}" width="26" height="5" rx="2" fill="#c0392b"/>'
        f'<rect x="24" y="{top - 12}" width="16" height="11" rx="2" fill="#e04b3a"/>'
    )


def pictures() -> dict[str, tuple[str, str]]:
    """Caption and drawing (SVG elements in a square of side 64) by name."""
    found: dict[str, tuple[str, str]] = {}
    for n, (word, (draw, top)) in enumerate(CREATURES.items()):
        first, second, third = (list(COLOURS)[(n + i) % 4] for i in range(3))
        found[f"{word}-1"] = (f"a {first} {word}", draw(COLOURS[first]))
        found[f"{word}-2"] = (f"a {second} {word}", draw(COLOURS[second]))
        found[f"{word}-3"] = (
            f"a {first} {word} with a red hat",
            f'<g transform="translate(3 8) scale(.9)">{draw(COLOURS[first])}{_hat(top)}</g>',
        )
        small = draw(COLOURS[third])
        found[f"{word}-4"] = (
            f"two small {third} {word}s",
            f'<g transform="translate(0 15) scale(.5)">{small}</g>'
            f'<g transform="translate(32 15) scale(.5)">{small}</g>',
        )
    return found


def main() -> None:
    """Writes the folder."""
    folder = Path(__file__).parent
    rows = []
    for name, (caption, drawing) in pictures().items():
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">'
            f'<rect width="64" height="64" fill="#fff"/>{drawing}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE)
        (folder / f"{name}.png").write_bytes(bytes(png))
        rows.append(json.dumps({"file_name": f"{name}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
