"""What a plan says: records and figures, the reasons and notes in words, tables and sentences made from them.

`figures` is what is known, `report` the object that tells it; `reasons` says why a site is inverted or kept, `notes`
what else the reader of a plan should know.
"""

from invact.report.records import Site
from invact.report.report import Report

__all__ = ["Report", "Site"]
