"""The tables and figures of the paper: as data, carried out, and set beside the printed numbers."""
