"""A local web server for a run's student: a web page, and predictions as JSON."""
