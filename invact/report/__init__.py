"""What a plan says: records and figures, the reasons and notes in words, tables and sentences made from them.

`figures` is what is known, `report` the object that tells it; `reasons` and `notes` hold every word on why.
"""

from invact.report.records import Site
from invact.report.report import Report

__all__ = ["Report", "Site"]
