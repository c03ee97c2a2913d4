"""Components and keys of ``model_index.json`` that not every stock pipeline knows."""

OF_SD = ("safety_checker", "requires_safety_checker")
OF_SDXL = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
OF_SD3 = ("transformer", "text_encoder_3", "tokenizer_3")
NOISING = "image_noising_scheduler"
"""States the noise of what the network is told of the picture itself."""
OF_IMAGEN = (NOISING,)
OF_PRIOR = ("prior", "prior_text_encoder", "prior_tokenizer", "prior_scheduler")
OF_UNCLIP = (*OF_PRIOR, "image_normalizer")
"""Listed only where they are."""
OF_OTHERS = ("text_encoder_2", "tokenizer_2", *OF_SDXL, *OF_SD3, *OF_IMAGEN)
