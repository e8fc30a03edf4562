"""State: the database and its tables, blobs by digest, ledger, metrics."""
