"""A self-contained HTML page: how responses came about, token by token."""

from ggro_hf.report.html import ReportPrompt, ReportResponse, write_report

__all__ = ["ReportPrompt", "ReportResponse", "write_report"]
