"""Where independent tasks run: processes of this machine, or the nodes of a cluster."""
