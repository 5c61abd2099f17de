"""What every section of the job file is made of: strict, and in the types of its plain values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _as_float(value: Any) -> Any:
    """A whole number where a real one is meant (`clip: 1`) is no mistake; strict pydantic would refuse it."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Count = Annotated[int, Field(ge=1)]
Real = Annotated[float, BeforeValidator(_as_float)]
Text = Annotated[str, Field(min_length=1)]
Auto = Literal["auto"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )
