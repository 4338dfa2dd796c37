"""What was measured, explained: recommendations, pictures, HTML, Markdown."""

from lq.report.advice import recommend
from lq.report.choosing import USES, check_use
from lq.report.write import write_report

__all__ = ["USES", "check_use", "recommend", "write_report"]
