"""Where bytes lie: the only package that opens, lists, renames and syncs."""
