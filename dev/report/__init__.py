"""The report on runs and records: one HTML file that says and shows what they left."""
