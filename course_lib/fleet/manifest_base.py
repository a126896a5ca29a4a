"""A Kubernetes object on its way to a YAML file, with the reasons for its unusual values."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

_LINE_LENGTH = 100


@dataclass(frozen=True)
class Manifest:
    """One object for `kubectl apply`.

    Args:
        file_name: where it goes.
        body: the object.
        why: for the path of a field, such as "spec.replicas", why its value is unusual.
    """

    file_name: str
    body: Mapping[str, Any]
    why: Mapping[str, str]

    def text(self) -> str:
        """As YAML, with the reasons above it."""
        comments = "".join(
            textwrap.fill(
                f"{path}: {reason}",
                _LINE_LENGTH,
                initial_indent="# ",
                subsequent_indent="#   ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            + "\n"
            for path, reason in self.why.items()
        )
        return comments + yaml.dump(
            dict(self.body), Dumper=_Dumper, sort_keys=False, width=_LINE_LENGTH
        )


class _Dumper(yaml.SafeDumper):
    """Writes what is there twice twice, and texts of several lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
