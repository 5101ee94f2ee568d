"""MiniMind's shared package: everything the numbered scripts have in common."""
