"""In which style a picture is drawn, whatever it shows and wherever that lies.

    features = joint histogram over pixels of (darkest value around, slope of the light)

which knows black outlines from flat colour and shading, and nothing of shapes and places. What is
plainly white is left out, so that the margin of a picture tells nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from ldm.errors import FeatureError

_BINS = 8
_WHITE = (_BINS - 1) * _BINS
"""The cell of white all around and no slope."""


def shading(x: Tensor) -> Tensor:
    """Features ``b 64`` of pixels ``b 3 h w`` in [-1, 1]: square roots of the shares of pixels with
    (darkest value of the 3 x 3 around, length of the central differences), in 8 x 8 bins.
    """
    light = (x.mean(1, keepdim=True) + 1) / 2
    darkest = -max_pool2d(-light, 3, 1, 1)
    around = pad(light, (1, 1, 1, 1), mode="replicate")
    across = around[..., 1:-1, 2:] - around[..., 1:-1, :-2]
    down = around[..., 2:, 1:-1] - around[..., :-2, 1:-1]
    slope = torch.hypot(across, down)
    row, column = ((v * _BINS).long().clamp(0, _BINS - 1) for v in (darkest, slope))
    cell = (row * _BINS + column).flatten(1)
    counts = torch.zeros(len(x), _BINS**2).scatter_add_(1, cell, torch.ones(cell.shape))
    counts[:, _WHITE] = 0
    return (counts / counts.sum(1, keepdim=True).clamp(min=1)).sqrt()


def softened(x: Tensor) -> Tensor:
    """Pixels ``b 3 h w``, each the weighted mean of the 3 x 3 around: (1 2 1) along both axes, of
    four.
    """
    around = pad(x, (1, 1, 1, 1), mode="replicate")
    return avg_pool2d(avg_pool2d(around, 2, 1), 2, 1)  # (1 1) twice is (1 2 1)


class StyleReader:
    """Tells styles apart by logistic regression on ``shading``.

    It learns from pictures as they are, softened, and softened twice: lines that are only drawn
    less sharply than by a draughtsman are still lines.

    Args:
        pictures: true ones, ``n 3 h w`` in [-1, 1].
        styles: numbers of theirs, ``n``.

    Raises:
        FeatureError: scikit-learn is not installed.
    """

    def __init__(self, pictures: Tensor, styles: Tensor) -> None:
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError:
            raise FeatureError(
                "styles are told apart by scikit-learn, which is not installed:"
                " pip install 'ldm[demo]'"
            ) from None
        soft = softened(pictures)
        seen = torch.cat([shading(x) for x in (pictures, soft, softened(soft))])
        self._model: Any = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=3000))
        self._model.fit(seen.double().numpy(), styles.repeat(3).numpy())

    def __call__(self, pictures: Tensor) -> Tensor:
        """The number of each picture's style, ``n``."""
        return torch.from_numpy(self._model.predict(shading(pictures).double().numpy()))
