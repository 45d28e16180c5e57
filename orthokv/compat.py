"""Private doors of other packages that the library goes through, each with its reason: what to look at when one is updated.

`pyproject.toml` bounds these packages at the minor version that was tested.
"""

from __future__ import annotations

# Typer carries its own click and exports its errors only in part: a wrong option would end in a traceback.
from typer._click.exceptions import ClickException, NoArgsIsHelpError

__all__ = ["ClickException", "NoArgsIsHelpError"]
