"""What a machine or a cluster lacks, and the memory, disk and time that an experiment will want."""
