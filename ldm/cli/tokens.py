"""How long captions are to a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.failure import fail

if TYPE_CHECKING:
    from ldm.data.audit.texts import Count


def tokens_of(folder: Path) -> tuple[Count, int]:
    """How many tokens texts are, and how many the text encoder sees."""
    import transformers

    from ldm.models.lengths import shortened

    transformers.utils.logging.set_verbosity_error()  # "longer than the maximum": that is asked
    if not folder.is_dir():
        fail(f"--tokenizer {folder}: there is no such folder")
    loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    limit = loaded.model_max_length
    if limit > 2**20:  # how transformers writes "none"
        fail(f"--tokenizer {folder}: it has no model_max_length, so no text is too long for it")

    def count(texts: Sequence[str]) -> list[int]:
        short = [shortened(text, limit) for text in texts]
        return [len(ids) for ids in loaded(short)["input_ids"]]

    return count, limit
