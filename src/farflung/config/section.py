"""The parts that every section of the settings is made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

DEVICE = r"^(auto|[a-z]{3,8}(:\d{1,3})?)$"
"""What a setting may call a device; whether it is there is asked where it is used."""


class Section(BaseModel):
    """Base of every section."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def setting(default: Any, doc: str, *, is_advanced: bool = False, **bounds: Any) -> Any:
    """A field with its default, its documentation and its bounds.

    An advanced one has a default that serves a first run; docs/config.md lists those apart.
    """
    extra = {"is_advanced": True} if is_advanced else None
    return Field(default=default, description=doc, json_schema_extra=extra, **bounds)


def is_advanced(field: FieldInfo) -> bool:
    """Whether a newcomer can leave a setting as it is."""
    return field.json_schema_extra is not None
