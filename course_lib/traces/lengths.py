"""How long prompts and replies are: a number, a uniform distribution, or a measured one."""

from course_lib.validation import whole_number

#: Fixed, or (lowest, highest) of a uniform distribution, both included. In tokens.
Lengths = int | tuple[int, int]


def check_lengths(name: str, lengths: Lengths) -> None:
    """Refuse what is no length of at least 1 token.

    Raises:
        ValueError: it is none, or the limits are in the wrong order.
    """
    if isinstance(lengths, tuple) and len(lengths) == 2:
        low = whole_number(f"{name}[0]", lengths[0])
        whole_number(f"{name}[1]", lengths[1], at_least=low)
    else:
        whole_number(name, lengths)
