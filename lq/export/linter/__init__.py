"""A linter for Q/DQ graphs: one function a rule, one table of rules."""

from lq.export.linter.finding import Finding
from lq.export.linter.fixing import fix
from lq.export.linter.linting import lint
from lq.export.linter.rules import RULES

__all__ = ["RULES", "Finding", "fix", "lint"]
