"""How a replica leaves: what it still finishes, and what another replica has to do again.

A spot machine is taken away a fixed time after its warning. `DrainPolicy` lets those requests
finish that will be done before then, less a margin for shutting down, and hands back the others to
be retried elsewhere at once, while there is time for that.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from course_lib.validation import number


@dataclass(frozen=True)
class DrainPolicy:
    """Finish what fits the time after a termination warning, retry the rest elsewhere.

    Args:
        warning_s: from the warning (SIGTERM) to the end of the machine.
        shutdown_margin_s: the last part of it, kept for closing down.

    Raises:
        ValueError: a time is negative or not a number, or the margin exceeds the warning.
    """

    warning_s: float
    shutdown_margin_s: float

    def __post_init__(self) -> None:
        number("warning_s", self.warning_s, at_least=0)
        number("shutdown_margin_s", self.shutdown_margin_s, at_least=0, at_most=self.warning_s)

    def decide(self, remaining_s: Mapping[str, float]) -> dict[str, str]:
        """Give each request "finish" or "retry".

        Args:
            remaining_s: seconds that each request still needs, by its name.

        Raises:
            ValueError: a time is negative or not a number.
        """
        budget_s = self.warning_s - self.shutdown_margin_s
        return {
            name: "finish"
            if number(f"remaining_s[{name!r}]", seconds, at_least=0) <= budget_s
            else "retry"
            for name, seconds in remaining_s.items()
        }
