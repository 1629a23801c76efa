"""One script for each table and figure: python -m paper.NAME."""
