"""Every plot and table that a person looks at."""
