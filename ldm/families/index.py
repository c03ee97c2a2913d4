"""Components and keys of ``model_index.json`` that not every stock pipeline knows."""

OF_SD = ("safety_checker", "requires_safety_checker")
OF_SDXL = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
OF_SD3 = ("transformer", "text_encoder_3", "tokenizer_3")
OF_IMAGEN = ("image_noising_scheduler",)
OF_OTHERS = ("text_encoder_2", "tokenizer_2", *OF_SDXL, *OF_SD3, *OF_IMAGEN)
