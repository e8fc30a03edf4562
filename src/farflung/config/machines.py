"""Roles on machines of their own: relay, worker, validator, scorer."""

from farflung.config.section import DEVICE, Section, setting
from farflung.protocol.numerics import EngineKind


class RelaySection(Section):
    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(0, "Port to listen on; 0 for any free one.", ge=0, le=65_535)
    public_url: str = setting("", "Where nodes reach it, such as http://relay.example:7000; empty for host and port.")
    keep_versions: int = setting(3, "Versions of the weights kept.", ge=1, is_advanced=True)
    disk_gb: float = setting(0.0, "Most disk for weights; 0 for no bound but what is free.", ge=0)
    poll_s: float = setting(0.2, "Seconds between looks for a new version.", gt=0, is_advanced=True)
    upstream: tuple[str, ...] = setting(
        (), "Addresses of relays to mirror from; empty for the coordinator alone.", is_advanced=True
    )
    per_client: int = setting(16, "Most shards sent to one address at a time.", ge=1, is_advanced=True)
    at_once: int = setting(256, "Most shards sent at a time.", ge=1, is_advanced=True)


class WorkerSection(Section):
    engine: EngineKind = setting(
        "torch", "The engine that generates: torch, MLX (for a Mac) or llama.cpp here, or a vLLM server."
    )
    engine_url: str = setting(
        "", "Where a vLLM server runs, such as http://127.0.0.1:8000; empty where this node starts one."
    )
    engine_home: str = setting(
        "~/.farflung/engines/vllm", "Where `farflung engine install vllm` put it.", is_advanced=True
    )
    profile: str = setting(
        "", "Numerics profile to compute in, one that the run admits; empty for one that fits.", is_advanced=True
    )
    slots: int = setting(
        0,
        "Rollouts generated at once, 0 for as many as its device has room for, at most 64 on a processor and 256 "
        "elsewhere; a lease holds up to twice as many, which join as others end.",
        ge=0,
        le=4096,
    )
    pace_tokens_per_s: float = setting(
        0.0, "Most tokens generated in a second, on average; 0 for no limit.", ge=0, is_advanced=True
    )
    device: str = setting(
        "auto", "What it computes on: auto for the best there is, cpu, cuda, cuda:N, mps or xpu.", pattern=DEVICE
    )
    processes: int = setting(
        0, "Processes that work under one key, each on a device; 0 for one on each accelerator here.", ge=0, le=64
    )
    threads: int = setting(1, "Torch threads.", ge=1)
    keep_versions: int = setting(3, "Versions of the weights kept on disk.", ge=1, is_advanced=True)
    disk_gb: float = setting(0.0, "Most disk for weights; 0 for no bound but what is free.", ge=0)
    memory_gb: float = setting(
        0.0, "Most memory of its device that it takes; 0 for half of a machine's, 0.9 of a card's that is free.", ge=0
    )
    upstream: tuple[str, ...] = setting(
        (), "Relays to fetch weights from; empty for those that the run lists.", is_advanced=True
    )
    context: int = setting(0, "Longest prompt and completion taken, in tokens; 0 for no limit.", ge=0, is_advanced=True)
    ignore_self_test: bool = setting(
        False, "Work even if this machine's arithmetic is noisier than its profile allows.", is_advanced=True
    )
    metrics_port: int = setting(0, "Port on 127.0.0.1 for Prometheus; 0 for none.", ge=0, le=65_535, is_advanced=True)

    @property
    def is_elsewhere(self) -> bool:
        """Whether a server generates that this node did not start, on a device of its own."""
        return self.engine == "vllm" and bool(self.engine_url)


class ValidatorSection(Section):
    device: str = setting(
        "auto", "What it computes on: auto for the best there is, cpu, cuda, cuda:N, mps or xpu.", pattern=DEVICE
    )
    threads: int = setting(1, "Torch threads.", ge=1)
    claim: int = setting(32, "Audits claimed at once.", ge=1, le=1024, is_advanced=True)
    linger_s: float = setting(
        4.0,
        "Seconds that audits of trusted nodes may wait for company; many are replayed cheaper.",
        ge=0,
        le=600,
        is_advanced=True,
    )
    slots: int = setting(128, "Rollouts generated at once when evaluating.", ge=1, le=4096, is_advanced=True)
    metrics_port: int = setting(0, "Port on 127.0.0.1 for Prometheus; 0 for none.", ge=0, le=65_535, is_advanced=True)


class ScorerSection(Section):
    children: int = setting(2, "Processes that score.", ge=1, le=64)
    claim: int = setting(64, "Transcripts claimed at once.", ge=1, le=1024, is_advanced=True)
    timeout_s: float = setting(5.0, "Seconds for one score.", gt=0)
    faults: int = setting(3, "Faults until a rollout is given up as unscorable.", ge=1, is_advanced=True)
    metrics_port: int = setting(0, "Port on 127.0.0.1 for Prometheus; 0 for none.", ge=0, le=65_535, is_advanced=True)
