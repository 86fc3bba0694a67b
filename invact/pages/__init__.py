"""A plan or a trial as one HTML page with drawings, nothing to fetch.

`page` says what stands on it, `charts` draws, templates/page.html is the page.
"""
