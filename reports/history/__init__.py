"""Times over many versions: series, steps, tables and a page."""
