"""Readers of data sets, one file each: they open a data set and list its images, and decode none."""
