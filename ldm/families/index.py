"""Components and keys of ``model_index.json`` that not every stock pipeline knows."""

OF_SD = ("safety_checker", "requires_safety_checker")
OF_OTHERS = (
    "transformer",
    "text_encoder_2",
    "tokenizer_2",
    "force_zeros_for_empty_prompt",
    "requires_aesthetics_score",
)
