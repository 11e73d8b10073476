"""One question a file; `python -m studies` runs them."""
