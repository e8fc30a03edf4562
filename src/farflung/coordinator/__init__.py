"""Coordinator: admits nodes, hands out leases, takes rollouts in, keeps records and ledger. An HTTP app, no torch.

Nothing in its memory matters: kill it at any moment, start it again, and nodes go on by themselves.
"""

from farflung.coordinator.process import load_profiles, open_coordinator, serve
from farflung.coordinator.routes import Coordinator

__all__ = ["Coordinator", "load_profiles", "open_coordinator", "serve"]
