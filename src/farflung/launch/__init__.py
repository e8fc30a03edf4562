"""The embedded swarm: forkserver, several coordinators, terminal view, logs, summary and report."""
