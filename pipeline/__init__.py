"""What runs: F-Learning's stages, from facts and a base model to a report.

Nothing here knows where it runs: `launch/` starts these stages on a laptop or a cluster, and is never
imported from here.
"""
