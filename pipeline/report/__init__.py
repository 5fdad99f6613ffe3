"""What a run found: results.json, one self-contained report.html, and a table for the terminal."""
