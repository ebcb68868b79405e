"""What is said and drawn of a report: tables, advice, pages, plots. Nothing is measured here."""
