"""In which style a picture is drawn, whatever it shows and wherever that lies.

    features = joint histogram over pixels of (darkest value around, slope of the light)

which knows black outlines from flat colour and shading, and nothing of shapes, places or the frame.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, one_hot, pad

_BINS = 8


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
    cells = one_hot((row * _BINS + column).flatten(1), _BINS**2)
    return cells.float().mean(1).sqrt()


class StyleReader:
    """Tells styles apart by logistic regression on ``shading``.

    Args:
        pictures: true ones, ``n 3 h w`` in [-1, 1].
        styles: numbers of theirs, ``n``.
    """

    def __init__(self, pictures: Tensor, styles: Tensor) -> None:
        # Comes with the pictures of emoji (`ldm[demo]`), which nothing else here needs.
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self._model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        self._model.fit(self._features(pictures), styles.numpy())

    def __call__(self, pictures: Tensor) -> Tensor:
        """The number of each picture's style, ``n``."""
        return torch.from_numpy(self._model.predict(self._features(pictures)))

    @staticmethod
    def _features(pictures: Tensor):
        # A few at a time: the cells of every pixel are many.
        return torch.cat([shading(part) for part in pictures.split(64)]).double().numpy()
