"""The page of comparison: one offline HTML file with plots, tables and words, and the same numbers as CSV, PNG and SVG."""
