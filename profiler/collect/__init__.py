"""What is watched while a step runs: what the allocator does, and who owns what."""
