"""Filter drivers: they stand between a node's users and its child."""
