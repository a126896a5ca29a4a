"""The compute kernels of the course's engine, each beside the PyTorch expression it must equal.

`paged_attention` is the heart: attention over the pages of the KV cache. `rope_and_cache`,
`rms_norm` and `silu_and_mul` are the small memory-bound ones around it. In each file `f` launches
the kernel and `f_reference` is the expression. This package imports nothing of `course_lib`: a
kernel can be read, tested and replaced on its own.
"""

#: Marks this package as the course's. Hugging Face publishes another one named `kernels`.
DISTRIBUTION = "gpu-serving-labs"
