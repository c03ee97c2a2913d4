"""Colour profiles as cameras, displays and presses have them, made by hand, and what they mean."""

import struct

import numpy as np

ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
PROPHOTO = ((0.79767, 0.28804, 0), (0.13519, 0.71188, 0), (0.03134, 0.00009, 0.82491))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
"""Red, green and blue in XYZ, adapted to D50, as profiles have them."""
GAMMA = {ADOBE: 2.19921875, DISPLAY_P3: 2.2, PROPHOTO: 1.8}
INKS = {"C": (55, -37, -50), "M": (48, 74, -3), "Y": (89, -5, 93), "K": (16, 0, 0)}
"""Lab of full ink on white paper."""


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _curve(gamma: float | None) -> bytes:
    """A power; None is the curve of sRGB at 1024 points, as the profile of HP has it."""
    if gamma is not None:
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    points = np.round(65535 * linear(np.linspace(0, 1, 1024))).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(points)) + points.tobytes()


def _profile(kind: bytes, space: bytes, pcs: bytes, **tags: bytes) -> bytes:
    name = b"a profile\0"
    tags |= {
        "desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78),
        "cprt": b"text\0\0\0\0none\0",
        "wtpt": _xyz((0.9642, 1, 0.8249)),
    }
    table, data = struct.pack(">I", len(tags)), b""
    start = 132 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", tag.encode(), start + len(data), len(content))
        data += content
    size = start + len(data)
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02100000, kind, space, pcs)
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += _fixed(0.9642, 1, 0.8249)
    return head + bytes(128 - len(head)) + table + data


def rgb(primaries: tuple, gamma: float | None = None) -> bytes:
    """The profile of a camera or display."""
    curve = _curve(gamma)
    names = ("rXYZ", "gXYZ", "bXYZ")
    matrix = {name: _xyz(values) for name, values in zip(names, primaries, strict=True)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", **matrix, rTRC=curve, gTRC=curve, bTRC=curve)


def grey(gamma: float | None) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", kTRC=_curve(gamma))


def cmyk() -> bytes:
    """A press of which only paper and single inks are known; several inks are the darkest."""
    ramp = bytes(range(256))
    corners = []
    for corner in range(16):
        inks = [ink for n, ink in enumerate("CMYK") if corner >> (3 - n) & 1]
        lightness, a, b = min((INKS[ink] for ink in inks), default=(100, 0, 0))
        corners += [round(lightness * 2.55), a + 128, b + 128]
    table = struct.pack(">4s4xBBBx", b"mft1", 4, 3, 2) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return _profile(b"prtr", b"CMYK", b"Lab ", A2B0=table + 4 * ramp + bytes(corners) + 3 * ramp)


def linear(values: np.ndarray) -> np.ndarray:
    """Light of values of sRGB in [0, 1]."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def levels(xyz: np.ndarray) -> np.ndarray:
    """XYZ, adapted to D50, as levels of sRGB."""
    light = np.clip(np.linalg.solve(np.array(SRGB).T, xyz), 0, 1)
    coded = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return 255 * coded


def meant(pixel: tuple[int, ...], primaries: tuple) -> np.ndarray:
    """Levels of sRGB that ``pixel`` means in a space of ``GAMMA``."""
    return levels(np.array(primaries).T @ (np.array(pixel) / 255) ** GAMMA[primaries])


def of_lab(lab: tuple[float, float, float]) -> np.ndarray:
    y = (lab[0] + 16) / 116
    f = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    ratio = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return levels(ratio * np.array([0.9642, 1, 0.8249]))
