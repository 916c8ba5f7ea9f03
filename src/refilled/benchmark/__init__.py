"""Many runs: grids of them, summaries over seeds, and the pages that show them."""
