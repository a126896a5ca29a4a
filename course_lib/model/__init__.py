"""A checkpoint becomes a decoder.

Read it in this order: config (what the checkpoint says it is), weights (what it holds), attention
(how a backend reads the paged KV cache), decoder (the forward pass), tokenizer (text and tokens).
"""

import kernels

if getattr(kernels, "DISTRIBUTION", None) != "gpu-serving-labs":
    raise ImportError(
        f"`import kernels` found {kernels.__file__}, which is not the course's package (Hugging "
        "Face publishes another one of that name). Run `pip uninstall kernels`, or start Python in "
        "the repository's root folder so that the course's own is found first."
    )
