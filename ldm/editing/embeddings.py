"""Between embeddings of pictures, away from them, and what their parts say: what is drawn of
``image_embeds``.

    between   slerp(a, b, s)
    text diff slerp(e, normalised(t - t0), s),   t0 and t embeddings of what it is and is to be
    PCA       m + V_k V_k' (e - m),              m and V of many: their mean, and directions

(Ramesh et al. 2022, sections 3.2, 3.3 and 4). Between two, directions go along the arc, lengths
along the line.
"""

from __future__ import annotations

from torch import Tensor, linalg
from torch.nn.functional import normalize

from ldm.sampling import slerp


def interpolated(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Embeddings ``n d`` between ``a`` (share 0) and ``b`` (1), each ``n d``."""
    lengths = ((1 - share) * a.norm(dim=1) + share * b.norm(dim=1))[:, None]
    return lengths * normalize(slerp(normalize(a), normalize(b), share))


def text_diff(image: Tensor, before: Tensor, after: Tensor, share: float) -> Tensor:
    """Embeddings ``image``, ``n d``, turned from what the text ``before`` says to what ``after``
    does, as long as they were.

    Args:
        image: of pictures.
        before: of texts of what is in them, ``n d`` or ``1 d``.
        after: of texts of what is to be in them, likewise.
        share: of the way; 0.25 to 0.5 in the paper.
    """
    towards = normalize(normalize(after) - normalize(before)).expand_as(image)
    return image.norm(dim=1, keepdim=True) * normalize(slerp(normalize(image), towards, share))


def principal(image: Tensor, among: Tensor, count: int) -> Tensor:
    """Embeddings ``image``, ``n d``, as far as ``count`` principal components say them.

    Args:
        image: of pictures.
        among: of many pictures, ``m d``, whose components they are, by falling variance.
        count: of the components; with 0 all are the mean.

    Raises:
        ValueError: ``among`` has not as many components.
    """
    if not 0 <= count <= min(among.shape):
        raise ValueError(f"{count} components of {among.shape[0]} embeddings of {among.shape[1]}")
    middle = among.double().mean(0)
    directions = linalg.svd(among.double() - middle, full_matrices=False).Vh[:count]
    kept = (image.double() - middle) @ directions.T @ directions
    return (middle + kept).to(image)
