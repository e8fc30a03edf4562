"""Everything that crosses a machine, a file per subject; importers take every name from here."""

# ruff: noqa: F403

from farflung.protocol.messages.audits import *
from farflung.protocol.messages.descriptor import *
from farflung.protocol.messages.heartbeats import *
from farflung.protocol.messages.leases import *
from farflung.protocol.messages.limits import *
from farflung.protocol.messages.nodes import *
from farflung.protocol.messages.scores import *
from farflung.protocol.messages.status import *
from farflung.protocol.messages.steps import *
from farflung.protocol.messages.submissions import *
from farflung.protocol.messages.weights import *
