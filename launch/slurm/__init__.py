"""SLURM, through submitit: what differs between sites, and the chain of jobs of an experiment."""
