"""A plan or a trial as one HTML page with drawings, nothing to fetch."""
