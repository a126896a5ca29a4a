"""What every kernel demands of its tensors, checked where Python calls it."""

import torch


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    like: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise `ValueError` if a kernel could not read `tensor` as what it takes it for.

    Args:
        name: of the argument, for the message.
        tensor: the argument.
        shape: expected sizes; None where any is allowed.
        like: a tensor whose device it must share, and whose dtype if none is given.
        dtype: expected instead of that of `like`.
    """
    if tensor.ndim != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
    dtype = like.dtype if dtype is None else dtype
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; pass {name}.contiguous()")
