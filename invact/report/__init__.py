"""What a plan says: as an object, as JSON, as a table, in words."""

from invact.report.report import Report, Site

__all__ = ["Report", "Site"]
