"""Lightning modules of networks and baselines, with losses, metrics, schedules and uncertainty."""
