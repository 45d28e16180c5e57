"""Bases and shared fields of request and response bodies."""

from __future__ import annotations

from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from orthokv.spec import budget as budgets
from orthokv.spec import vocabulary as words
from orthokv.spec.budget import Metric
from orthokv.spec.rankgrid import RankGrid
from orthokv.spec.target import Target


class Body(BaseModel):
    """A request body.

    A field that is not known is an error, so a typing mistake is never a silent default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        texts = [text for pair in value.items() for text in pair] if isinstance(value, dict) else [value]
        if any(isinstance(text, str) and not is_storable(text) for text in texts):
            raise ValueError("holds a character that is not text: NUL, or half of a surrogate pair")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_own_kind(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic would take false for 0, "5" for 5 and 1 for true, which the document does not.
        if info.field_name is None:
            return value
        kinds = _kinds_of(cls, info.field_name)
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError("is true or false, which this field never is")
        if isinstance(value, str | int | float) and not isinstance(value, bool) and kinds <= {bool, NoneType}:
            raise ValueError("must be true or false")
        if isinstance(value, str) and str not in kinds and kinds & {int, float}:
            raise ValueError("is a text and must be a number")
        return value


@cache
def _kinds_of(model: type[BaseModel], field: str) -> set[Any]:
    return _kinds(model.model_fields[field].annotation)


def _kinds(annotation: Any) -> set[Any]:
    """The plain types of an annotation: of each alternative, and below `Annotated`."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _kinds(parts[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_kinds, parts))
    return {annotation}


def is_storable(text: str) -> bool:
    """Whether every database can keep this text: Postgres has no NUL, and UTF-8 no halves of pairs."""
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)


class Resource(BaseModel):
    """A response body: fields are only ever added."""

    model_config = ConfigDict(frozen=True, from_attributes=True)


RankMultiple = Annotated[
    int,
    Field(
        ge=1, le=1024, description="Every rank is a multiple of this, e.g. 16 for the matrix units of a GPU."
    ),
]

PolishSteps = Annotated[
    Annotated[int, Field(ge=0, le=1_000_000)] | None,
    Field(
        description="Steps of a refinement of the bases at the ranks of this checkpoint's plan, before it is packed; "
        "0: none, the profile's own bases; absent: half as many as the profile was refined with. "
        "A `layer_error` budget is met by the profile's own bases and takes none."
    ),
]


Form = Annotated[
    words.Form,
    Field(description="`adapter`: bases only. `full`: with the base model's own files, loadable by path."),
]


class Budget(Body):
    """How much may be lost, or kept."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"metric": {"const": "kept"}}, "required": ["metric"]},
            "then": {"properties": {"value": {"maximum": 1}}},
        }
    )

    metric: Metric = Field(
        description="`kept`: stored bytes of the cache / bytes of the 16-bit cache. "
        "`layer_error`: relative error of the worst layer's output. "
        "`perplexity_increase`: relative, on a held-out slice of the calibration data."
    )
    value: Annotated[float, Field(gt=0, allow_inf_nan=False, examples=[0.25])]

    @model_validator(mode="after")
    def _kept_is_a_share(self) -> Budget:
        if self.metric == "kept" and self.value > 1:
            raise ValueError("kept is a share and must be at most 1")
        return self

    def spec(self) -> budgets.Budget:
        """The same, as the library has it."""
        return budgets.Budget(self.metric, self.value)


class TargetFields(BaseModel):
    """What a checkpoint should be, in every body that asks for one."""

    budget: Budget
    form: Form = "adapter"
    rank_multiple: RankMultiple = 1
    polish_steps: PolishSteps = None

    def target(self) -> Target:
        """The same, as the library has it; `InvalidSetting` (a ValueError) for what it refuses."""
        return Target(
            self.budget.spec(),
            grid=RankGrid(self.rank_multiple),
            form=self.form,
            polish_steps=self.polish_steps,
        )


MetadataKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Metadata = Annotated[
    dict[MetadataKey, Annotated[str, Field(max_length=512)]],
    Field(max_length=16, description="Up to 16 labels of the client's own; jobs can be listed by them."),
]
