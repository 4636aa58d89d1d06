"""Types that several config sections share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedpeft_dist.config.paths import UserPath

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Channels = Annotated[tuple[Probability, ...], Field(strict=False, min_length=1)]
Concentration = Annotated[float, Field(ge=1e-9, le=1e9)]
"""The alpha of a Dirichlet distribution, in the range in which float64 can draw from it."""
Blocks = Count | Annotated[tuple[int, ...], Field(strict=False, min_length=1)]
"""Blocks of a backbone: a number k means the last k, a list holds indices as in Python, negative ones from the end."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="after")
    def _refuse_problems(self) -> "Section":
        for problem in (text for text, is_there in self.problems().items() if is_there):
            raise ValueError(problem)
        return self

    def problems(self) -> dict[str, bool]:
        """Each way in which valid fields may disagree, as a message, and whether they do. The first one is told."""
        return {}


class MethodSection(Section):
    """The keys of every method."""

    name: str
    init: UserPath | None = None
    """A folder whose parameters the first round starts with: an earlier run's directory, a safetensors export, or an
    adapter of Hugging Face peft, of the same method and backbone. null: the method's own initial values."""
