"""Results as tables, pages, charts and traces."""
