"""Everything that crosses a machine, a file per subject; importers take every name from here."""

# ruff: noqa: F403

from farflung.protocol.messages.audits import *
from farflung.protocol.messages.base import *
from farflung.protocol.messages.heartbeats import *
from farflung.protocol.messages.leases import *
from farflung.protocol.messages.nodes import *
from farflung.protocol.messages.runs import *
from farflung.protocol.messages.scores import *
from farflung.protocol.messages.steps import *
from farflung.protocol.messages.submissions import *
from farflung.protocol.messages.views import *
from farflung.protocol.messages.weights import *
