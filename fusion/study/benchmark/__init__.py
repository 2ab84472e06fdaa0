"""What a benchmark says: settings, methods and seeds in a table, with tests, figures and a page."""
