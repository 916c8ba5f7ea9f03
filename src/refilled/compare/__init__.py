"""Comparisons of methods over several seeds at equal cost, with a page that reports whether the teacher helped."""
