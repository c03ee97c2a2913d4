"""Whole models in one file, as A1111, ComfyUI and diffusers' ``from_single_file`` read them.

place       how a tensor of a file is made of tensors of a network, and taken apart again
unet, vae, text, transformer    where each tensor of a network lies
families    which networks a file holds, under which names, and what its readers can open
header      what stands beside the tensors: modelspec, and the folder's configs
write, read a pipeline folder -> a file, and back
"""
