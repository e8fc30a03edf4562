"""Old words of settings and commands, each with the one that took its place: the old one is refused by name."""

SETTINGS = {
    "model.dtype": "model.profile",
    "generate.budget": "generate.max_new_tokens",
    "coordinator.veil": "coordinator.redact",
    "trust.brake_share": "trust.breaker_share",
    "trust.brake_nodes": "trust.breaker_nodes",
}
COMMANDS = {"brake": "breaker", "sift": "filter-tasks"}
