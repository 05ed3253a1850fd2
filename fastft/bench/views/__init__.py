"""What a benchmark result looks like: tables, plots, a page."""
