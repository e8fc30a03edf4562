"""Settings of the coordinator: leases, trust, the nodes that it lets in and how much each may ask."""

from typing import Literal

from farflung.config.section import Section, setting

Role = Literal["trainer", "validator", "scorer"]


class LeaseSection(Section):
    rollouts: int = setting(
        16, "Rollouts in a lease of a node on probation or of unknown speed; of no other fewer.", ge=1, le=4096
    )
    target_s: float = setting(
        30.0,
        "Seconds for which a lease has work, by its node's measured speed; a quarter of a step if that is shorter. 0 "
        "gives all leases `lease.rollouts`.",
        ge=0,
    )
    lease_s: float = setting(300.0, "Seconds that a lease lasts at least, and after a sign of progress.", gt=0)
    slowest_tokens_per_s: float = setting(
        5.0,
        "Tokens a second of one rollout on the slowest node that is waited for; progress extends a lease no longer.",
        gt=0,
        is_advanced=True,
    )
    heartbeat_s: float = setting(5.0, "Seconds between heartbeats.", gt=0, is_advanced=True)
    devices: int = setting(
        16, "Most leases that one node holds: two for each of its devices.", ge=1, le=64, is_advanced=True
    )
    lost_s: float = setting(
        20.0, "Seconds without a heartbeat until a node's leases go to others.", gt=0, is_advanced=True
    )
    max_lag: int = setting(1, "Steps that a node may work behind the latest while it fetches.", ge=0, is_advanced=True)
    ahead: float = setting(
        2.0,
        "Groups open, or waiting and with variance, before work is held, as a multiple of `learn.groups`; at least 1.",
        gt=0,
        is_advanced=True,
    )


class TrustSection(Section):
    false_ejection_probability: float = setting(1e-6, "Bound on ever ejecting an honest node (alpha).", gt=0, lt=1)
    arbitrary_share: float = setting(
        3e-4, "Share of honest submissions allowed to be arbitrarily bad.", ge=0, lt=1, is_advanced=True
    )
    cap: float = setting(500.0, "Most that one submission may count against a node.", gt=1, is_advanced=True)
    probation_rollouts: int = setting(64, "Clean audited rollouts before a node is trusted.", ge=1)
    probation_waiting: int = setting(
        1, "Submissions of one node on probation that may wait for replay.", ge=1, is_advanced=True
    )
    probation_slots: int = setting(
        16, "Nodes on probation whose work may wait for replay at a time.", ge=1, is_advanced=True
    )
    audit_scale: float = setting(
        1.0, "A trusted node is audited with this over its clean rollouts.", ge=0, is_advanced=True
    )
    audit_floor: float = setting(
        0.01, "Share of a trusted node's rollouts that is audited for ever, if the budget affords it.", ge=0, le=1
    )
    audit_least: float = setting(0.002, "The same whatever the budget.", ge=0, le=1, is_advanced=True)
    audit_budget: float = setting(
        0.01, "Most that auditing trusted nodes may cost, as a share of what generation costs.", ge=0, le=1
    )
    canaries: int = setting(
        1,
        "Rollouts of the trainer's own, each step, that a validator must judge rightly.",
        ge=0,
        le=64,
        is_advanced=True,
    )
    self_test: int = setting(
        8,
        "Rollouts of the trainer's own, every 4 steps, on which nodes try their arithmetic; 0 for none.",
        ge=0,
        le=64,
        is_advanced=True,
    )
    breaker_share: float = setting(
        0.9,
        "Share of the verified work of nodes with a good record: if those that did more fail in one step, verdicts and "
        "training stop; ejections wait until those that did the rest pass.",
        ge=0,
        le=1,
        is_advanced=True,
    )
    breaker_nodes: int = setting(
        3, "Nodes with a good record that must fail in one step for either.", ge=1, is_advanced=True
    )


class CoordinatorSection(Section):
    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(0, "Port to listen on; 0 for any free one.", ge=0, le=65_535)
    processes: int = setting(
        1, "Processes that answer on the one port, each on a core of its own.", ge=1, le=64, is_advanced=True
    )
    database: str = setting(
        "",
        "`sqlite:////file` or `postgresql://user@host/name`; empty for SQLite in the run's folder.",
    )
    blobs: str = setting(
        "", "`file:///folder` or `s3://bucket/prefix?endpoint=URL&region=NAME`; empty for a folder in the run's folder."
    )
    redact: bool = setting(
        True,
        "Hide which rollouts are held for audit, and M, until their step can no longer be trained on.",
        is_advanced=True,
    )
    grants: dict[str, Role] = setting({}, "Public key in hex → `trainer`, `validator` or `scorer`; others are workers.")
    admission: Literal["open", "invite", "allow"] = setting(
        "open", "Nodes that may join as worker or relay: all, those that bring an invite, or those of `allow`."
    )
    invites: tuple[str, ...] = setting((), "Invite tokens; give each to one person, and take it out to withdraw it.")
    allow: tuple[str, ...] = setting((), "Node ids that may join when admission is `allow`.")
    admin_token_file: str = setting(
        "",
        "File with the token that admin routes ask for; FARFLUNG_ADMIN_TOKEN goes before it. Else the key does.",
        is_advanced=True,
    )
    rate_per_key: float = setting(
        200.0,
        "Most requests of one key in a second, on average; 0 for no limit. Granted roles have none.",
        ge=0,
        is_advanced=True,
    )
    rate_per_address: float = setting(
        2000.0,
        "Most requests from one address (IPv6: /64) in a second, on average; 0 for no limit.",
        ge=0,
        is_advanced=True,
    )
    connections_per_address: int = setting(
        2048,
        "Most connections from one address (IPv6: /64) to a process at a time; 0 for no limit.",
        ge=0,
        is_advanced=True,
    )
    bodies_mb: float = setting(
        256.0,
        "Most megabytes of submissions that a process receives at a time; 0 for no limit.",
        ge=0,
        is_advanced=True,
    )
    rate_burst_s: float = setting(
        10.0, "Seconds of these rates that may come at once.", ge=0.01, le=3600, is_advanced=True
    )
    proxies: tuple[str, ...] = setting(
        (), "Addresses of proxies whose X-Forwarded-For is believed; `*` for any, if nothing else can reach it."
    )
    hosts: tuple[str, ...] = setting(
        (),
        "Names that it is reached by, if any but addresses in digits, names without a dot and `host`; `*` for any. "
        "Empty is any too behind `proxies` or with `tls_cert`, which check the name themselves.",
    )
    tls_cert: str = setting("", "PEM file of the certificate and its chain, to speak https; with `tls_key`.")
    tls_key: str = setting("", "PEM file of its private key.")
    tls_ca: str = setting(
        "",
        "PEM file of an authority that roles trust beside the usual ones; for join, FARFLUNG_CA_FILE names it.",
        is_advanced=True,
    )
    minimum_version: int = setting(5, "Oldest protocol version that may join.", ge=0, is_advanced=True)
    claim_s: float = setting(
        30.0, "Seconds that a scorer or validator may keep what it claimed.", gt=0, is_advanced=True
    )
    mature_steps: int = setting(
        2, "Commits from a payment until it leaves escrow and is credit.", ge=0, is_advanced=True
    )
