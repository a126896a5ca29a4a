"""What KEDA's CRD says of a ScaledObject.

The definition of the resource (CRD) is KEDA's and not part of the course. Where a copy of it is
found, the check of a cluster's API server can be made without a cluster.
"""

from pathlib import Path
from typing import Any

import yaml

from course_lib.data import DATA_DIR

CRD_FILE = "keda.sh_scaledobjects.yaml"

#: Where a copy of the CRD may be: `kubectl get crd scaledobjects.keda.sh -o yaml` writes one.
CRD_FOLDERS = (DATA_DIR / "schemas", DATA_DIR.parent.parent / "shared" / "data" / "schemas")


def find_crd() -> Path | None:
    """A copy of KEDA's CRD, if there is one."""
    return next((f / CRD_FILE for f in CRD_FOLDERS if (f / CRD_FILE).exists()), None)


def crd_errors(manifest: dict[str, Any], crd: Path) -> list[str]:
    """What an API server would say against a ScaledObject, by the schema of the CRD.

    Fields that the schema does not know count: `kubectl` warns of them, and they have no effect.
    """
    from jsonschema import Draft202012Validator  # comes with Jupyter

    (version,) = (
        version
        for version in yaml.safe_load(crd.read_text(encoding="utf-8"))["spec"]["versions"]
        if version["name"] == "v1alpha1"
    )
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # every resource's own
    return [
        f"{'.'.join(map(str, error.absolute_path)) or 'the manifest'}: {error.message}"
        for error in Draft202012Validator(schema).iter_errors(manifest)
    ]


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
