"""What carries a plan out: tasks, parts of files, and the transaction that publishes all or nothing."""
