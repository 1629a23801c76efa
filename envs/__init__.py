"""The worlds: one file each, found by name (data.make_env)."""
