"""What a CRD says of a manifest, such as KEDA's of a ScaledObject.

The definitions of resources (CRDs) are their projects' and not part of the course. Where a copy of
one is found, the check of a cluster's API server can be made without a cluster.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from course_lib.data import DATA_DIR

CRD_FILE = "keda.sh_scaledobjects.yaml"

#: Where a copy of the CRD may be: `kubectl get crd scaledobjects.keda.sh -o yaml` writes one.
CRD_FOLDERS = (DATA_DIR / "schemas", DATA_DIR.parent.parent / "shared" / "data" / "schemas")


def find_crd(file_name: str = CRD_FILE) -> Path | None:
    """A copy of the CRD, if there is one."""
    return next((f / file_name for f in CRD_FOLDERS if (f / file_name).exists()), None)


def crd_errors(manifest: dict[str, Any], crd: Path) -> list[str]:
    """What an API server would say against a manifest, by the schema of its CRD.

    Fields that the schema does not know count: `kubectl` warns of them, and they have no effect.
    """
    validators = _validators(crd)
    found = manifest.get("apiVersion")
    if found not in validators:
        return [f"apiVersion: expected {' or '.join(validators)}, got {found!r}"]
    return [
        f"{'.'.join(map(str, error.absolute_path)) or 'the manifest'}: {error.message}"
        for error in validators[found].iter_errors(manifest)
    ]


@lru_cache  # a CRD is thousands of lines
def _validators(crd: Path) -> dict[str, Any]:
    """By `apiVersion`."""
    from jsonschema import Draft202012Validator  # comes with Jupyter

    definition = yaml.safe_load(crd.read_text(encoding="utf-8"))["spec"]
    validators = {}
    for version in definition["versions"]:
        schema = _strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}  # every resource's own
        validators[f"{definition['group']}/{version['name']}"] = Draft202012Validator(schema)
    return validators


def _strict(schema: Any) -> Any:
    """The same schema, without room for fields that it does not name."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: _strict(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        schema.setdefault("additionalProperties", False)
    return schema
