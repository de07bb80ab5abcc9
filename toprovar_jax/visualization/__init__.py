"""Pictures of what a traced run did: what it looked at, what it pruned, and why."""
