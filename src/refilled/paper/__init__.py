"""The tables and figures of the paper: as data, reproduced, and compared with the printed numbers."""
