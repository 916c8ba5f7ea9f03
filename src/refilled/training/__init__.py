"""Training: the loop, its record in a folder, saved states, the teacher's cache, several processes as one."""
