"""Reports as one HTML file: of runs beside each other, or of a comparison.

The file opens from a disk and asks for nothing else: style, script, charts and pictures are in it.
"""

from fulgurite.html_report.writing import write_report

__all__ = ["write_report"]
