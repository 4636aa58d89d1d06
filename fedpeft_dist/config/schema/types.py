"""Types that several config sections share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Channels = Annotated[tuple[Probability, ...], Field(strict=False, min_length=1)]
Concentration = Annotated[float, Field(ge=1e-9, le=1e9)]
"""The alpha of a Dirichlet distribution, in the range in which float64 can draw from it."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
