"""Comparisons: several methods and seeds at equal cost, and the page that says whether the teacher helped."""
