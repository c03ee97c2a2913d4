"""Between embeddings of pictures, and away from them: what is drawn of ``image_embeds``.

    between   slerp(a, b, s)
    text diff slerp(e, normalised(t - t0), s),   t0 and t embeddings of what it is and is to be

(Ramesh et al. 2022, sections 3.2 and 3.3). Directions go along the arc between the two, lengths
along the line.
"""

from __future__ import annotations

from torch import Tensor
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
