"""HTTP and the life of a process: client, server, session, limits."""
