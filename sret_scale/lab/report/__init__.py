"""The report: reads run folders, draws figures, writes one page."""
