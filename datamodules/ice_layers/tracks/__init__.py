"""From raw traces to stacks: positions, blocks, travel time, firn, and what is known of traces."""
