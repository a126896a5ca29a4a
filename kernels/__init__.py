"""The compute kernels of the course's engine, each beside the PyTorch expression it must equal.

`kernels.paged_attention` is the one at the heart of PagedAttention. This package imports nothing
of `course_lib`: a kernel can be read, tested and replaced on its own.
"""

#: Marks this package as the course's. Hugging Face publishes another one named `kernels`.
DISTRIBUTION = "gpu-serving-labs"
