"""What storages over a file descriptor share: transfers, holes, locks, O_DIRECT. Linux only."""
