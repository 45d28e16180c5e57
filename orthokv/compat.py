"""Private doors of other packages that the library goes through, each with its reason: what to look at when one is updated.

`pyproject.toml` bounds these packages at the minor version that was tested. Each is opened when it is needed, so that nothing
here costs an import.
"""

from __future__ import annotations

from typing import Any


def click_errors() -> tuple[type[Any], type[Any]]:
    """`ClickException` and `NoArgsIsHelpError` of the click that Typer carries; it exports them only in part, and a wrong
    option would end in a traceback.
    """
    from typer._click.exceptions import ClickException, NoArgsIsHelpError

    return ClickException, NoArgsIsHelpError


def packaged_builders() -> dict[str, Any]:
    """Names of the builders that `datasets` brings along: a data set of such a name would be parsed as files, not fetched."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return _PACKAGED_DATASETS_MODULES  # type: ignore[no-any-return]


def dtype_plan(model: Any, dtype: Any) -> dict[str, Any]:
    """Which parameters of a `transformers` model keep another dtype than asked: part of what `from_pretrained` does."""
    return model._get_dtype_plan(dtype)  # type: ignore[no-any-return]


def finish_loading(model: Any, config: Any, info: Any) -> None:
    """Tie weights and compute what no file holds (rotary tables), as the end of `from_pretrained` does."""
    type(model)._finalize_model_loading(model, config, info)


def drop_expected_keys(model: Any, info: Any) -> None:
    """Take out of a loading report what the model says may be missing or unexpected."""
    model._adjust_missing_and_unexpected_keys(info)
