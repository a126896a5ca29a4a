"""What a CRD says of a manifest, such as KEDA's of a ScaledObject.

The definitions of resources (CRDs) are their projects' and not part of the course. Where a copy of
one is found, the check of a cluster's API server can be made without a cluster.
"""

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
    from jsonschema import Draft202012Validator  # comes with Jupyter

    definition = yaml.safe_load(crd.read_text(encoding="utf-8"))["spec"]
    versions = {f"{definition['group']}/{v['name']}": v for v in definition["versions"]}
    found = manifest.get("apiVersion")
    if found not in versions:
        return [f"apiVersion: expected {' or '.join(versions)}, got {found!r}"]
    schema = _strict(versions[found]["schema"]["openAPIV3Schema"])
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
