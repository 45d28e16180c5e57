"""Pictures of a profile, a plan and a comparison, as PNG files.

matplotlib is an optional extra and imported at the first plot. Figures are built without pyplot and carry no date, so
that the same input gives the same bytes.
"""

from __future__ import annotations

from orthokv.show.plots.comparison import plot_comparison
from orthokv.show.plots.plan import plot_plan
from orthokv.show.plots.profile import plot_profile

__all__ = ["plot_comparison", "plot_plan", "plot_profile"]
