"""Many runs, carried out in processes or on a cluster."""
