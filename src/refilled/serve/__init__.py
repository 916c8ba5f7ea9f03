"""A local web server for a run's student: a page, and predictions as JSON."""
